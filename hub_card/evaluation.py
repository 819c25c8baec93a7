"""The evaluation of a checkpoint: every exit, every mode, one JSON file that a stopped run goes on from."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sorted_llama.modeling_sorted_llama import SortedLlamaConfig
from sorted_llama.modeling_sorted_llama.configuration_sorted_llama import check_exit_layers, check_int, check_number
from sorted_llama.trainer.escaping import one_line

from .calibration import calibration_error, suggest_thresholds
from .checkpoint import check_device, load_answering_tokenizer, load_config, load_model
from .cost import cost_of_exit
from .measure import answers, decoding_speeds, teacher_forced
from .record import fingerprint, load_evaluation, machine_name, open_record, output_of, write_record
from .settings import Setting
from .tasks import Task, load_task


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
    Evaluate a checkpoint; returns the content of the file that it writes. What is done is written at once: the same
    call goes on where a stopped one was.

    Args:
        path (`str`): Model id or path.
        data (`Sequence[tuple[str, str]]`, *optional*): Kind (see [`load_task`]) and file or dataset of each task.
        harness_tasks (`Sequence[str]`, *optional*): Tasks of lm-evaluation-harness.
        exit_layers (`Sequence[int]` or `str`, *optional*): Up to full depth, or `"every:N"`. Default to its own.
        exit_thresholds (`Sequence[float]`, *optional*, defaults to `(0.5, 0.8, 0.9, 0.97)`): Of confidence.
        drafts (`Sequence[int]`, *optional*): Exits to let draft, for the speed. Default to all below full depth.
        limit (`int`, *optional*): Rows a task. Defaults to all.
        num_timed (`int`, *optional*, defaults to 4): Prompts of the first task to time.
        max_new_tokens (`int`, *optional*, defaults to 64): Length of their timed answers, at most.
        runs (`int`, *optional*, defaults to 5): Times to repeat it.
        batch_size (`int`, *optional*, defaults to 32): Rows a call, where no time is taken.
        dtype (`str`, *optional*, defaults to `"bfloat16"`): Type of the weights.
        device (`str`, *optional*): Defaults to a GPU where there is one.
        chat (`bool`, *optional*, defaults to `False`): Whether questions are asked through the chat template.
        output (`str` or `Path`, *optional*): JSON file. Defaults to `evaluation.json` in the checkpoint's folder.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace a file of other settings.

    Raises:
        ValueError: If an argument is out of range, if a file, a row or a task cannot be read, all that before the
            weights are loaded; if these are broken, or `output` holds the results of other settings or weights; or if
            the model gives what is no number.
    """
    if not data and not harness_tasks:
        raise ValueError("There is nothing to evaluate: pass `data` or `harness_tasks` (`--data`, `--tasks`).")
    counts = {"num_timed": num_timed, "max_new_tokens": max_new_tokens, "runs": runs, "batch_size": batch_size}
    for name, value in {**counts, "limit": 1 if limit is None else limit}.items():
        check_int(value, name, 1)
    for threshold in exit_thresholds:
        check_number(threshold, "exit_thresholds", 0)
    check_device(device)
    exits, settings = _settings(load_config(path), exit_layers, exit_thresholds, drafts)
    output = output_of(path, output)
    if output.exists() and not overwrite:  # what is broken is told before the weights are loaded
        load_evaluation(output)
    tokenizer = load_answering_tokenizer(path)
    tasks = _load_tasks(data, tokenizer, limit, chat)
    task_manager = None
    if harness_tasks:
        from .harness import find_tasks

        task_manager = find_tasks(harness_tasks)
    model = load_model(path, dtype, device, exit_layers=exits)

    request = {
        "path": path,
        "weights": fingerprint(model),
        "exit_layers": exits,
        "settings": {str(setting): setting.arguments for setting in settings},
        "tasks": {task.name: _identity(task) for task in tasks},
        "harness_tasks": list(harness_tasks),
        "limit": limit,
        "timed": _timed(tasks, tokenizer, num_timed, max_new_tokens, runs),
        "dtype": dtype,
        "device": model.device.type,
        "chat": chat,
    }
    record = open_record(output, request, overwrite, model.device)
    record["exits"] = {str(k): asdict(cost_of_exit(model, k)) for k in exits}
    run = _Run(model, tokenizer, tasks, task_manager, batch_size)
    for step in STEPS:
        for _ in step(run, record["request"], record):
            write_record(output, record)
    return record


@dataclass(frozen=True)
class _Run:
    """What the steps of an evaluation work with; what is asked for is the record's `request`."""

    model: Any
    tokenizer: Any
    tasks: list[Task]
    task_manager: Any  # of lm-evaluation-harness
    batch_size: int


# The steps. Each adds what the record lacks, and yields where that is to be written


def _score_tasks(run: _Run, request: dict[str, Any], record: dict[str, Any]) -> Iterator[None]:
    """What the exits make of the right answers of each task, and how the answers of each setting score."""
    for task in run.tasks:
        results = record["tasks"].setdefault(task.name, {"metric": task.metrics[0], "settings": {}})
        if "exits" not in results:
            results.update(_read_exits(run, task, request["exit_layers"]))
            yield
        prompts = [row["prompt"] for row in task.rows]
        for name in request["settings"]:
            setting = Setting.read(name)
            if not setting.mode.lossless and name not in results["settings"]:
                bar = one_line(f"{task.name}, {name}")
                length, batch_size = task.max_new_tokens, run.batch_size
                texts = answers(run.model, run.tokenizer, prompts, length, batch_size, bar, **setting.arguments)
                results["settings"][name] = task.score(texts)
                yield


def _read_exits(run: _Run, task: Task, exits: list[int]) -> dict[str, Any]:
    """Loss, agreement and reliability, and suggested thresholds, from one pass over the right answers."""
    read = teacher_forced(run.model, run.tokenizer, task.rows, exits, run.batch_size, progress=True)
    found: dict[str, dict] = {}
    for i, k in enumerate(exits):
        found[str(k)] = {"loss": read.losses[i].mean().item(), "agreement": read.agrees[i].float().mean().item()}
        if k != exits[-1]:
            error = calibration_error(read.confidences[i], read.agrees[i])
            found[str(k)]["reliability"] = {"expected_calibration_error": error}
    return {"exits": found, "suggested_thresholds": [asdict(s) for s in suggest_thresholds(read, exits)]}


def _time_decoding(run: _Run, request: dict[str, Any], record: dict[str, Any]) -> Iterator[None]:
    """Tokens per second of every setting."""
    if run.tasks and "speed" not in record:
        timed, ways = request["timed"], request["settings"]
        prompts = [row["prompt"] for row in run.tasks[0].rows[: timed["prompts"]]]
        length, runs = timed["max_new_tokens"], timed["runs"]
        speeds = decoding_speeds(run.model, run.tokenizer, prompts, ways, length, runs, progress=True)
        record["speed"] = {name: asdict(speed) for name, speed in speeds.items()}
        record["made_by"]["machine"] = machine_name(run.model.device)  # a run may go on elsewhere
        yield


def _run_harness(run: _Run, request: dict[str, Any], record: dict[str, Any]) -> Iterator[None]:
    """What lm-evaluation-harness finds at every exit."""
    missing = [name for name in request["harness_tasks"] if name not in record["harness"]]
    if missing:
        from .harness import SortedLlamaLM, evaluate_harness

        exits = request["exit_layers"]
        lm = SortedLlamaLM(run.model, exit_layers=exits, tokenizer=run.tokenizer, batch_size=run.batch_size)
        options = {"limit": request["limit"], "apply_chat_template": request["chat"], "bootstrap_iters": 0}
        for name in missing:
            record["harness"][name] = evaluate_harness(lm, exits, name, task_manager=run.task_manager, **options)
            yield


STEPS = (_score_tasks, _time_decoding, _run_harness)


# What is asked for


def _settings(
    config: SortedLlamaConfig, exit_layers: Any, thresholds: Sequence[float], drafts: Sequence[int] | None
) -> tuple[list[int], list[Setting]]:
    """The exits to evaluate, and the settings."""
    depth = config.num_hidden_layers
    exits = check_exit_layers(config.exit_layers or [depth] if exit_layers is None else exit_layers, depth)
    if exits != config.exit_layers and config.exit_heads != "shared":
        has = config.exit_layers
        raise ValueError(f"`exit_layers` must be those that the checkpoint has weights for, {has}, got {exits}.")
    if drafts and depth == 1:
        raise ValueError(f"`drafts` are exits below full depth, of which a model of one layer has none, got {drafts}.")
    drafting = exits[:-1] if drafts is None else [check_int(k, "drafts", 1, depth - 1) for k in drafts]
    values = {"exit": exits, "threshold": thresholds if len(exits) > 1 else [], "draft": drafting}
    return exits, [Setting(kind, value) for kind, of_kind in values.items() for value in of_kind]


def _identity(task: Task) -> dict[str, Any]:
    return {"kind": task.kind, "source": task.source, "rows": len(task.rows), "sha256": task.digest}


def _timed(tasks: list[Task], tokenizer: Any, num_timed: int, max_new_tokens: int, runs: int) -> dict[str, int]:
    """The prompts to time, of the first task, and how."""
    prompts = [row["prompt"] for row in tasks[0].rows[:num_timed]] if tasks else []
    return {
        "prompts": len(prompts),
        "prompt_tokens": sum(len(tokenizer(prompt)["input_ids"]) for prompt in prompts),
        "max_new_tokens": min(max_new_tokens, tasks[0].max_new_tokens) if tasks else 0,
        "runs": runs,
        "batch_size": 1,
    }


def _load_tasks(data: Sequence[tuple[str, str]], tokenizer: Any, limit: int | None, chat: bool) -> list[Task]:
    tasks = [load_task(kind, source, tokenizer, limit, chat) for kind, source in data]
    for task in tasks:
        sources = [other.source for other in tasks if other.name == task.name]
        if len(sources) > 1:  # a file is called by its name without the folder
            raise ValueError(f"`data` has two tasks named {task.name!r}, {' and '.join(sources)}: rename a file.")
    return tasks
