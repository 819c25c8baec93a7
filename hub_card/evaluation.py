"""The evaluation of a checkpoint: every exit, every mode, one JSON file that a stopped run goes on from."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sorted_llama.modeling_sorted_llama import SortedLlamaConfig
from sorted_llama.modeling_sorted_llama.configuration_sorted_llama import (
    check_exit_layer,
    check_exit_layers,
    is_number,
)
from sorted_llama.trainer.escaping import one_line

from .calibration import draft_gain, reliability, suggest_thresholds
from .checkpoint import check_device, fingerprint, load_answering_tokenizer, load_config, load_model
from .cost import cost_of_exit
from .measure import answers, decoding_speeds, teacher_forced
from .record import FILE_NAME, SCHEMA_VERSION, check_record, load_evaluation, write_json
from .tasks import Task, load_task


PACKAGES = ("sorted-llama", "torch", "transformers", "tokenizers", "datasets", "lm-eval")


def evaluate(
    path: str,
    data: Sequence[tuple[str, str]] = (),
    harness_tasks: Sequence[str] = (),
    exit_layers: Sequence[int] | str | None = None,
    exit_thresholds: Sequence[float] = (0.5, 0.8, 0.9, 0.97),
    drafts: Sequence[int] | None = None,
    limit: int | None = None,
    num_timed: int = 4,
    max_new_tokens: int = 64,
    runs: int = 5,
    batch_size: int = 32,
    dtype: str = "bfloat16",
    device: str | None = None,
    chat: bool = False,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """
    Evaluate a checkpoint. What is done is written at once: the same call goes on where a stopped one was.

    Args:
        path (`str`):
            Model id or path.
        data (`Sequence[tuple[str, str]]`, *optional*):
            Kind (see [`load_task`]) and file or dataset of each task.
        harness_tasks (`Sequence[str]`, *optional*):
            Tasks of lm-evaluation-harness.
        exit_layers (`Sequence[int]` or `str`, *optional*):
            Exits, ending in full depth, or `"every:N"`. Default to the checkpoint's.
        exit_thresholds (`Sequence[float]`, *optional*, defaults to `(0.5, 0.8, 0.9, 0.97)`):
            Thresholds of confidence to evaluate.
        drafts (`Sequence[int]`, *optional*):
            Exits to let draft, for the speed. Default to all below full depth.
        limit (`int`, *optional*):
            Rows a task. Defaults to all.
        num_timed (`int`, *optional*, defaults to 4):
            Prompts of the first task to time.
        max_new_tokens (`int`, *optional*, defaults to 64):
            Length of their timed answers, at most.
        runs (`int`, *optional*, defaults to 5):
            Times to repeat it.
        batch_size (`int`, *optional*, defaults to 32):
            Rows a call, where no time is taken.
        dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Type of the weights.
        device (`str`, *optional*):
            Defaults to a GPU where there is one.
        chat (`bool`, *optional*, defaults to `False`):
            Whether questions are asked through the chat template.
        output (`str` or `Path`, *optional*):
            JSON file. Defaults to `evaluation.json` in the checkpoint's folder.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a file of other settings.

    Returns:
        `dict`: The content of the file.

    Raises:
        ValueError: If an argument is out of range, if a file, a row or a task cannot be read, all that before the
            weights are loaded; if these are broken, or `output` holds the results of other settings or weights; or if
            the model gives what is no number.
    """
    if not data and not harness_tasks:
        raise ValueError("There is nothing to evaluate: pass `data` or `harness_tasks`.")
    numbers = {"num_timed": num_timed, "max_new_tokens": max_new_tokens, "runs": runs, "batch_size": batch_size}
    for name, value in {**numbers, "limit": 1 if limit is None else limit}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    for threshold in exit_thresholds:
        if not is_number(threshold) or threshold < 0:
            raise ValueError(f"`exit_thresholds` must be finite numbers of at least 0, got {threshold!r}.")
    check_device(device)
    config = load_config(path)
    exits, drafts = _depths(config, exit_layers, drafts)
    if output is None and not Path(path).is_dir():
        raise ValueError(f"`path={path!r}` is no folder here that could take the results: pass `output`.")
    output = Path(output) if output is not None else Path(path) / FILE_NAME
    if not output.parent.is_dir() or output.is_dir():
        raise ValueError(f"`output` must be a file in a folder that exists, got {str(output)!r}.")
    if output.exists() and not overwrite:
        load_evaluation(output)  # what is broken there is told before the weights are loaded
    tokenizer = load_answering_tokenizer(path)
    tasks = _load_tasks(data, tokenizer, limit, chat)
    if harness_tasks:
        from .harness import SortedLlamaLM, evaluate_harness, find_tasks

        manager = find_tasks(harness_tasks)
    model = load_model(path, dtype, device)
    model.config.exit_layers = exits  # where thresholds leave

    timed = [row["prompt"] for row in tasks[0].rows[:num_timed]] if tasks else []
    longest = min(max_new_tokens, tasks[0].max_new_tokens) if tasks else 0
    settings: dict[str, dict] = {f"exit {k}": {"exit_layer": k} for k in exits}
    if len(exits) > 1:
        settings |= {f"threshold {t}": {"exit_threshold": t} for t in exit_thresholds}
    drafting = {f"draft {k}": {"assistant_early_exit": k} for k in drafts}
    request = {
        "path": path,
        "weights": fingerprint(model),
        "exit_layers": exits,
        "settings": settings | drafting,
        "tasks": {
            t.name: {"kind": t.kind, "source": t.source, "rows": len(t.rows), "sha256": t.digest} for t in tasks
        },
        "harness_tasks": list(harness_tasks),
        "limit": limit,
        "timed": {
            "prompts": len(timed),
            "prompt_tokens": sum(len(tokenizer(prompt)["input_ids"]) for prompt in timed),
            "max_new_tokens": longest,
            "runs": runs,
            "batch_size": 1,
        },
        "dtype": dtype,
        "device": model.device.type,
        "chat": chat,
    }
    record = _open(output, request, overwrite, _machine(model.device))
    record["exits"] = {str(k): asdict(cost_of_exit(model, k)) for k in exits}

    for task in tasks:
        of_task = record["tasks"].setdefault(task.name, {"kind": task.kind, "metric": task.metric, "settings": {}})
        if "exits" not in of_task:
            of_task.update(_read_exits(model, tokenizer, task, exits, batch_size))
            _write(output, record)
        prompts = [row["prompt"] for row in task.rows]
        for name, decoding in settings.items():
            if name not in of_task["settings"]:
                bar = one_line(f"{task.name}, {name}")
                texts = answers(model, tokenizer, prompts, task.max_new_tokens, batch_size, bar, **decoding)
                of_task["settings"][name] = task.score(texts)
                _write(output, record)
    if tasks and "speed" not in record:
        speeds = decoding_speeds(model, tokenizer, timed, settings | drafting, longest, runs, progress=True)
        record["speed"] = {name: asdict(speed) for name, speed in speeds.items()}
        record["made_by"]["machine"] = _machine(model.device)  # a run may go on elsewhere
        _write(output, record)
    missing = [name for name in harness_tasks if name not in record["harness"]]
    if missing:
        lm = SortedLlamaLM(model, exit_layers=exits, tokenizer=tokenizer, batch_size=batch_size)
        for name in missing:
            record["harness"][name] = evaluate_harness(
                lm, exits, name, limit=limit, bootstrap_iters=0, task_manager=manager, apply_chat_template=chat
            )
            _write(output, record)
    return record


def _depths(
    config: SortedLlamaConfig, exit_layers: Sequence[int] | str | None, drafts: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """The exits to evaluate, and those that draft."""
    depth = config.num_hidden_layers
    exits = check_exit_layers(config.exit_layers or [depth] if exit_layers is None else exit_layers, depth)
    if exits != config.exit_layers and config.exit_heads != "shared":
        raise ValueError(
            f"`exit_layers` must be those that the checkpoint has weights for, {config.exit_layers}, got {exits}."
        )
    if drafts and depth == 1:
        raise ValueError(f"`drafts` are exits below full depth, of which a model of one layer has none, got {drafts}.")
    return exits, exits[:-1] if drafts is None else [check_exit_layer(k, depth - 1, "drafts") for k in drafts]


def _load_tasks(data: Sequence[tuple[str, str]], tokenizer: Any, limit: int | None, chat: bool) -> list[Task]:
    tasks = [load_task(kind, source, tokenizer, limit, chat) for kind, source in data]
    sources: dict[str, str] = {}
    for task in tasks:
        if task.name in sources:
            raise ValueError(
                f"`data` has two tasks named {task.name!r}, {sources[task.name]!r} and {task.source!r}: a file is "
                "called by its name without the folder, rename one."
            )
        sources[task.name] = task.source
    return tasks


def _read_exits(model, tokenizer, task: Task, exits: list[int], batch_size: int) -> dict[str, Any]:
    """Of each exit loss, agreement, reliability and what drafting promises; suggested thresholds beside them."""
    read = teacher_forced(model, tokenizer, task.rows, exits, batch_size, progress=True)
    full = cost_of_exit(model, exits[-1]).weight_bytes
    head = sum(p.numel() * p.element_size() for p in model.exit_head(exits[-1]).parameters())
    found: dict[str, dict] = {}
    for i, k in enumerate(exits):
        agreement = read.agrees[i].float().mean().item()
        found[str(k)] = {"loss": read.losses[i].mean().item(), "agreement": agreement}
        if k != exits[-1]:
            layers = cost_of_exit(model, k).weight_bytes - head
            gain, drafts = draft_gain(agreement, layers / full, head / full)
            found[str(k)] |= {
                "reliability": asdict(reliability(read.confidences[i], read.agrees[i])),
                "expected_draft_speed_up": gain,
                "expected_drafts": drafts,
            }
    return {"exits": found, "suggested_thresholds": [asdict(s) for s in suggest_thresholds(read, exits)]}


def _open(output: Path, request: dict, overwrite: bool, machine: str) -> dict[str, Any]:
    """The record to go on with, or a new one."""
    request = json.loads(json.dumps(request))
    if output.exists() and not overwrite:
        record = load_evaluation(output)
        if record["request"] == request:
            return record
        different = [name for name, value in request.items() if record["request"].get(name) != value]
        raise ValueError(
            f"`output={str(output)!r}` holds results of another {', '.join(different)}: pass another file, or "
            "`overwrite` to replace them."
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "request": request,
        "made_by": {
            "command": _command(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "git_revision": _git_revision(),
            "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "machine": machine,
        },
        "tasks": {},
        "harness": {},
    }


def _write(output: Path, record: dict[str, Any]) -> None:
    check_record(record)  # a model that overflows says what is no number
    write_json(output, record)


def _command() -> str:
    program = Path(sys.argv[0]).name
    start = ["sorted-llama"] if program in ("sorted-llama", "__main__.py") else ["python", program]
    return shlex.join([*start, *sys.argv[1:]])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Of the repository that this file is a file of; not of one whose environment it was installed into."""
    folder = str(Path(__file__).parent)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", folder, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return cpu if device.type == "cpu" else f"{device.type} of {platform.node()}"
