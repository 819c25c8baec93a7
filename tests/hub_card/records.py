"""Evaluations for the tests: one made by hand, and what a quick one of a tiny model takes."""

import json
from typing import Any

from tests.tiny import save_tiny, tiny_sorted


EXITS = [1, 2, 4]
TASK = "trivia"
QUICK = {"exit_thresholds": [0.5], "num_timed": 1, "max_new_tokens": 2, "runs": 1, "dtype": "float32", "device": "cpu"}


def make_record(task: str = TASK, score: float = 0.5, **made_by: Any) -> dict[str, Any]:
    """A whole evaluation of a model of four layers: one task, one threshold, two drafts."""
    names = [f"exit {k}" for k in EXITS] + ["threshold 0.5"]
    settings = [*names, "draft 1", "draft 2"]
    read = {"loss": 1.0, "agreement": 0.5, "reliability": {"expected_calibration_error": 0.1}}
    return {
        "schema_version": 1,
        "request": {
            "exit_layers": list(EXITS),
            "settings": {name: {} for name in settings},
            "tasks": {task: {"kind": "qa", "source": "x", "rows": 3, "sha256": "0"}},
            "timed": {"prompts": 2, "prompt_tokens": 8, "max_new_tokens": 4, "runs": 1},
            "dtype": "float32",
            "chat": False,
        },
        "made_by": {
            "machine": "a CPU",
            "versions": {"torch": "2.0"},
            "date": "2026-01-01T00:00:00",
            "command": "sorted-llama evaluate model",
            **made_by,
        },
        "exits": {str(k): {"parameters": 10 * k, "flops": 10 * k, "kv_bytes": 10 * k} for k in EXITS},
        "tasks": {
            task: {
                "kind": "qa",
                "metric": "exact_match",
                "settings": {name: {"exact_match": score, "f1": score} for name in names},
                "exits": {str(k): dict(read) for k in EXITS},
                "suggested_thresholds": [{"wanted_agreement": 0.9, "exit_threshold": 0.5, "mean_layers": 2.0}],
            }
        },
        "speed": {name: {"median": 10.0 + i, "best": 11.0 + i} for i, name in enumerate(settings)},
        "harness": {},
    }


def make_folder(folder):
    """A tiny model and two tasks."""
    save_tiny(folder / "model", tiny_sorted(initializer_range=0.2, exit_layers=EXITS))
    rows = [{"question": f"what is {i}?", "answers": [f"{i}", "none"]} for i in range(5)]
    (folder / "trivia.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"prompt": f"say {i}:", "completion": f" {i}"} for i in range(4)]
    (folder / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def data(folder):
    return [("qa", str(folder / "trivia.jsonl")), ("completions", str(folder / "held_out.jsonl"))]


def cells(page):
    """Of the tables of a page, without the lines below headers."""
    table = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
