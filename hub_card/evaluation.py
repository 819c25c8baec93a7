"""The evaluation of a checkpoint: every exit, every mode, one JSON file that a stopped run goes on from."""

import hashlib
import json
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
from transformers import AutoTokenizer

from modeling_sorted_llama import SortedLlamaForCausalLM
from modeling_sorted_llama.configuration_sorted_llama import check_exit_layer, check_exit_layers

from .calibration import draft_gain, reliability, suggest_thresholds
from .cost import cost_of_exit
from .measure import answers, decoding_speeds, teacher_forced
from .tasks import Task, load_task


SCHEMA_VERSION = 1
FILE_NAME = "evaluation.json"  # in the checkpoint's folder
PACKAGES = ("sorted-llama", "torch", "transformers", "tokenizers", "datasets", "lm-eval")


def evaluate(
    path: str,
    data: Sequence[tuple[str, str]] = (),
    harness_tasks: Sequence[str] = (),
    exit_layers: Sequence[int] | None = None,
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
        exit_layers (`Sequence[int]`, *optional*):
            Exits, ending in full depth. Default to the checkpoint's.
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
        ValueError: If an argument is out of range, if a row of the data lacks a field, or if `output` holds the
            results of other settings or weights; before anything is evaluated.
    """
    if not data and not harness_tasks:
        raise ValueError("There is nothing to evaluate: pass `data` or `harness_tasks`.")
    numbers = {"num_timed": num_timed, "max_new_tokens": max_new_tokens, "runs": runs, "batch_size": batch_size}
    for name, value in {**numbers, "limit": 1 if limit is None else limit}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    output = Path(output) if output is not None else Path(path) / FILE_NAME
    if not output.parent.is_dir():
        raise ValueError(f"`output` must be a file in a folder that exists, got {str(output)!r}.")
    model, tokenizer = load_model(path, dtype, device)
    depth = model.config.num_hidden_layers
    exits = check_exit_layers(exit_layers or model.config.exit_layers or [depth], depth)
    if exits != model.config.exit_layers and model.config.exit_heads != "shared":
        raise ValueError(
            f"`exit_layers` must be those that the checkpoint has weights for, {model.config.exit_layers}, got "
            f"{exits}."
        )
    model.config.exit_layers = exits  # where thresholds leave
    drafts = exits[:-1] if drafts is None else [check_exit_layer(k, depth - 1, "drafts") for k in drafts]
    tasks = [load_task(kind, source, tokenizer, limit, chat) for kind, source in data]
    sources: dict[str, str] = {}
    for task in tasks:
        if task.name in sources:
            raise ValueError(
                f"`data` has two tasks named {task.name!r}, {sources[task.name]!r} and {task.source!r}: a file is "
                "called by its name without the folder, rename one."
            )
        sources[task.name] = task.source
    if harness_tasks:
        from .harness import SortedLlamaLM, evaluate_harness, find_tasks

        manager = find_tasks(harness_tasks)

    timed = [row["prompt"] for row in tasks[0].rows[:num_timed]] if tasks else []
    longest = min(max_new_tokens, tasks[0].max_new_tokens) if tasks else 0
    settings: dict[str, dict] = {f"exit {k}": {"exit_layer": k} for k in exits}
    if len(exits) > 1:
        settings |= {f"threshold {t}": {"exit_threshold": t} for t in exit_thresholds}
    drafting = {f"draft {k}": {"assistant_early_exit": k} for k in drafts}
    request = {
        "path": path,
        "weights": _fingerprint(model),
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
            write_json(output, record)
        prompts = [row["prompt"] for row in task.rows]
        for name, decoding in settings.items():
            if name not in of_task["settings"]:
                bar = f"{task.name}, {name}"
                texts = answers(model, tokenizer, prompts, task.max_new_tokens, batch_size, bar, **decoding)
                of_task["settings"][name] = task.score(texts)
                write_json(output, record)
    if tasks and "speed" not in record:
        speeds = decoding_speeds(model, tokenizer, timed, settings | drafting, longest, runs, progress=True)
        record["speed"] = {name: asdict(speed) for name, speed in speeds.items()}
        record["made_by"]["machine"] = _machine(model.device)  # a run may go on elsewhere
        write_json(output, record)
    missing = [name for name in harness_tasks if name not in record["harness"]]
    if missing:
        lm = SortedLlamaLM(model, exit_layers=exits, tokenizer=tokenizer, batch_size=batch_size)
        for name in missing:
            record["harness"][name] = evaluate_harness(
                lm, exits, name, limit=limit, bootstrap_iters=0, task_manager=manager, apply_chat_template=chat
            )
            write_json(output, record)
    return record


def load_model(path: str, dtype: str, device: str | None = None) -> tuple[Any, Any]:
    """
    A model to evaluate and its tokenizer.

    Args:
        path (`str`):
            Model id or path.
        dtype (`str`):
            Type of the weights.
        device (`str`, *optional*):
            Defaults to a GPU where there is one.

    Returns:
        `tuple`: [`SortedLlamaForCausalLM`] and [`~transformers.PreTrainedTokenizerBase`].
    """
    model: Any = SortedLlamaForCausalLM.from_pretrained(path, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


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


def load_evaluation(path: str | Path) -> dict[str, Any]:
    """
    Read an evaluation.

    Args:
        path (`str` or `Path`):
            JSON file, or a folder with an `evaluation.json`.

    Returns:
        `dict`

    Raises:
        ValueError: If the file is of a later schema than this version reads.
    """
    path = Path(path)
    record = json.loads((path / FILE_NAME if path.is_dir() else path).read_text(encoding="utf-8"))
    if record.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{str(path)!r} has schema version {record.get('schema_version')!r}, this version reads {SCHEMA_VERSION}."
        )
    return record


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


def _command() -> str:
    program = Path(sys.argv[0]).name
    return shlex.join(["python", *(["-m", "hub_card"] if program == "__main__.py" else [program]), *sys.argv[1:]])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _fingerprint(model) -> str:
    """Of some of every tensor's values: another training has another one."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        some = tensor.flatten()[:: max(tensor.numel() // 64, 1)]
        digest.update(f"{name} {tuple(tensor.shape)} {some.float().tolist()}".encode())
    return digest.hexdigest()


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return cpu if device.type == "cpu" else f"{device.type} of {platform.node()}"
