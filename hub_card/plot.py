"""The quality-speed plot of an evaluation."""

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

from sorted_llama.trainer.escaping import one_line

from .record import full_depth
from .settings import MODES, Setting, Style


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
        points += [*_draw_settings(panel, record, task), *_draw_peers(panel, record, task)]
        _dress(panel, task, tasks[task]["metric"])
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, frameon=False, labelcolor=GREY, loc="lower center", ncols=len(names))
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    _place_labels(figure, points)
    figure.savefig(path, transparent=True)
    pyplot.close(figure)
    return True


def _draw_settings(panel: Any, record: dict[str, Any], task: str) -> list[Point]:
    """A curve for each kind of setting that was measured."""
    results, full = record["tasks"][task], str(full_depth(record))
    points = []
    for name, speed in record["speed"].items():
        setting = Setting.read(name)
        scores = results["settings"].get(full if setting.mode.lossless else name)
        if scores is not None:
            at = (speed["median"] / record["speed"][full]["median"], 100 * scores[results["metric"]])
            points.append(Point(panel, str(setting.value), at, setting.mode.style))
    for mode in MODES.values():
        curve = sorted(point.at for point in points if point.style == mode.style)
        if curve:
            _draw(panel, curve, mode.style, label=mode.label)
    return points


def _draw_peers(panel: Any, record: dict[str, Any], task: str) -> list[Point]:
    points = []
    for name, peer in record.get("peers", {}).items():
        theirs, ours = str(full_depth(peer)), str(full_depth(record))
        speed_up = peer["speed"][theirs]["median"] / record["speed"][ours]["median"]
        score = peer["tasks"][task]["settings"][theirs][record["tasks"][task]["metric"]]
        points.append(Point(panel, name, (speed_up, 100 * score), PEER))
        _draw(panel, [points[-1].at], PEER)
    return points


def _draw(panel: Any, curve: list[tuple[float, float]], style: Style, **options: Any) -> None:
    xs, ys = zip(*curve, strict=True)
    panel.plot(xs, ys, color=style.color, marker=style.marker, linestyle=style.linestyle, clip_on=False, **options)


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
            at = panel.transData.transform(line.get_xydata())
            taken += [_box(x, y, 8 * pixels, 8 * pixels) for x, y in at]
            for (x0, y0), (x1, y1) in zip(at, at[1:], strict=False) if line.get_linestyle() != "None" else ():
                steps = int(math.hypot(x1 - x0, y1 - y0) / (4 * pixels)) + 1
                taken += [_box(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps, 1, 1) for i in range(steps)]
    for panel, name, at, style in points:
        font = {"fontsize": 8, "color": style.color, "ha": "center", "va": "center", "parse_math": False}
        text = panel.text(0, 0, one_line(name), **font)
        _, _, width, height = text.get_window_extent(renderer).bounds
        text.remove()
        width, height = width + 4 * pixels, height + pixels  # apart from the next one
        ground, (x, y) = panel.get_window_extent(renderer).extents, panel.transData.transform(at)
        tried: list[tuple] = []
        for away, turn in itertools.product((6, 14, 24, 36, 50), (0, 45, -45, 90, -90, 135, -135, 180)):
            angle = math.radians(style.direction + turn)
            dx, dy = (math.cos(angle) * (away * pixels + width / 2), math.sin(angle) * (away * pixels + height / 2))
            box = _box(x + dx, y + dy, width, height)
            covered = sum(_shared(box, other) for other in taken) + width * height - _shared(box, ground)
            tried.append((round(covered), len(tried), away, (dx / pixels, dy / pixels), box))
        _, _, away, place, box = min(tried, key=lambda one: one[:2])
        arrow = {"arrowstyle": "-", "color": style.color, "lw": 0.5, "shrinkB": 4} if away > 6 else None
        panel.annotate(one_line(name), at, place, textcoords="offset points", arrowprops=arrow, **font)
        taken.append(box)


def _box(x: float, y: float, width: float, height: float) -> tuple[float, ...]:
    """Left, bottom, right and top of a box around a point."""
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _shared(box: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Area that two boxes share."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    return max(width, 0) * max(min(box[3], other[3]) - max(box[1], other[1]), 0)
