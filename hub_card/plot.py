"""The quality-speed plot of an evaluation."""

from pathlib import Path
from typing import Any


# Okabe-Ito: told apart by colour-blind readers; middle grey reads on white and on dark
COLORS = {"exit": "#0072B2", "threshold": "#D55E00", "draft": "#009E73"}
PLACES = {"exit": ((0, 10), "center"), "threshold": ((-8, 0), "right"), "draft": ((0, -11), "center")}  # of labels
PEER = "#CC79A7"
GREY = "#888888"
LABELS = {"exit": "one exit for all tokens", "threshold": "exit_threshold", "draft": "assistant_early_exit (lossless)"}


def plot_quality_speed(
    record: dict[str, Any], path: str | Path, peers: dict[str, dict[str, Any]] | None = None
) -> bool:
    """
    Draw each task's score against the speed-up over full depth: the fixed exits, the curve of thresholds, drafting,
    and other models.

    Args:
        record (`dict`):
            An evaluation.
        path (`str` or `Path`):
            PNG file to write, with a transparent ground.
        peers (`dict[str, dict]`, *optional*):
            Evaluations of other models by their names, measured in the same way; shown at their full depth.

    Returns:
        `bool`: Whether there was something to draw: no picture without scores and speeds.
    """
    if not record["tasks"] or "speed" not in record:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    full = f"exit {record['request']['exit_layers'][-1]}"
    speed_ups = {name: s["median"] / record["speed"][full]["median"] for name, s in record["speed"].items()}
    tasks = record["tasks"]
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4), dpi=150, squeeze=False)
    for panel, (task, results) in zip(panels[0], tasks.items(), strict=True):
        scores = {name: 100 * values[results["metric"]] for name, values in results["settings"].items()}
        for kind, color in COLORS.items():
            # Drafting gives full depth's answers: its score is not measured again
            points = {
                name.removeprefix(f"{kind} "): (speed_up, scores[full] if kind == "draft" else scores[name])
                for name, speed_up in speed_ups.items()
                if name.startswith(f"{kind} ") and (kind == "draft" or name in scores)
            }
            if not points:
                continue
            style = "none" if kind == "draft" else "--" if kind == "exit" else "-"
            marker = {"exit": "o", "threshold": "s", "draft": "^"}[kind]
            xs, ys = zip(*sorted(points.values()), strict=True)
            panel.plot(xs, ys, color=color, marker=marker, linestyle=style, label=LABELS[kind])
            offset, align = PLACES[kind]
            for name, at in points.items():
                panel.annotate(
                    name, at, offset, textcoords="offset points", ha=align, va="center", fontsize=8, color=color
                )
        for name, peer in (peers or {}).items():
            theirs = f"exit {peer['request']['exit_layers'][-1]}"
            at = (
                peer["speed"][theirs]["median"] / record["speed"][full]["median"],
                100 * peer["tasks"][task]["settings"][theirs][results["metric"]],
            )
            panel.plot(*at, color=PEER, marker="D", linestyle="none")
            panel.annotate(name, at, (8, 0), textcoords="offset points", va="center", fontsize=8, color=PEER)
        panel.set_title(task, color=GREY)
        panel.set_xlabel("speed-up over full depth (tokens/s, measured)", color=GREY)
        panel.set_ylabel(f"{results['metric'].replace('_', ' ')}, %", color=GREY)
        panel.tick_params(colors=GREY)
        panel.margins(0.12)
        low, high = panel.get_ylim()
        panel.set_ylim(min(low, high - 10), max(high, low + 10))
        panel.grid(alpha=0.3)
        for spine in panel.spines.values():
            spine.set_color(GREY)
    panels[0][0].legend(fontsize=8, frameon=False, labelcolor=GREY)
    figure.tight_layout()
    figure.savefig(path, transparent=True)
    pyplot.close(figure)
    return True
