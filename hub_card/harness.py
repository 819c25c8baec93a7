"""
Every exit in EleutherAI's lm-evaluation-harness, log-likelihoods of all of them from one backbone pass.

```shell
lm_eval --model hf --model_args pretrained=PATH,trust_remote_code=True,exit_layer=10 --tasks ...   # one exit, as it is
python -m sorted_llama.hub_card.harness --model sorted-llama --model_args pretrained=PATH,exit_layer=10 --tasks ...
sorted-llama evaluate PATH --tasks ...                                                       # all exits
```
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm.auto import tqdm

import sorted_llama.modeling_sorted_llama  # noqa: F401  (registers the model with the Auto classes)
from sorted_llama.trainer.escaping import one_line

from .measure import read_exits
from .settings import MODES


_ARGUMENTS = [mode.argument for mode in MODES.values()]

# Of a request, context and continuation, to its score: log-probability, and whether it is the greedy continuation
Key = tuple[tuple[int, ...], tuple[int, ...]]


@register_model("sorted-llama")
class SortedLlamaLM(HFLM):
    """
    The harness's Hugging Face model at an exit. A log-likelihood is asked for once: the scores of all `exit_layers`
    come from the same pass and are kept, so that a second run at another `exit_layer` finds them.

    Args:
        pretrained (`str` or [`SortedLlamaForCausalLM`]): Model id, path or model.
        exit_layer (`int`, *optional*):
            Exit whose results are returned, and that generates unless `gen_kwargs` choose a mode. Can be assigned.
            Defaults to the model's full depth.
        exit_layers (`list[int]`, *optional*): Exits to score, `exit_layer` among them. Defaults to it alone.
        kwargs (`Any`, *optional*): Arguments of the harness's `hf` model.
    """

    def __init__(
        self, pretrained: Any, exit_layer: int | None = None, exit_layers: Sequence[int] | None = None, **kwargs: Any
    ):
        super().__init__(pretrained, **kwargs)
        depth = self.model.config.num_hidden_layers
        self.exit_layers = sorted(exit_layers or [depth if exit_layer is None else exit_layer])
        self.exit_layer = self.exit_layers[-1] if exit_layer is None else exit_layer
        if self.exit_layer not in self.exit_layers or not 1 <= self.exit_layers[0] <= self.exit_layers[-1] <= depth:
            raise ValueError(f"`{exit_layer=}` must be one of `{exit_layers=}`, from 1 to {depth}.")
        self._scores: dict[Key, dict[int, tuple[float, bool]]] = {}

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        asked = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        # By the tokens that the model reads: answers of one token share a pass over their question
        by_input: dict[tuple[int, ...], list[Key]] = {}
        for key in dict.fromkeys(asked):
            if key not in self._scores:
                by_input.setdefault((*key[0], *key[1])[-(self.max_length + 1) :][:-1], []).append(key)
        inputs = sorted(by_input, key=lambda tokens: (-len(tokens), tokens))
        batch_size = override_bs or (1 if self.batch_size == "auto" else int(self.batch_size))
        no_bar = disable_tqdm or self.rank != 0
        for start in tqdm(range(0, len(inputs), batch_size), desc="log-likelihoods of all exits", disable=no_bar):
            batch = inputs[start : start + batch_size]
            self._score(batch, [by_input[tokens] for tokens in batch])
        scores = [self._scores[key][self.exit_layer] for key in asked]
        for (request, *_), score in zip(requests, scores, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, score)
        return scores

    @torch.inference_mode()
    def _score(self, inputs: list[tuple[int, ...]], keys: list[list[Key]]) -> None:
        """Score the continuations of a batch of inputs at every exit."""
        width = len(inputs[0])  # the longest comes first; what pads a row on the right, nothing before it sees
        rows = [tokens + (0,) * (width - len(tokens)) for tokens in inputs]
        padded = {"input_ids": torch.tensor(rows, device=self.device)}
        asked = [(row, key, key[1][-len(inputs[row]) :]) for row, of_row in enumerate(keys) for key in of_row]
        # Only the places that predict a continuation reach a head
        wanted = [
            (row, len(inputs[row]) - len(continuation) + i, token)
            for row, _, continuation in asked
            for i, token in enumerate(continuation)
        ]
        dtype = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            log_probs, greedy, _ = read_exits(self.model, self.exit_layers, padded, wanted, self.softmax_dtype)
        right = greedy == torch.tensor([token for *_, token in wanted])
        lengths = [len(continuation) for *_, continuation in asked]
        for i, k in enumerate(self.exit_layers):
            by_key = zip(asked, log_probs[i].split(lengths), right[i].split(lengths), strict=True)
            for (_, key, _), of_key, is_greedy in by_key:
                self._scores.setdefault(key, {})[k] = (float(of_key.sum()), bool(is_greedy.all()))

    def _model_generate(self, context, max_length, stop, **generation_kwargs):
        if not any(generation_kwargs.get(name) is not None for name in _ARGUMENTS):
            generation_kwargs["exit_layer"] = self.exit_layer
        return super()._model_generate(context, max_length, stop, **generation_kwargs)


def find_tasks(names: Sequence[str]) -> TaskManager:
    """Make the tasks, by their names or paths of YAML files, before any is run; `ValueError` if one cannot be made."""
    manager = TaskManager()
    unknown = [name for name in names if not Path(name).is_file() and not manager.match_tasks([name])]
    if unknown:
        advice = "`lm_eval ls tasks` lists them; or pass a YAML file"
        raise ValueError(f"lm-evaluation-harness has no task {', '.join(map(repr, unknown))}: {advice}.")
    for name in names:
        try:
            manager.load([name])
        except Exception as error:  # the harness, the file and the data have each their own
            raise ValueError(
                f"The task {name!r} could not be made: {type(error).__name__}: {one_line(error)}"
            ) from error
    return manager


def evaluate_harness(model: SortedLlamaLM, exit_layers: Sequence[int], task: str, **kwargs: Any) -> dict[str, dict]:
    """Of a task or a group, by its tasks and the exits, the metrics (`"acc,none"`) that are finite numbers."""
    found: dict[str, dict] = {}
    for exit_layer in exit_layers:
        model.exit_layer = exit_layer
        results: Any = simple_evaluate(model=model, tasks=[task], **kwargs)
        for name, metrics in results["results"].items():
            numbers = {m: value for m, value in metrics.items() if isinstance(value, float) and math.isfinite(value)}
            found.setdefault(name, {})[str(exit_layer)] = numbers
    return found


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (OSError, ValueError) as error:
        sys.exit(one_line(error))
