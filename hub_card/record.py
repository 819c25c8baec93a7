"""The file of an evaluation: how it is written, and what is checked before anything is read from it."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sorted_llama.modeling_sorted_llama.configuration_sorted_llama import check_exit_layers, is_number


SCHEMA_VERSION = 1
FILE_NAME = "evaluation.json"  # in the checkpoint's folder


@dataclass(frozen=True)
class Value:
    """What a value must be, in words, and whether it is."""

    what: str
    holds: Callable[[Any], bool]


TEXT = Value("text", lambda value: isinstance(value, str))
COUNT = Value("an integer from 0 to 2^63", lambda value: type(value) is int and 0 <= value < 2**63)
NUMBER = Value("a finite number", is_number)
SHARE = Value("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
SPEED = Value("a number above 0", lambda value: is_number(value) and value > 0)
EXIT = Value("the number of an exit", lambda value: re.fullmatch(r"[1-9]\d{0,8}", value) is not None)
SETTING = Value(
    "'exit K', 'draft K' or 'threshold T'",
    lambda value: re.fullmatch(r"(exit|draft) [1-9]\d{0,8}|threshold \d+(\.\d+)?(e[-+]?\d+)?", value) is not None,
)


@dataclass(frozen=True)
class Each:
    """A mapping whose keys and values are alike."""

    key: Value
    value: Any


# What the page and its picture read. `?`: a stopped run, or an older version, has none
READ = {
    "loss": NUMBER,
    "agreement": SHARE,
    "reliability?": {"expected_calibration_error": NUMBER},  # of the exits below full depth
}
SUGGESTION = {"wanted_agreement": SHARE, "exit_threshold": NUMBER, "mean_layers": NUMBER}
TASK = {
    "metric": TEXT,
    "settings": Each(SETTING, Each(TEXT, SHARE)),
    "exits": Each(EXIT, READ),
    "suggested_thresholds?": [SUGGESTION],
}
TIMED = {"prompts": COUNT, "prompt_tokens": COUNT, "max_new_tokens": COUNT, "runs": COUNT}
RECORD = {
    "request": {
        "exit_layers": [COUNT],
        "settings": Each(SETTING, {}),
        "tasks": Each(TEXT, {"rows": COUNT}),
        "dtype": TEXT,
        "timed?": TIMED,
    },
    "made_by": {"machine": TEXT, "date": TEXT, "command": TEXT, "versions": {"torch": TEXT}},
    "exits": Each(EXIT, {"parameters": COUNT, "flops": COUNT, "kv_bytes": COUNT}),
    "tasks": Each(TEXT, TASK),
    "harness": Each(TEXT, Each(TEXT, Each(EXIT, Each(TEXT, NUMBER)))),
    "speed?": Each(SETTING, {"median": SPEED, "best": SPEED}),
    "peers?": Each(TEXT, {}),  # records themselves
}


def load_evaluation(path: str | Path) -> dict[str, Any]:
    """
    Read an evaluation.

    Args:
        path (`str` or `Path`):
            JSON file, or a folder with an `evaluation.json`.

    Returns:
        `dict`

    Raises:
        ValueError: If there is no such file, if it is no JSON, if it is of another schema than this version reads, or
            if a field is missing or holds what no evaluation writes; the message names the file and the field.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"The evaluation {str(file)!r} could not be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The evaluation {str(file)!r} is no JSON: {error}.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{str(file)!r} is no evaluation: it holds no object, but {_shown(record)}.")
    if record.get("schema_version") != SCHEMA_VERSION:
        version = record.get("schema_version")
        raise ValueError(f"{str(file)!r} has schema version {_shown(version)}, this version reads {SCHEMA_VERSION}.")
    check_record(record, f"{str(file)!r}: ")
    return record


def check_record(record: dict[str, Any], source: str = "") -> None:
    """
    Check what is read of an evaluation, so that nothing else has to.

    Args:
        record (`dict`):
            An evaluation.
        source (`str`, *optional*, defaults to `""`):
            What the message begins with.

    Raises:
        ValueError: If a field is missing or holds what no evaluation writes; the message names it.
    """
    _check(record, RECORD, "", source)
    full = check_exit_layers(record["request"]["exit_layers"], None, f"{source}request.exit_layers")[-1]
    _check(record["exits"], {str(full): {}}, "exits", source)
    for task, results in record["tasks"].items():
        for setting, scores in results["settings"].items():
            _check(scores, {results["metric"]: SHARE}, f"tasks.{task}.settings.{setting}", source)
        read: dict[str, Any] = {k: {"reliability": {}} if k != str(full) else {} for k in record["exits"]}
        _check(results["exits"], read, f"tasks.{task}.exits", source)
    if "speed" in record:
        measured: dict[str, Any] = dict.fromkeys(
            [*record["request"]["settings"], *(f"exit {k}" for k in record["exits"])], {}
        )
        _check(record, {"speed": measured, "request": {"timed": TIMED}}, "", source)
        if not record["tasks"] or record["request"]["timed"]["prompts"] == 0:
            raise ValueError(f"{source}`speed` was measured, but `tasks` or `request.timed.prompts` is empty.")
    for name, peer in record.get("peers", {}).items():
        check_record(peer, f"{source}peers.{name}.")


def _check(value: Any, shape: Any, name: str, source: str) -> None:
    if isinstance(shape, Value):
        if not shape.holds(value):
            raise ValueError(f"{source}`{name}` must be {shape.what}, got {_shown(value)}.")
        return
    of_type, what = (list, "a list") if isinstance(shape, list) else (dict, "an object")
    if not isinstance(value, of_type):
        raise ValueError(f"{source}`{name}` must be {what}, got {_shown(value)}.")
    if isinstance(shape, list):
        for number, entry in enumerate(value):
            _check(entry, shape[0], f"{name}[{number}]", source)
    elif isinstance(shape, Each):
        for key, entry in dict(value).items():
            _check(key, shape.key, f"{name}: its key", source)
            _check(entry, shape.value, f"{name}.{key}", source)
    else:
        for key, of_field in shape.items():
            field = key.removesuffix("?")
            inner = f"{name}.{field}" if name else field
            if field in value:
                _check(value[field], of_field, inner, source)
            elif field == key:
                raise ValueError(f"{source}`{inner}` is missing.")


def _shown(value: Any) -> str:
    """A value in a message, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def write_json(path: Path, content: dict) -> None:
    """
    Write JSON so that an interruption leaves the old file or the new one.

    Args:
        path (`Path`):
            File.
        content (`dict`):
            What it is to hold.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)
