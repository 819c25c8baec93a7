"""The quality-speed curve of a sorted checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from exit_results import ExitResult  # noqa: E402


# Okabe-Ito: told apart by colour-blind readers, on white and on dark
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


def plot_quality_speed(before: Sequence[ExitResult], after: Sequence[ExitResult], path: Path) -> None:
    """
    Draw exact match against speed-up over full depth, one line a task: solid after SoFT, dashed before.

    Args:
        before (`Sequence[ExitResult]`):
            The exits of the untouched model, shallow to deep.
        after (`Sequence[ExitResult]`):
            The exits of the trained one.
        path (`Path`):
            PNG file to write.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150)
    for color, task in zip(COLORS, after[-1].exact_match, strict=False):
        for results, style, name in ((after, "o-", "after SoFT"), (before, "o--", "before")):
            speed_ups = [r.tokens_per_second / results[-1].tokens_per_second for r in results]
            quality = [100 * r.exact_match[task] for r in results]
            fill = color if results is after else "white"
            axes.plot(speed_ups, quality, style, color=color, markerfacecolor=fill, label=f"{task}, {name}")
            if results is after:
                for x, y, result in zip(speed_ups, quality, results, strict=True):
                    axes.annotate(
                        f"{result.exit_layer} layers",
                        (x, y),
                        (0, 7),
                        textcoords="offset points",
                        ha="center",
                        fontsize=8,
                    )
    axes.set_xlabel("speed-up over full depth (tokens/s, measured)")
    axes.set_ylabel("exact match on held-out questions (%)")
    axes.set_ylim(-4, 108)
    axes.set_title("One checkpoint, every exit a model")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


__all__ = ["plot_quality_speed"]
