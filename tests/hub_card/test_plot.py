"""The picture of an evaluation: every label can be read, no axis shows what no score can be."""

import itertools

import pytest
from matplotlib import pyplot
from matplotlib.text import Text

from sorted_llama.hub_card.plot import plot_quality_speed


SPEEDS = {"exit 10": 21, "exit 15": 16, "exit 20": 13, "exit 30": 10, "threshold 0.5": 17, "threshold 0.8": 12}
SPEEDS |= {"threshold 0.9": 11.2, "threshold 0.97": 10.6, "draft 10": 10.9, "draft 15": 10.7, "draft 20": 10.5}
SCORES = {"exit 10": 0.05, "exit 15": 0.31, "exit 20": 0.82, "exit 30": 0.84, "threshold 0.5": 0.5}
SCORES |= {"threshold 0.8": 0.8, "threshold 0.9": 0.83, "threshold 0.97": 0.84}
TASKS = {"a $b_c$ \\frac{": SCORES, "all right": dict.fromkeys(SCORES, 1.0), "none": dict.fromkeys(SCORES, 0.0)}
PEER = "a small $Llama_3$\nmodel"


@pytest.mark.parametrize("tasks", [list(TASKS), *([task] for task in TASKS)], ids=str)
def test_the_labels_of_the_plot_can_be_read(tmp_path, monkeypatch, tasks):
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    record = {
        "request": {"exit_layers": [10, 15, 20, 30]},
        "speed": {name: {"median": speed, "best": speed} for name, speed in SPEEDS.items()},
        "tasks": {
            task: {"metric": "exact_match", "settings": {n: {"exact_match": s} for n, s in TASKS[task].items()}}
            for task in tasks
        },
    }
    of_peer = {"settings": {"exit 12": {"exact_match": 0.02}}}
    peer = {"request": {"exit_layers": [12]}, "speed": {"exit 12": {"median": 20.5, "best": 20.5}}}
    record["peers"] = {PEER: {**peer, "tasks": dict.fromkeys(tasks, of_peer)}}
    assert plot_quality_speed(record, tmp_path / "plot.png")
    (figure,) = figures
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    renderer = figure.canvas.get_renderer()
    for panel, task in zip(figure.axes, tasks, strict=True):
        assert panel.get_title() == task
        low, high = panel.get_ylim()
        assert low >= 0 and high <= 100 and high - low >= 10 and panel.get_xlim()[0] >= 0
        names = [name.split(" ")[1] for name in SPEEDS] + ["a small $Llama_3$ model"]
        assert sorted(text.get_text() for text in panel.texts) == sorted(names)
        boxes = [Text.get_window_extent(text, renderer) for text in panel.texts]
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other), task
        points = panel.transData.transform([point for line in panel.get_lines() for point in line.get_xydata()])
        ground = panel.get_window_extent(renderer)
        for box in boxes:
            assert not any(box.contains(*point) for point in points)
            assert ground.contains(box.x0, box.y0) and ground.contains(box.x1, box.y1)
    (legend,) = figure.legends
    box = legend.get_window_extent(renderer)
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.axes[0].get_tightbbox(renderer).y0
