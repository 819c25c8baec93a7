"""What is measured at the exits of a model: answers, losses and confidences from one pass, speed."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sorted_llama.modeling_sorted_llama import SortedLlamaForCausalLM


_LOGITS = 2**26  # entries of one float32 tile of logits


@dataclass
class TeacherForced:
    """What the exits, full depth last, predict of the right answers: tensors of shape `(num_exits, num_tokens)`."""

    losses: torch.Tensor  # negative log-probability of the right token, in nats
    confidences: torch.Tensor  # probability of the greedy token: what `exit_threshold` is compared with
    agrees: torch.Tensor  # whether the greedy token is full depth's


@torch.inference_mode()
def teacher_forced(
    model: SortedLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    exits: list[int],
    batch_size: int = 32,
    progress: bool = False,
) -> TeacherForced:
    """Read the right answers, `rows` of `prompt` and `completion` as text, at each of `exits` in one backbone pass."""
    rows = sorted(rows, key=lambda row: len(row["prompt"]) + len(row["completion"]))  # alike lengths: little padding
    found = []
    for start in tqdm(range(0, len(rows), batch_size), desc="reading answers", disable=not progress):
        batch = rows[start : start + batch_size]
        whole = [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in batch]
        starts = [len(tokenizer(row["prompt"])["input_ids"]) for row in batch]
        padded = tokenizer.pad({"input_ids": whole}, padding_side="right", return_tensors="pt").to(model.device)
        # The state before a token of the answer predicts it
        wanted = [(r, t - 1, ids[t]) for r, ids in enumerate(whole) for t in range(max(starts[r], 1), len(ids))]
        found.append(read_exits(model, exits, padded, wanted))
    log_probs, greedy, highest = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return TeacherForced(losses=-log_probs, confidences=highest.exp(), agrees=greedy == greedy[-1])


def read_exits(
    model: SortedLlamaForCausalLM,
    exits: list[int],
    inputs: Mapping[str, torch.Tensor],
    wanted: list[tuple[int, int, int]],
    dtype: torch.dtype | None = torch.float32,
) -> list[torch.Tensor]:
    """
    What each of `exits`, ascending, predicts of the `wanted` tokens, each a row of `inputs`, a place and the token, in
    one backbone pass, a tile of logits at a time: their log-probability, the greedy tokens, and theirs, of shape
    `(num_exits, num_tokens)`. `dtype` is the softmax's; `None` is that of the logits.
    """
    states = model.model(**inputs, exit_layer=exits[-1], exit_layers=exits, use_cache=False).exit_hidden_states
    rows, places, tokens = torch.tensor(wanted, device=model.device).reshape(-1, 3).unbind(1)
    size = max(1, _LOGITS // model.config.vocab_size)
    tiles = []
    for row, place, token in zip(rows.split(size), places.split(size), tokens.split(size), strict=True):
        read = []
        for k, of_exit in zip(exits, states, strict=True):
            normed = model.model.exit_norm(k)(of_exit[row, place])
            log_probs = model.exit_head(k)(normed).log_softmax(-1, dtype=dtype)
            highest, greedy = log_probs.max(-1)
            read.append((log_probs.gather(-1, token[:, None])[:, 0], greedy, highest))
        tiles.append([torch.stack(values).cpu() for values in zip(*read, strict=True)])
    return [torch.cat(parts, dim=1) for parts in zip(*tiles, strict=True)]


@dataclass
class Answer:
    """What a model answers to a prompt."""

    text: str  # without special tokens
    exits: list[int]  # that each token comes from; empty where all have the same depth


def answers(*arguments: Any, **options: Any) -> list[str]:
    """Greedy answers as text: see [`answers_with_exits`]."""
    return [answer.text for answer in answers_with_exits(*arguments, **options)]


@torch.inference_mode()
def answers_with_exits(
    model: SortedLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 12,
    batch_size: int = 64,
    progress: str | None = None,
    **decoding: Any,
) -> list[Answer]:
    """Greedy answers; `progress` names a bar, `decoding` is a mode such as `exit_layer=k`."""
    found = [Answer("", [])] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike lengths: little padding
    for start in tqdm(range(0, len(order), batch_size), desc=progress, disable=progress is None):
        batch = order[start : start + batch_size]
        inputs = tokenizer([prompts[i] for i in batch], return_tensors="pt", padding=True, padding_side="left")
        asked = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True, **decoding}
        output: Any = _generate(model, tokenizer, inputs.to(model.device), **asked)
        texts = tokenizer.batch_decode(output.sequences[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        used = getattr(output, "exit_layers_used", None)
        exits = [[]] * len(batch) if used is None else used.tolist()
        for i, text, of_tokens in zip(batch, texts, exits, strict=True):
            found[i] = Answer(text, [k for k in of_tokens if k > 0])  # 0 stands behind the end
        del output  # it holds the keys and values, which the next batch must not find in memory beside its own
    return found


def _generate(model, tokenizer, inputs, max_new_tokens: int, **decoding: Any) -> torch.Tensor:
    return model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **decoding,
    )


@dataclass
class Speed:
    """Tokens per second of one way to decode, one row at a time, the time for the prompt included."""

    median: float
    best: float  # the run that other work on the machine disturbed least


@torch.inference_mode()
def decoding_speeds(
    model: SortedLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    settings: dict[str, dict],
    max_new_tokens: int = 24,
    runs: int = 3,
    ends: bool = True,
    progress: bool = False,
) -> dict[str, Speed]:
    """
    Speed of several ways to decode, by the names of `settings`, which hold arguments of `generate`. Each prompt is
    continued alone. They take turns, so that a machine that gets slower is fair to all, `runs` after one to warm up.
    A text may end, unless `ends` is `False`: it should where modes depend on what the model has to say.
    """
    inputs = [tokenizer(prompt, return_tensors="pt").to(model.device) for prompt in prompts]
    least = None if ends else max_new_tokens
    seen: dict[str, list[float]] = {name: [] for name in settings}
    for run in tqdm(range(runs + 1), desc="decoding speed", disable=not progress):
        for name, decoding in settings.items():
            start, new_tokens = time.perf_counter(), 0
            for one in inputs:
                tokens = _generate(model, tokenizer, one, max_new_tokens, min_new_tokens=least, **decoding).cpu()
                new_tokens += tokens.shape[1] - one["input_ids"].shape[1]
            if run > 0:
                seen[name].append(new_tokens / (time.perf_counter() - start))
    return {name: Speed(statistics.median(speeds), max(speeds)) for name, speeds in seen.items()}
