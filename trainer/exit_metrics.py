"""What a loss says of every exit, as (sum, count) pairs: added up over steps and processes, divided to be logged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sorted_llama.modeling_sorted_llama.block_sorted_llama import index_tensor


@dataclass(frozen=True)
class Metric:
    """A mean over labelled tokens that the model's outputs hold, one value an exit, where they hold it."""

    output: str
    per_item: bool = False  # divided by the items of the whole accumulated batch, not by the call's labelled tokens
    in_training: bool = True


# By name in the logs (`exit_10_loss`), in the order of the table's columns: a new metric is a line here
METRICS = {
    "loss": Metric("exit_losses", per_item=True),
    "mean_token_accuracy": Metric("exit_token_accuracies"),
    "agreement": Metric("exit_agreements", in_training=False),
    "divergence": Metric("exit_divergences", per_item=True),
}


class ExitMetrics:
    """
    Sums and counts of [`METRICS`] for all exits since they were last taken; in training, of those that are logged
    there. They stay on the device: to read them there at every step would wait for it.
    """

    def __init__(self, exit_layers: Sequence[int], training: bool):
        self.exit_layers = list(exit_layers)
        self.metrics = {name: metric for name, metric in METRICS.items() if metric.in_training or not training}
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self.pairs: dict[str, torch.Tensor] = {}  # of each metric `[2, num_exits]`: sums, counts
        self.num_present: torch.Tensor | int = 0

    def add(self, exits: Sequence[int], outputs: Any, num_labelled: Any, num_items: Any, num_present: Any) -> None:
        """Add a batch's means for `exits`, and its numbers of tokens: labelled, divided by in the loss, in all."""
        device = outputs.exit_losses.device
        columns = index_tensor([self.exit_layers.index(k) for k in exits], device)
        for name, metric in self.metrics.items():
            means = getattr(outputs, metric.output)
            if means is None:
                continue
            sums = means * (num_items if metric.per_item else num_labelled)
            pair = torch.stack([sums.float(), num_labelled.float().expand(len(exits))])
            total = self.pairs.setdefault(name, pair.new_zeros(2, len(self.exit_layers)))
            total.index_add_(1, columns, pair)
        self.num_present = self.num_present + num_present.to(device)

    def take(self, accelerator: Any) -> tuple[dict[str, dict[int, tuple[float, float]]], int]:
        """By name and exit the sum and the count, and the number of tokens, over all processes; then start anew."""
        pairs, num_present = accelerator.reduce((self.pairs, self.num_present), reduction="sum")
        self.clear()
        by_exit = {name: dict(zip(self.exit_layers, zip(*pair.tolist()))) for name, pair in pairs.items()}
        return by_exit, int(num_present)
