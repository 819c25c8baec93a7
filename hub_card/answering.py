"""Answers that are kept as they are made: a stopped run goes on, and none is generated twice."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from tqdm.auto import tqdm

from sorted_llama.trainer.escaping import one_line

from .judge import Replies, digest_of
from .measure import Answer, answers_with_exits
from .record import fingerprint


BATCH_SIZE = 64  # answers that are made, and kept, at once
# Fields of a config that say how it came about, and not what the model computes
_ORIGIN = {"_name_or_path", "architectures", "auto_map", "base_model_type", "dtype", "transformers_version"}
_ORIGIN |= {"exit_loss_weights"}


def conditions(model: Any, tokenizer: Any, dtype: torch.dtype) -> dict[str, str]:
    """What answers depend on beside prompts and decoding, with the weights as `dtype`."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _ORIGIN}
    fast = getattr(tokenizer, "backend_tokenizer", None)
    reads = tokenizer.get_vocab() if fast is None else json.loads(fast.to_str())
    return {
        "weights": fingerprint(model, dtype),
        "config": digest_of(config),
        # How it pads is up to who calls it
        "tokenizer": digest_of({name: what for name, what in reads.items() if name not in ("padding", "truncation")}),
        "chat_template": digest_of(tokenizer.chat_template),
        "dtype": str(dtype).removeprefix("torch."),
    }


def decoding_options(model: Any, max_new_tokens: int) -> dict[str, Any]:
    """What else decides on an answer beside the prompt and the depth, as JSON has it."""
    options = model.generation_config.to_diff_dict()
    options = {name: value for name, value in options.items() if name != "transformers_version"}
    return {**options, "do_sample": False, "max_new_tokens": max_new_tokens}


def kept_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    kept: Replies,
    made_by: dict[str, str],
    mode: dict[str, Any],
    before: Callable[[], Any] = lambda: None,
) -> list[Answer]:
    """
    Greedy answers: those that are kept, and the others, which are kept as they are made.

    Args:
        kept ([`Replies`]): The file of answers.
        made_by (`dict[str, str]`): The [`conditions`] of the model as it is.
        mode (`dict[str, Any]`): The arguments of `generate` that choose the depth.
        before (`Callable`, *optional*): Called before the first answer is made, if one is missing.
    """
    asked_with = {"device": model.device.type, "mode": mode, "decoding": decoding_options(model, max_new_tokens)}
    keys = [digest_of({**made_by, **asked_with, "prompt": prompt}) for prompt in prompts]
    missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in kept}
    if missing:
        before()
        kept.make_file()
        asked = sorted(missing, key=lambda key: len(missing[key]))  # alike lengths: little padding
        bar = one_line(f"{model.name_or_path}, {', '.join(f'{name}={value}' for name, value in mode.items())}")
        for start in tqdm(range(0, len(asked), BATCH_SIZE), desc=bar):
            batch = asked[start : start + BATCH_SIZE]
            questions = [missing[key] for key in batch]
            made = answers_with_exits(model, tokenizer, questions, max_new_tokens, BATCH_SIZE, **mode)
            for key, answer in zip(batch, made, strict=True):
                kept.add(key, json.dumps(asdict(answer)))
    return [Answer(**json.loads(kept[key])) for key in keys]
