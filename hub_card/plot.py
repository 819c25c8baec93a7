"""The quality-speed plot of an evaluation."""

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sorted_llama.trainer.escaping import one_line

from .record import measured
from .settings import MODES, Style


PEER = Style("#CC79A7", "D", "none", 0)  # of other models
GREY = "#888888"


class Point(NamedTuple):
    """Where a label belongs, and how it looks."""

    panel: Any
    name: str
    at: tuple[float, float]
    style: Style


def plot_quality_speed(record: dict[str, Any], path: str | Path) -> bool:
    """
    Draw each task's score against the speed-up over full depth, into a PNG with a transparent ground: the fixed exits,
    the curve of thresholds, drafting, and other models. Returns whether there was something to draw: no picture
    without scores and speeds.
    """
    tasks = record["tasks"]
    if not tasks or "speed" not in record:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4.4), dpi=150, squeeze=False)
    points: list[Point] = []
    for panel, task in zip(panels[0], tasks, strict=True):
        points += _draw(panel, record, task)
        _dress(panel, task, tasks[task]["metric"])
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, frameon=False, labelcolor=GREY, loc="lower center", ncols=len(names))
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    _place_labels(figure, points)
    figure.savefig(path, transparent=True)
    pyplot.close(figure)
    return True


def _draw(panel: Any, record: dict[str, Any], task: str) -> list[Point]:
    """A curve for each kind of setting that was measured, and other models."""
    points = []
    for way in measured(record, record["speed"]):
        name, style = (str(way.setting.value), way.setting.mode.style) if way.setting else (way.name, PEER)
        score = way.scores[task]
        if score is not None and way.speed_up is not None:
            points.append(Point(panel, name, (way.speed_up, 100 * score), style))
    for style, label in [*((mode.style, mode.label) for mode in MODES.values()), (PEER, None)]:
        curve = sorted(point.at for point in points if point.style == style)
        if curve:
            look = {"color": style.color, "marker": style.marker, "linestyle": style.linestyle, "label": label}
            panel.plot(*zip(*curve, strict=True), clip_on=False, **look)
    return points


def _dress(panel: Any, task: str, metric: str) -> None:
    """Title, axes and grid; no axis shows what no score and no speed can be."""
    panel.set_title(one_line(task), color=GREY, parse_math=False)
    panel.set_xlabel("speed-up over full depth (tokens/s, measured)", color=GREY)
    panel.set_ylabel(one_line(f"{metric.replace('_', ' ')}, %"), color=GREY, parse_math=False)
    panel.tick_params(colors=GREY)
    panel.margins(0.12)
    low, high = max(panel.get_ylim()[0], 0), min(panel.get_ylim()[1], 100)
    panel.set_ylim(max(min(low, high - 10), 0), min(max(high, low + 10), 100))
    panel.set_xlim(left=max(panel.get_xlim()[0], 0))
    panel.grid(alpha=0.3)
    for spine in panel.spines.values():
        spine.set_color(GREY)


def _place_labels(figure: Any, points: list[Point]) -> None:
    """Write each label where it covers no point, no line and no other label, as near as there is room."""
    renderer, pixels = figure.canvas.get_renderer(), figure.dpi / 72
    taken = []
    for panel in figure.axes:
        for line in panel.get_lines():
            ends = panel.transData.transform(line.get_xydata())
            taken += [_box(end, 8 * pixels) for end in ends]
            for start, end in itertools.pairwise(ends) if line.get_linestyle() != "None" else ():
                steps = int(math.dist(start, end) / (4 * pixels)) + 1
                taken += [_box(at, 1) for at in np.linspace(start, end, steps, endpoint=False)]
    for panel, name, at, style in points:
        font = {"fontsize": 8, "color": style.color, "ha": "center", "va": "center", "parse_math": False}
        text = panel.text(0, 0, one_line(name), **font)
        size = text.get_window_extent(renderer).size + np.array([4, 1]) * pixels  # apart from the next one
        text.remove()
        ground, center = panel.get_window_extent(renderer).extents, panel.transData.transform(at)
        tried = []
        for away, turn in itertools.product((6, 14, 24, 36, 50), (0, 45, -45, 90, -90, 135, -135, 180)):
            angle = math.radians(style.direction + turn)
            offset = np.array([math.cos(angle), math.sin(angle)]) * (away * pixels + size / 2)
            box = _box(center + offset, size)
            covered = _shared(box, taken) + size.prod() - _shared(box, [ground])
            tried.append((round(covered), away, offset / pixels, box))
        _, away, place, box = min(tried, key=lambda place: place[0])
        arrow = {"arrowstyle": "-", "color": style.color, "lw": 0.5, "shrinkB": 4} if away > 6 else None
        panel.annotate(one_line(name), at, place, textcoords="offset points", arrowprops=arrow, **font)
        taken.append(box)


def _box(center: np.ndarray, size: np.ndarray | float) -> np.ndarray:
    """Left, bottom, right and top of a box around a point."""
    return np.concatenate([center - size / 2, center + size / 2])


def _shared(box: np.ndarray, others: list[np.ndarray]) -> float:
    """Area that a box shares with others."""
    found = np.stack(others)
    sides = np.minimum(box[2:], found[:, 2:]) - np.maximum(box[:2], found[:, :2])
    return sides.clip(0).prod(axis=1).sum()
