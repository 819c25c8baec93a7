"""How far an exit's confidence can be trusted, and what follows: thresholds to suggest, drafting's gain to expect."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .measure import TeacherForced


@dataclass
class Reliability:
    """
    Confidence of an exit against how often its greedy token is full depth's.

    Args:
        expected_calibration_error (`float`):
            Mean distance of the two over equally wide bins of confidence, weighted by their tokens.
        bins (`list[dict[str, float]]`):
            Of each bin that has tokens: mean `confidence`, `agreement`, and its `share` of the tokens.
    """

    expected_calibration_error: float
    bins: list[dict[str, float]]


def reliability(confidences: torch.Tensor, agrees: torch.Tensor, num_bins: int = 10) -> Reliability:
    """
    Reliability curve and expected calibration error of one exit.

    Args:
        confidences (`torch.FloatTensor` of shape `(num_tokens,)`):
            From 0 to 1.
        agrees (`torch.BoolTensor` of shape `(num_tokens,)`):
            Whether the exit's greedy token is full depth's.
        num_bins (`int`, *optional*, defaults to 10):
            Number of equally wide bins.

    Returns:
        [`Reliability`]
    """
    index = (confidences * num_bins).long().clamp(max=num_bins - 1)
    bins = []
    for i in range(num_bins):
        inside = index == i
        if inside.any():
            mean = {"confidence": confidences[inside].mean().item(), "agreement": agrees[inside].float().mean().item()}
            bins.append({**mean, "share": inside.float().mean().item()})
    return Reliability(sum(b["share"] * abs(b["confidence"] - b["agreement"]) for b in bins), bins)


@dataclass
class Suggestion:
    """
    A threshold for a wanted agreement.

    Args:
        wanted_agreement (`float`):
            How often a token is to be full depth's.
        exit_threshold (`float`):
            Value of `generate`'s argument, the same at every exit.
        agreement (`float`):
            What it gave on the tokens that it was chosen on.
        mean_layers (`float`):
            Layers a token ran, on average.
    """

    wanted_agreement: float
    exit_threshold: float
    agreement: float
    mean_layers: float


def suggest_thresholds(
    read: TeacherForced, exits: list[int], wanted: Sequence[float] = (0.9, 0.95, 0.99)
) -> list[Suggestion]:
    """
    The lowest `exit_threshold` that keeps a wanted agreement, where every token leaves at the first exit that is at
    least so sure. The tokens before it are the right ones here; in generation they are the model's own.

    Args:
        read ([`TeacherForced`]):
            What the exits said.
        exits (`list[int]`):
            The exits, ascending, full depth last.
        wanted (`Sequence[float]`, *optional*, defaults to `(0.9, 0.95, 0.99)`):
            Agreements.

    Returns:
        `list[Suggestion]`: One for each of `wanted`.
    """
    depth = torch.tensor(exits, dtype=torch.float32)
    curve = []
    for threshold in [*(i / 100 for i in range(100)), 0.995, 0.999, 1.01]:
        sure = read.confidences >= threshold
        sure[-1] = True  # full depth decides at the latest
        left_at = sure.int().argmax(0)
        agreement = read.agrees.gather(0, left_at[None]).double().mean().item()
        curve.append((threshold, agreement, depth[left_at].mean().item()))
    suggestions = []
    for target in wanted:
        # Above the last threshold that falls short, not at a lucky one below
        short = [i for i, (_, agreement, _) in enumerate(curve) if agreement < target]
        suggestions.append(Suggestion(target, *curve[short[-1] + 1 if short else 0]))
    return suggestions


def draft_gain(agreement: float, layer_share: float, head_share: float, longest: int = 8) -> tuple[float, int]:
    """
    Speed-up of self-speculation that an agreement promises, where a token costs the weights that are read for it:
    `n` drafts read the shallow layers and a head each, checking reads the rest once for all of them.

    Args:
        agreement (`float`):
            How often the exit's greedy token is full depth's, taken for the acceptance rate.
        layer_share (`float`):
            Weights of the exit's layers over those of a full step (layers and head).
        head_share (`float`):
            Weights of the head over those of a full step.
        longest (`int`, *optional*, defaults to 8):
            Most drafts to consider.

    Returns:
        `tuple[float, int]`: The speed-up, 1.0 for no gain, and the number of drafts; 0 drafts where none pays.
    """
    best = (1.0, 0)
    for n in range(1, longest + 1):
        expected = sum(agreement**i for i in range(n + 1))
        cost = 1 + n * (
            layer_share + head_share
        )  # the drafts, then a full pass whose lower layers take the last token
        best = max(best, (expected / cost, n))
    return best
