"""The file of an evaluation: what is checked before it is read, how it is written, and where it comes from."""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from reprlib import repr as shown
from typing import Any, NamedTuple

import torch

from sorted_llama.modeling_sorted_llama.configuration_sorted_llama import check_exit_layers, is_number

from .settings import MODES, Setting


SCHEMA_VERSION = 1
FILE_NAME = "evaluation.json"  # in the checkpoint's folder
PACKAGES = ("sorted-llama", "torch", "transformers", "tokenizers", "datasets", "lm-eval")


class Value(NamedTuple):
    """What a value must be, in words, and whether it is. As the key of a table it stands for all keys."""

    what: str
    holds: Callable[[Any], bool]


def _is_setting(name: str) -> bool:
    try:
        return bool(Setting.read(name))
    except ValueError:
        return False


TEXT = Value("text", lambda value: isinstance(value, str))
COUNT = Value("an integer from 0 to 2^63", lambda value: type(value) is int and 0 <= value < 2**63)
NUMBER = Value("a finite number", is_number)
SHARE = Value("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
SPEED = Value("a number above 0", lambda value: is_number(value) and value > 0)
DTYPE = Value("float32, float16 or bfloat16", lambda value: value in ("float32", "float16", "bfloat16"))
EXIT = Value("the number of an exit", lambda value: _is_setting(f"exit {value}"))
SETTING = Value(f"the name of a setting, one of {', '.join(MODES)} and a value", _is_setting)
LIST = Value("a list", lambda value: isinstance(value, list))
OBJECT = Value("an object", lambda value: isinstance(value, dict))

# What the page and its plot read; `?`: a stopped run, or an older version, has none
TIMED = {"prompts": COUNT, "prompt_tokens": COUNT, "max_new_tokens": COUNT, "runs": COUNT}
TASK = {
    "metric": TEXT,
    "settings": {SETTING: {TEXT: SHARE}},
    # The reliability is of the exits below full depth
    "exits": {EXIT: {"loss": NUMBER, "agreement": SHARE, "reliability?": {"expected_calibration_error": NUMBER}}},
    "suggested_thresholds?": [{"wanted_agreement": SHARE, "exit_threshold": NUMBER, "mean_layers": NUMBER}],
}
CERTIFICATE = {
    "data": {"name": TEXT},
    "loss": TEXT,
    "risk": SHARE,
    "delta": SHARE,
    "tested_on": COUNT,
    "tested": [{"setting": SETTING, "mean_loss": SHARE, "p_value": SHARE}],
    "setting?": SETTING,  # where one was certified
    "speed_up?": SPEED,
    "weights": TEXT,
    "config": TEXT,
    "tokenizer": TEXT,
    "chat_template": TEXT,
    "dtype": DTYPE,
    "device": TEXT,
    "decoding": {"max_new_tokens": COUNT},
}
RECORD = {
    "request": {
        "exit_layers": [COUNT],
        "settings": {SETTING: OBJECT},
        "tasks": {TEXT: {"rows": COUNT}},
        "dtype": TEXT,
        "timed?": TIMED,
    },
    "made_by": {"machine": TEXT, "date": TEXT, "command": TEXT, "versions": {"torch": TEXT}},
    "exits": {EXIT: {"parameters": COUNT, "flops": COUNT, "kv_bytes": COUNT}},
    "tasks": {TEXT: TASK},
    "harness": {TEXT: {TEXT: {EXIT: {TEXT: NUMBER}}}},
    "speed?": {SETTING: {"median": SPEED, "best": SPEED}},
    "certificates?": [CERTIFICATE],
    "peers?": {TEXT: OBJECT},  # records themselves
}


def load_evaluation(path: str | Path) -> dict[str, Any]:
    """
    Read an evaluation: a JSON file, or a folder with an `evaluation.json`.

    Raises:
        ValueError: If there is no such file, if it is no JSON, if it is of another schema than this version reads, or
            if a field is missing or holds what no evaluation writes; the message names the file and the field.
    """
    file = Path(path, FILE_NAME) if Path(path).is_dir() else Path(path)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"The evaluation {str(file)!r} could not be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The evaluation {str(file)!r} is no JSON: {error}.") from error
    found = record.get("schema_version") if isinstance(record, dict) else None
    if found != SCHEMA_VERSION:
        raise ValueError(f"{str(file)!r} has schema version {shown(found)}, this version reads {SCHEMA_VERSION}.")
    check_record(record, f"{str(file)!r}: ")
    return record


def check_record(record: dict[str, Any], source: str = "") -> None:
    """Check what is read of an evaluation, so that nothing else has to; an error names `source` and the field."""
    _check(record, RECORD, "", source)
    # What the fields say of each other
    full = str(check_exit_layers(record["request"]["exit_layers"], None, f"{source}request.exit_layers")[-1])
    _check(record["exits"], {full: OBJECT}, "exits", source)
    read = {k: {"reliability": OBJECT} if k != full else OBJECT for k in record["exits"]}
    for task, results in record["tasks"].items():
        scores = dict.fromkeys(results["settings"], {results["metric"]: SHARE})
        _check(results, {"settings": scores, "exits": read}, f"tasks.{task}", source)
    if "speed" in record:
        measured = [*record["request"]["settings"], *(f"exit {k}" for k in record["exits"])]
        _check(record, {"speed": dict.fromkeys(measured, OBJECT), "request": {"timed": TIMED}}, "", source)
        if not record["tasks"] or record["request"]["timed"]["prompts"] == 0:
            raise ValueError(f"{source}`speed` was measured, but `tasks` or `request.timed.prompts` is empty.")
    for name, peer in record.get("peers", {}).items():
        check_record(peer, f"{source}peers.{name}.")


def _check(value: Any, shape: Any, name: str, source: str) -> None:
    """Check a value against a [`Value`], a list of one of these, or a table of fields."""
    kind = shape if isinstance(shape, Value) else LIST if isinstance(shape, list) else OBJECT
    if not kind.holds(value):
        raise ValueError(f"{source}`{name}` must be {kind.what}, got {shown(value)}.")
    if isinstance(shape, list):
        for number, entry in enumerate(value):
            _check(entry, shape[0], f"{name}[{number}]", source)
    elif isinstance(shape, dict):
        for key, of_field in shape.items():
            if isinstance(key, Value):
                for found, entry in value.items():
                    _check(found, key, f"{name}: its key", source)
                    _check(entry, of_field, f"{name}.{found}", source)
                continue
            field = key.removesuffix("?")
            inner = f"{name}.{field}" if name else field
            if field in value:
                _check(value[field], of_field, inner, source)
            elif field == key:
                raise ValueError(f"{source}`{inner}` is missing.")


# What is read


def full_depth(record: dict[str, Any]) -> Setting:
    """What an evaluation compares the other settings with."""
    return Setting("exit", record["request"]["exit_layers"][-1])


class Measured(NamedTuple):
    """What was measured of a setting, or of another model at its full depth."""

    name: str
    setting: Setting | None  # none of another model
    scores: dict[str, float | None]  # by task, the metric that the page shows
    speed: dict[str, float] | None
    speed_up: float | None  # over our full depth


def measured(record: dict[str, Any], names: Iterable[str]) -> Iterator[Measured]:
    """What was measured of the settings of these names, then of the other models."""
    ours = str(full_depth(record))
    ways = [(name, Setting.read(name), record) for name in names]
    peers = [(name, None, peer) for name, peer in record.get("peers", {}).items()]
    for name, setting, source in [*ways, *peers]:
        full = str(full_depth(source))
        speed = source.get("speed", {}).get(name if setting else full) if "speed" in record else None
        scored = full if setting is None or setting.mode.lossless else name
        scores = {
            task: source["tasks"][task]["settings"].get(scored, {}).get(results["metric"])
            for task, results in record["tasks"].items()
        }
        speed_up = speed["median"] / record["speed"][ours]["median"] if speed else None
        yield Measured(name, setting, scores, speed, speed_up)


class Score(NamedTuple):
    """What an exit scored, and how a page shows it."""

    task: str
    exit_layer: int
    metric: str
    value: float
    shown: str


def exit_scores(record: dict[str, Any]) -> Iterator[Score]:
    """The scores of the exits, without standard errors."""
    for task, results in record["tasks"].items():
        for name, scores in results["settings"].items():
            setting = Setting.read(name)
            if setting.kind == "exit":
                for metric, value in scores.items():
                    yield Score(task, int(setting.value), metric, value, f"{100 * value:.1f} %")
    for task, by_exit in harness_scores(record).items():
        for k, metrics in by_exit.items():
            for metric, value in metrics.items():
                yield Score(task, int(k), metric.split(",")[0], value, f"{value:.4g}")


def harness_scores(record: dict[str, Any]) -> dict[str, dict[str, dict]]:
    """
    Of each task of the harness that was asked for, or of the members of a group that has none, the metrics by exit,
    without standard errors.
    """
    found: dict[str, dict] = {}
    for asked, results in record["harness"].items():
        scored = {}
        for name, by_exit in results.items():
            scores = {k: {m: v for m, v in metrics.items() if "stderr" not in m} for k, metrics in by_exit.items()}
            if any(scores.values()):
                scored[name] = scores
        found.update({asked: scored[asked]} if asked in scored else scored)
    return found


# What is written


def check_output(output: str | Path) -> Path:
    """The file to write to, if it can be one."""
    output = Path(output)
    if not output.parent.is_dir() or output.is_dir():
        raise ValueError(f"`output` must be a file in a folder that exists, got {str(output)!r}.")
    return output


def output_of(path: str, output: str | Path | None) -> Path:
    """The file to write; by default it is in the folder of the checkpoint."""
    if output is None and not Path(path).is_dir():
        raise ValueError(f"`path={path!r}` is no folder here that could take the results: pass `output`.")
    return check_output(Path(path) / FILE_NAME if output is None else output)


def open_record(output: Path, request: dict, overwrite: bool, device: torch.device) -> dict[str, Any]:
    """
    The record to go on with, or a new one, which takes over the certificates that are there; `ValueError` if the file
    holds the results of another request.
    """
    request = json.loads(json.dumps(request))
    if output.exists() and not overwrite:
        record = load_evaluation(output)
        if record["request"] == request:
            return record
        if record["tasks"] or record["harness"]:  # else it was made for a certificate alone
            different = [name for name, value in request.items() if record["request"].get(name) != value]
            held = f"`output={str(output)!r}` holds results of another {', '.join(different)}"
            raise ValueError(f"{held}: pass another file, or `overwrite` to replace them.")
    record = {"schema_version": SCHEMA_VERSION, "request": request, "made_by": provenance(device)}
    with suppress(ValueError):  # what is overwritten may be broken, or not there
        record["certificates"] = load_evaluation(output).get("certificates", [])
    return {**record, "tasks": {}, "harness": {}}


def provenance(device: torch.device) -> dict[str, Any]:
    """What made a result: command, date, versions and machine."""
    program = Path(sys.argv[0]).name
    start = ["sorted-llama"] if program in ("sorted-llama", "__main__.py") else ["python", program]
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "command": shlex.join([*start, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_revision": _git_revision(),
        "versions": versions,
        "machine": machine_name(device),
    }


def write_record(output: Path, record: dict[str, Any]) -> None:
    """Write a record, if it is one: a model that overflows says what is no number."""
    check_record(record)
    write_json(output, record)


def write_json(path: Path, content: dict) -> None:
    """Write JSON so that an interruption leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)


# Where it comes from


def fingerprint(model: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """A digest of all values of every tensor, as `dtype` where they are floating-point numbers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.flatten().contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def machine_name(device: torch.device) -> str:
    """What a speed is measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return cpu if device.type == "cpu" else f"{device.type} of {platform.node()}"


def _git_revision() -> str | None:
    """Of the repository that this file is a file of; not of one whose environment it was installed into."""
    file = Path(__file__)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        for arguments in (["ls-files", "--error-unmatch", file.name], ["rev-parse", "HEAD"]):
            git = ["git", "-C", str(file.parent), *arguments]
            done = subprocess.run(git, check=True, capture_output=True, text=True, env=environment)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
