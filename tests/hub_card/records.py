"""Evaluations made by hand, for what is made of them."""

from typing import Any


EXITS = (1, 2, 4)
TASK = "trivia"


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
