"""Calibration error and thresholds, against straight computations."""

import pytest
import torch

from sorted_llama.hub_card.calibration import calibration_error, suggest_thresholds
from sorted_llama.hub_card.measure import TeacherForced


def test_calibrated_confidence_has_no_error():
    """Tokens that agree as often as their confidence says."""
    confidences = torch.tensor([0.25] * 4 + [0.75] * 4)
    agrees = torch.tensor([True, False, False, False, True, True, True, False])
    assert calibration_error(confidences, agrees, num_bins=4) == pytest.approx(0.0)
    assert calibration_error(confidences, ~agrees, num_bins=4) == pytest.approx(0.5)


def test_the_calibration_error_is_that_of_a_loop_over_bins():
    generator = torch.Generator().manual_seed(0)
    confidences = torch.rand(500, generator=generator)
    confidences[0] = 1.0
    agrees = torch.rand(500, generator=generator) < 0.3
    error = 0.0
    for low in range(10):
        inside = [i for i, c in enumerate(confidences.tolist()) if low == min(int(c * 10), 9)]
        if inside:
            distance = confidences[inside].mean() - agrees[inside].float().mean()
            error += len(inside) / 500 * abs(distance.item())
    assert calibration_error(confidences, agrees) == pytest.approx(error, abs=1e-5)


def read(seed=0, tokens=400):
    generator = torch.Generator().manual_seed(seed)
    confidences = torch.rand(3, tokens, generator=generator)
    agrees = torch.rand(3, tokens, generator=generator) < confidences  # calibrated
    agrees[-1] = True
    return TeacherForced(torch.zeros(3, tokens), confidences, agrees)


@pytest.mark.parametrize("seed", range(5))
def test_suggested_thresholds_keep_the_agreement(seed):
    measured, exits = read(seed), [1, 2, 4]

    def policy(threshold):
        agreeing, layers = 0, 0
        for t in range(measured.agrees.shape[1]):
            left = next((e for e in (0, 1) if measured.confidences[e, t] >= threshold), 2)
            agreeing += measured.agrees[left, t].item()
            layers += exits[left]
        return agreeing / measured.agrees.shape[1], layers / measured.agrees.shape[1]

    suggestions = suggest_thresholds(measured, exits, (0.0, 0.7, 0.9, 1.0))
    assert [s.wanted_agreement for s in suggestions] == [0.0, 0.7, 0.9, 1.0]
    assert suggestions[0].exit_threshold == 0.0 and suggestions[0].mean_layers == 1.0
    for s in suggestions:
        agreement, layers = policy(s.exit_threshold)
        assert s.mean_layers == pytest.approx(layers)
        assert agreement >= s.wanted_agreement
        if s.exit_threshold > 0.01:  # the next lower one would fall short
            assert policy(min(s.exit_threshold - 0.01, 0.999 if s.exit_threshold > 1 else 1))[0] < s.wanted_agreement
    thresholds = [s.exit_threshold for s in suggestions]
    assert thresholds == sorted(thresholds)


def test_full_depth_alone_runs_all_layers():
    measured = TeacherForced(*(t[-1:] for t in (torch.zeros(3, 5), torch.rand(3, 5), torch.ones(3, 5).bool())))
    assert [s.mean_layers for s in suggest_thresholds(measured, [4])] == [4.0] * 3
