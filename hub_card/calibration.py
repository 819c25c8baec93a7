"""How far an exit's confidence can be trusted, and the thresholds that follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .measure import TeacherForced


def calibration_error(confidences: torch.Tensor, agrees: torch.Tensor, num_bins: int = 10) -> float:
    """
    Expected calibration error of one exit: how far its confidences `(num_tokens,)` are from how often its greedy token
    is full depth's, on average over equally wide bins of confidence, weighted by their tokens.
    """
    bins = (confidences * num_bins).long().clamp(0, num_bins - 1)
    distances = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, confidences.double() - agrees.double())
    return distances.abs().sum().item() / len(confidences)


@dataclass
class Suggestion:
    """The `exit_threshold` that keeps a wanted agreement, and the layers that a token then runs on average."""

    wanted_agreement: float
    exit_threshold: float
    mean_layers: float


def suggest_thresholds(
    read: TeacherForced, exits: list[int], wanted: Sequence[float] = (0.9, 0.95, 0.99)
) -> list[Suggestion]:
    """
    The lowest `exit_threshold` that keeps each wanted agreement with full depth, where every token leaves at the first
    of `exits` that is at least so confident. The tokens before it are the right ones here; in generation they are the
    model's own.
    """
    depth = torch.tensor(exits, dtype=torch.float32)
    curve = []
    for threshold in [*(i / 100 for i in range(100)), 0.995, 0.999, 1.01]:
        confident = read.confidences >= threshold
        confident[-1] = True  # full depth decides at the latest
        left_at = confident.int().argmax(0)
        agreement = read.agrees.gather(0, left_at[None]).double().mean().item()
        curve.append((agreement, threshold, depth[left_at].mean().item()))
    suggestions = []
    for target in wanted:
        # Above the last threshold that falls short, not at a lucky one below
        short = [i for i, (agreement, *_) in enumerate(curve) if agreement < target]
        suggestions.append(Suggestion(target, *curve[short[-1] + 1 if short else 0][1:]))
    return suggestions
