"""What the benchmarks share: the model, fair timing, and a table that grows row by row."""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.masking_utils import create_causal_mask
from transformers.utils import logging

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.modeling_sorted_llama.compat_sorted_llama import CACHE_NAME


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from smollm2 import SMOLLM2, fetch_model  # noqa: E402


logging.disable_progress_bar()
disable_progress_bars()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def load_llama(
    small: bool,
    dtype: torch.dtype,
    model: str = SMOLLM2,
    vocab_size: int | None = None,
    random_weights: bool = False,
):
    """
    The plain Llama that everything is measured on: a real one, or with `random_weights` only its shape, for which its
    `config.json` is enough; or a tiny random one with `small`.
    """
    if small:
        return LlamaForCausalLM(LlamaConfig(**SMALL)).to(DEVICE, dtype).eval()
    if random_weights:
        with torch.device(DEVICE):
            llama = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(model), dtype=dtype)
    else:
        llama = LlamaForCausalLM.from_pretrained(fetch_model(model), dtype=dtype)
    if vocab_size is not None:
        torch.manual_seed(0)
        llama.resize_token_embeddings(vocab_size, mean_resizing=False)
    return llama.to(DEVICE).eval()


def load_sorted(small: bool, dtype: torch.dtype, model: str):
    """A sorted model and its tokenizer; with `small` a tiny random one, and no tokenizer."""
    if small:
        torch.manual_seed(0)
        return SortedLlamaForCausalLM.from_llama(load_llama(True, dtype), exit_layers=[2, 4, 6]), None
    path = fetch_model(model)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True, padding_side="left")
    return SortedLlamaForCausalLM.from_pretrained(path, dtype=dtype).to(DEVICE).eval(), tokenizer


def tokenizer_without_words() -> PreTrainedTokenizerFast:
    """Every word is its unknown token: for a random model, or where the tokens are made otherwise."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def in_turns(calls: dict[Any, Callable[[], object]], runs: int, progress: bool = True) -> dict[Any, list[float]]:
    """
    Seconds of each call in each run: all take turns, there and back, so that a drifting machine hits them alike. With
    `progress`, they are written to the standard error stream as they are measured.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    report = partial(print, file=sys.stderr, flush=True) if progress else lambda *_, **__: None
    for run in range(runs + 1):
        report(f"run {run} of {runs}:" if run > 0 else "warm-up:", end="")
        for name in list(calls) if run % 2 else reversed(calls):
            synchronize()
            start = time.perf_counter()
            calls[name]()
            synchronize()
            taken = time.perf_counter() - start
            report(f" {name if isinstance(name, str) else ' '.join(map(str, name))} {taken:.3f} s", end=";")
            if run > 0:
                seconds[name].append(taken)
        report()
    return seconds


def print_head(*columns: object) -> None:
    """The first two lines of a Markdown table."""
    print_row(*columns)
    print("|---" * len(columns) + "|", flush=True)


def print_row(*cells: object) -> None:
    """A row of a Markdown table, at once: the next one may take minutes."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


@contextlib.contextmanager
def endless(*models):
    """The models decode as many tokens as they are asked for, whatever these are."""
    ends = [model.generation_config.eos_token_id for model in models]
    for model in models:
        model.generation_config.eos_token_id = None
    try:
        yield
    finally:
        for model, end in zip(models, ends, strict=True):
            model.generation_config.eos_token_id = end


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios run by run."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def where() -> str:
    """The device that the figures belong to."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def trace(model, generate: Callable[..., object], rows: int) -> list[tuple[int, int, int, int]]:
    """What a call runs, in order, as hooks see it: first and last layer, tokens a row in them, and in the head."""
    events: list[tuple[int, int, int, int]] = []

    def layer_runs(number: int, inputs: tuple, kwargs: dict) -> None:
        states = inputs[0] if inputs else kwargs["hidden_states"]
        tokens = states[..., 0].numel() // rows
        if events and events[-1][1:] == (number, tokens, 0):  # the next layer, with the same tokens
            events[-1] = (events[-1][0], number + 1, tokens, 0)
        else:
            events.append((number, number + 1, tokens, 0))

    def head_runs(_, inputs: tuple) -> None:
        tokens = inputs[0][..., 0].numel() // rows
        events.append((0, 0, tokens, tokens))

    hooks = [model.lm_head.register_forward_pre_hook(head_runs)]
    for number, layer in enumerate(model.model.layers):
        hook = partial(lambda number, _, inputs, kwargs: layer_runs(number, inputs, kwargs), number)
        hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        generate()
    finally:
        for hook in hooks:
            hook.remove()
    return events


def step_parts(model, rows: int, generate: Callable[..., object]) -> list[tuple[int, int, int, int]]:
    """What the steps of a call run, without the prompt's: for [`Bare.replay`]."""
    prompt = trace(model, lambda: generate(max_new_tokens=1), rows)
    return trace(model, generate, rows)[len(prompt) :]


class Bare:
    """Layers of a model and nothing around them, on transformers' cache of `context` tokens a row."""

    def __init__(self, model, rows: int, context: int):
        self.model, self.rows, self.context = model, rows, context
        self.cache = DynamicCache(config=model.config)
        self.made: dict[int, tuple] = {}
        tokens = torch.randint(3, model.config.vocab_size, (rows, context), device=DEVICE)
        with torch.no_grad():
            model.model(tokens, **{CACHE_NAME: self.cache})

    def _states(self, tokens: int) -> torch.Tensor:
        return self.model.model.embed_tokens(torch.full((self.rows, tokens), 5, device=DEVICE))

    def _run(self, first: int, last: int, head_tokens: int, states: torch.Tensor, options: dict) -> None:
        inner, named, tokens = self.model.model, {CACHE_NAME: self.cache}, states.shape[1]
        for layer in inner.layers[first:last]:
            states = layer(states, use_cache=True, **options, **named)
        if head_tokens:
            self.model.lm_head(inner.norm(states[:, -head_tokens:])).argmax(-1)
        for layer in self.cache.layers[first:last]:
            layer.crop(-tokens)

    def _options(self, states: torch.Tensor) -> dict:
        """What a layer is given beside the states, `(rows, tokens, hidden_size)`."""
        positions = torch.arange(self.context, self.context + states.shape[1], device=DEVICE)[None]
        named = {CACHE_NAME: self.cache}
        mask = create_causal_mask(self.model.config, states, None, position_ids=positions, **named)
        rotary = self.model.model.rotary_emb(states, position_ids=positions)
        return {"attention_mask": mask, "position_embeddings": rotary, "position_ids": positions}

    @torch.no_grad()
    def forward(self, first: int, last: int, tokens: int, head_tokens: int) -> None:
        """Run `tokens` tokens of every row through the layers, and the last `head_tokens` through the head."""
        states = self._states(tokens)
        self._run(first, last, head_tokens, states, self._options(states) if last > first else {})

    @torch.no_grad()
    def replay(self, parts: list[tuple[int, int, int, int]]) -> None:
        """Run `forward`'s parts one after another, with masks and rotary embeddings made once for each width."""
        for first, last, tokens, head_tokens in parts:
            if tokens not in self.made:
                states = self._states(tokens)
                self.made[tokens] = states, self._options(states)
            self._run(first, last, head_tokens, *self.made[tokens])

    def seconds(self, first: int, last: int, tokens: int, head_tokens: int, runs: int) -> float:
        """Median time of `forward`."""
        call = partial(self.forward, first, last, tokens, head_tokens)
        return statistics.median(in_turns({"": call}, runs, progress=False)[""])
