"""Answers that are kept as they are made: a stopped run goes on, and none is generated twice."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from tqdm.auto import tqdm

from sorted_llama.trainer.escaping import one_line

from .judge import Replies, digest_of
from .measure import Answer, answers_with_exits
from .record import fingerprint


BATCH_SIZE = 64  # answers that are made, and kept, at once


def decoding_options(model: Any, max_new_tokens: int) -> dict[str, Any]:
    """What decides on an answer beside the weights, the prompt and the depth, as JSON has it."""
    options = model.generation_config.to_diff_dict()
    options = {name: value for name, value in options.items() if name != "transformers_version"}
    return {**options, "do_sample": False, "max_new_tokens": max_new_tokens}


def kept_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    kept: Replies,
    mode: dict[str, Any],
    before: Callable[[], Any] = lambda: None,
) -> list[Answer]:
    """
    Greedy answers: those that are kept, and the others, which are kept as they are made.

    Args:
        kept ([`Replies`]): The file of answers.
        mode (`dict[str, Any]`): The arguments of `generate` that choose the depth.
        before (`Callable`, *optional*): Called before the first answer is made, if one is missing.
    """
    made_by = {"weights": fingerprint(model), "dtype": str(model.dtype), "device": model.device.type, "mode": mode}
    made_by["decoding"] = decoding_options(model, max_new_tokens)
    keys = [digest_of({**made_by, "prompt": prompt}) for prompt in prompts]
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
