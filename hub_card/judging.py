"""Exit against exit, or model against model: their answers, kept as they are made, and what a judge makes of them."""

import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sorted_llama.modeling_sorted_llama.configuration_sorted_llama import check_exit_layer, check_int

from .answering import conditions, kept_answers
from .checkpoint import check_device, load_answering_tokenizer, load_config, load_model
from .judge import PairwiseResult, Replies, check_judge, judge_pairs
from .record import check_output, write_json
from .tasks import load_task


def judge_exits(
    path: str,
    exits: Sequence[int],
    data: tuple[str, str],
    judge: str,
    base_url: str | None = None,
    against: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 256,
    dtype: str = "bfloat16",
    device: str | None = None,
    chat: bool = False,
    output: str | Path = "judging.json",
) -> PairwiseResult:
    """
    Let a chat model compare the answers of two exits, or of two models. Answers and replies are kept in files beside
    the result: a stopped run goes on, and answers are not generated again.

    Args:
        path, limit, dtype, device, chat: See [`evaluate`].
        exits (`Sequence[int]`): Two exits, of the model and of what it is against.
        data (`tuple[str, str]`): Kind (see [`load_task`]) and file or dataset of what to answer.
        judge, base_url (`str`): Name of the judge, and the endpoint: see [`judge_pairs`].
        against (`str`, *optional*): Id or path of another model. Defaults to the same.
        max_new_tokens (`int`, *optional*, defaults to 256): Length of an answer, at most.
        output (`str` or `Path`, *optional*, defaults to `"judging.json"`): JSON file of the result.

    Raises:
        ValueError: If an argument is out of range, or if a file cannot be read; before a model is loaded.
        JudgeError: If the judge does not answer, before an answer is generated and, where nothing is kept yet, before
            a model is loaded; or if a request fails in the end.
    """
    output = check_output(output)
    check_int(max_new_tokens, "max_new_tokens", 1)
    check_device(device)
    sides = list(zip((path, against or path), exits, strict=True))
    for name, exit_layer in sides:
        check_exit_layer(exit_layer, load_config(name).num_hidden_layers, "exits")
    tokenizers = [load_answering_tokenizer(name) for name, _ in sides]
    tasks = [load_task(*data, tokenizer, limit, chat) for tokenizer in tokenizers]
    kept, replies = Replies(output.with_suffix(".answers.jsonl")), Replies(output.with_suffix(".replies.jsonl"))
    ask_judge = functools.cache(lambda: check_judge(judge, base_url))  # once, and not where nothing is missing
    if not (kept and replies):
        ask_judge()
    texts: list[list[str]] = []
    model: Any = None
    for (name, exit_layer), tokenizer, task in zip(sides, tokenizers, tasks, strict=True):
        if not texts or name != path:
            model = None  # before the next one comes
            model = load_model(name, dtype, device)
            made_by = conditions(model, tokenizer, model.dtype)
        asked, mode = [row["prompt"] for row in task.rows], {"exit_layer": exit_layer}
        found = kept_answers(model, tokenizer, asked, max_new_tokens, kept, made_by, mode, ask_judge)
        texts.append([answer.text for answer in found])
    prompts = [row["prompt"] for row in tasks[0].rows]
    result = judge_pairs(prompts, *texts, model=judge, base_url=base_url, cache=replies.path)
    write_json(output, {"exits": list(exits), "path": path, "against": against, **asdict(result)})
    return result
