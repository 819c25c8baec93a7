"""
A certificate: the cheapest depth that, for prompts like those of a file, is as good as full depth, with a guarantee.
The statistics are those of `risk`; the unit is the prompt, and its answer is generated freely.
"""

import copy
import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sorted_llama.modeling_sorted_llama import SortedLlamaConfig
from sorted_llama.modeling_sorted_llama.configuration_sorted_llama import (
    check_choice,
    check_int,
    check_number,
)
from sorted_llama.modeling_sorted_llama.modes_sorted_llama import (
    ConfidenceExit,
    choose_decoding,
    read_decoding_fields,
)

from .answering import BATCH_SIZE, conditions, decoding_options, kept_answers
from .certificate import DIFFERS, find_faults
from .checkpoint import check_device, load_answering_tokenizer, load_config, load_model
from .cost import cost_of_exit, weights_read
from .judge import Replies
from .measure import Answer, decoding_speeds
from .record import full_depth, load_evaluation, open_record, output_of, provenance, write_record
from .risk import choose_sequence, fixed_sequence, least_prompts
from .settings import Setting
from .tasks import Task, load_task


ZERO_ONE = (DIFFERS, "exact_match", "final_answer")  # losses that are 0 or 1; others lie between
THRESHOLDS = (0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5)  # that are tried, from the safest
CLOSED = 2  # a threshold that no token reaches
TIMED_TOKENS = 64  # of an answer, at most
IDENTITY = ("data", "loss", "risk", "delta", "dtype", "device")  # a certificate takes the place of one with the same


def certify(
    path: str,
    data: tuple[str, str],
    risk: float = 0.05,
    delta: float = 0.05,
    loss: str = DIFFERS,
    thresholds: Sequence[float | Sequence[float]] | None = None,
    seed: int = 0,
    limit: int | None = None,
    num_timed: int = 8,
    dtype: str | None = None,
    device: str | None = None,
    chat: bool = False,
    output: str | Path | None = None,
    apply: bool = False,
) -> dict[str, Any]:
    """
    Find the cheapest depth whose risk is at most `risk` with certainty `1 - delta`, for prompts like those of `data`:
    Learn then Test with a fixed sequence (arXiv 2110.01052). One half of the prompts, drawn at random, chooses which
    settings are tested and in which order; the other half tests them, until one is not significant. Returns the
    certificate, which also goes into `evaluation.json`. Answers are kept beside that file as they are made: a stopped
    run goes on, and another risk takes few new ones.

    Args:
        path, limit, device, chat, output: See [`evaluate`].
        data (`tuple[str, str]`):
            Kind (see [`load_task`]) and file or dataset. Its prompts must be drawn like those to come, each by itself:
            ten wordings of one question count as one.
        risk (`float`, *optional*, defaults to 0.05): Expected loss of a prompt, at most.
        delta (`float`, *optional*, defaults to 0.05): Probability, at most, that the certificate is wrong.
        loss (`str`, *optional*, defaults to `"differs"`):
            `"differs"`: 1 where the text of the greedy answer is not full depth's. Or a score of the kind, as
            `"exact_match"`: how far it falls below that of full depth's answer to the same prompt.
        thresholds (`Sequence`, *optional*):
            Values of `exit_threshold` to try, each a number or a list with one for each exit below full depth.
            Defaults to some for all exits, and for each exit alone. The exits themselves are always tried.
        seed (`int`, *optional*, defaults to 0): Of the halves. Who tries several and keeps the best has no guarantee.
        num_timed (`int`, *optional*, defaults to 8): Prompts of the first half, to time the setting and full depth.
        dtype (`str`, *optional*): Type of the weights. Defaults to the checkpoint's own, in which it loads by itself.
        apply (`bool`, *optional*, defaults to `False`):
            Whether to write the certified setting into the checkpoint's `generation_config.json`, in place of one that
            is there; where none is certified, it decodes at full depth.

    Raises:
        ValueError: If an argument is out of range, if a file cannot be read, or if there are too few prompts for any
            setting, all that before the weights are loaded; or if the checkpoint's generation config is no greedy
            decoding that may leave early, before anything is generated.
    """
    for name, value in {"risk": risk, "delta": delta}.items():
        check_number(value, name, 0, 0.5, exclusive=True)
    check_int(num_timed, "num_timed", 1)
    check_int(seed, "seed", 0)
    check_device(device)
    config = load_config(path)
    tried = settings_to_try(config, thresholds)
    if apply and not Path(path).is_dir():
        raise ValueError(f"`apply` writes into the folder of a checkpoint, and `path={path!r}` is none here.")
    output = output_of(path, output)
    _check_depth(output, config)
    kept = Replies(output.with_suffix(".answers.jsonl"))
    tokenizer = load_answering_tokenizer(path)
    task = load_task(*data, tokenizer, limit, chat)
    check_choice(loss, "loss", [DIFFERS, *task.metrics])
    halves = _halves(task, risk, delta, seed)
    model = load_model(path, dtype or "auto", device, exit_layers=config.exit_layers)

    _check_decoding(model, tried, apply)

    made_by = conditions(model, tokenizer, model.dtype)
    run = Run(model, tokenizer, made_by, Setting("exit", config.num_hidden_layers), loss, kept)
    certificate = {
        "data": {"name": task.name, "kind": task.kind, "rows": len(task.rows), "sha256": task.digest, "chat": chat},
        "loss": loss,
        "risk": risk,
        "delta": delta,
        "seed": seed,
        **find_setting(run, *halves, tried, risk, delta),
        **made_by,
        "device": model.device.type,
        "decoding": {**decoding_options(model, task.max_new_tokens), "batch_size": BATCH_SIZE},
        "made_by": provenance(model.device),
    }
    if "setting" in certificate:
        certificate["speed_up"] = _speed_up(run, halves[0], Setting.read(certificate["setting"]), num_timed)
    _write(output, certificate, path, model)
    if apply:
        _apply(certificate, model.generation_config, path)
    return certificate


@dataclass(frozen=True)
class Run:
    """What answers, and what counts as a loss."""

    model: Any
    tokenizer: Any
    made_by: dict[str, str]
    full: Setting
    loss: str
    kept: Replies

    def answers(self, task: Task, setting: Setting) -> list[Answer]:
        prompts = [row["prompt"] for row in task.rows]
        kept = self.kept, self.made_by
        return kept_answers(self.model, self.tokenizer, prompts, task.max_new_tokens, *kept, setting.arguments)

    def losses(self, task: Task, setting: Setting) -> np.ndarray:
        """Of each row, from 0 to 1."""
        texts, full = ([answer.text for answer in self.answers(task, way)] for way in (setting, self.full))
        if self.loss == DIFFERS:
            return np.array([text != other for text, other in zip(texts, full, strict=True)], dtype=float)
        scores, highest = (np.array([score[self.loss] for score in task.scores(of)]) for of in (texts, full))
        return (highest - scores).clip(0, 1)

    def weights_read(self, task: Task, setting: Setting) -> float:
        """By a token of the answers, on average."""
        if setting.kind == "exit":
            return float(weights_read(self.model, [setting.value])[setting.value])
        read = weights_read(self.model, ConfidenceExit(self.model, **setting.arguments).depths)
        return float(np.mean([read[k] for answer in self.answers(task, setting) for k in answer.exits]))


# Before the weights are loaded


def settings_to_try(
    config: SortedLlamaConfig, thresholds: Sequence[float | Sequence[float]] | None = None
) -> list[list[Setting]]:
    """The settings to look at: in each list from the safest."""
    below = (config.exit_layers or [])[:-1]
    if not below:
        found = f"`exit_layers={config.exit_layers}`"
        raise ValueError(f"`path` must be a checkpoint that was trained with exits below full depth, got {found}.")
    if config.exit_layer is not None:
        own = f"`exit_layer={config.exit_layer}`"
        raise ValueError(f"`path` needs a config.json without a depth of its own, which bounds all others, got {own}.")
    exits = [Setting("exit", k) for k in reversed(below)]
    if thresholds is not None:
        return [exits, *([Setting("threshold", _check_threshold(threshold, below))] for threshold in thresholds)]
    of_all = [Setting("threshold", threshold) for threshold in THRESHOLDS]
    alone = [[Setting("threshold", _alone(t, k, below)) for t in THRESHOLDS] for k in below] if len(below) > 1 else []
    return [exits, of_all, *alone]


def _alone(threshold: float, exit_layer: int, below: list[int]) -> list[float]:
    """The threshold of one exit, all others closed: their heads are then never read."""
    return [threshold if k == exit_layer else CLOSED for k in below]


def _check_threshold(threshold: Any, below: list[int]) -> float | list[float]:
    if not isinstance(threshold, Sequence):
        return check_number(threshold, "thresholds", 0)
    # What names one setting is one name: 2.0 and 2, and all that no confidence reaches
    checked = [check_number(value, "thresholds", 0) for value in threshold]
    values = [CLOSED if v > 1 else int(v) if v == int(v) else v for v in checked]
    if len(values) != len(below):
        raise ValueError(f"`thresholds` must hold numbers, or lists of one for each of exits {below}, got {values}.")
    return values


def _check_depth(output: Path, config: SortedLlamaConfig) -> None:
    """Whether the evaluation that is there, if any, may be one of this model."""
    if output.exists() and (depth := full_depth(load_evaluation(output)).value) != config.num_hidden_layers:
        raise ValueError(
            f"`output={str(output)!r}` is the evaluation of a model of {depth} layers, `path` has "
            f"{config.num_hidden_layers}: pass another file."
        )


def _halves(task: Task, risk: float, delta: float, seed: int) -> tuple[Task, Task]:
    """The rows that choose what is tested, and those that test it."""
    needed, given = least_prompts(risk, delta), len(task.rows)
    if given - given // 2 < needed:
        raise ValueError(
            f"`risk={risk:g}` with `delta={delta:g}` takes {needed} prompts to test, even if none of them fails, and "
            f"one less to choose what is tested: `data` needs {2 * needed - 1} rows, got {given}."
        )
    if repeated := given - len({row["prompt"] for row in task.rows}):
        warnings.warn(
            f"{repeated} of {given} prompts of `data` repeat others: where prompts to come do not repeat so often, "
            "they count as more evidence than they are.",
            stacklevel=3,
        )
    rows = random.Random(seed).sample(task.rows, given)
    return replace(task, rows=rows[: given // 2]), replace(task, rows=rows[given // 2 :])


# With the model


def _check_decoding(model: Any, tried: list[list[Setting]], apply: bool) -> None:
    """A `ValueError`, before an answer is made, where the checkpoint's generation config makes one impossible."""
    config = copy.deepcopy(model.generation_config)
    if apply:
        config.validate(strict=True)  # as it is saved
    config.do_sample = False
    for setting in (family[0] for family in tried):
        if setting.kind != "exit":
            choose_decoding(model, config, read_decoding_fields(model, config, setting.arguments))


def find_setting(
    run: Run, first: Task, second: Task, tried: list[list[Setting]], risk: float, delta: float
) -> dict[str, Any]:
    """What the first half has seen, what the second has tested, and the setting that is certified, if any."""
    looked_at: dict[str, dict[str, float]] = {}
    for family in tried:
        for setting in family:
            seen = {"mean_loss": float(run.losses(first, setting).mean())}
            looked_at[str(setting)] = {**seen, "weights_read": run.weights_read(first, setting)}
            if seen["mean_loss"] > risk:
                break  # those behind it will hardly risk less
    risks, costs = ({name: seen[what] for name, seen in looked_at.items()} for what in ("mean_loss", "weights_read"))
    order = choose_sequence(risks, costs, risk, run.weights_read(first, run.full))

    def losses_of(name: str) -> np.ndarray:
        return run.losses(second, Setting.read(name))

    tested = fixed_sequence(order, losses_of, risk, delta, run.loss in ZERO_ONE)
    certified = [test.setting for test in tested if test.p_value <= delta]
    found = {
        "looked_at_on": len(first.rows),
        "looked_at": looked_at,
        "tested_on": len(second.rows),
        "tested": [test._asdict() for test in tested],
    }
    return {**found, "setting": certified[-1]} if certified else found


def _speed_up(run: Run, first: Task, setting: Setting, num_timed: int) -> float:
    """Over full depth, one row at a time."""
    prompts = [row["prompt"] for row in first.rows[:num_timed]]
    ways = {str(way): way.arguments for way in (run.full, setting)}
    length = min(first.max_new_tokens, TIMED_TOKENS)
    full, ours = decoding_speeds(run.model, run.tokenizer, prompts, ways, length, progress=True).values()
    return ours.median / full.median


def _write(output: Path, certificate: dict[str, Any], path: str, model: Any) -> None:
    """Into the evaluation that is there, or one that holds nothing else."""
    if output.exists():
        record = load_evaluation(output)
    else:
        exits, dtype = model.config.exit_layers, certificate["dtype"]
        request = {"path": path, "weights": certificate["weights"], "exit_layers": exits, "dtype": dtype}
        request |= {"settings": {}, "tasks": {}, "harness_tasks": []}
        record = open_record(output, request, False, model.device)
        record["exits"] = {str(k): asdict(cost_of_exit(model, k)) for k in exits}
    others = [other for other in record.get("certificates", []) if any(other[k] != certificate[k] for k in IDENTITY)]
    write_record(output, {**record, "certificates": [*others, certificate]})


def _apply(certificate: dict[str, Any], generation_config: Any, path: str) -> None:
    """Have the checkpoint decode so by itself; at full depth where nothing is certified."""
    if "setting" in certificate:  # else the file loses what was applied before, which a loaded model has not
        setting = Setting.read(certificate["setting"])
        setattr(generation_config, setting.mode.argument, setting.value)
        if certificate["speed_up"] < 1:
            slower = f"`{setting.call}` reads fewer weights, but ran at {certificate['speed_up']:.2f}x its speed here"
            warnings.warn(f"What is applied is slower than full depth: {slower}.", stacklevel=3)
    generation_config.save_pretrained(path)
    find_faults([certificate], path)  # it may load in another precision
    if generation_config.do_sample:
        warnings.warn("The checkpoint samples by itself (`do_sample`), which no certificate is about.", stacklevel=2)
