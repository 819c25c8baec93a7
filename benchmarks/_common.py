"""What the benchmarks share: the model, and fair timing."""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from smollm2 import SMOLLM2, fetch_model  # noqa: E402


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


def load_llama(small: bool, dtype: torch.dtype, model: str = SMOLLM2, vocab_size: int | None = None):
    """The plain Llama that everything is measured on: a real one, or a tiny random one with `small`."""
    if small:
        return LlamaForCausalLM(LlamaConfig(**SMALL)).to(DEVICE, dtype).eval()
    llama = LlamaForCausalLM.from_pretrained(fetch_model(model), dtype=dtype)
    if vocab_size is not None:
        torch.manual_seed(0)
        llama.resize_token_embeddings(vocab_size, mean_resizing=False)
    return llama.to(DEVICE).eval()


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def in_turns(calls: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each call in each run: all take turns, there and back, so that a drifting machine hits them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(runs + 1):
        for name in list(calls) if run % 2 else reversed(calls):
            synchronize()
            start = time.perf_counter()
            calls[name]()
            synchronize()
            if run > 0:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios run by run."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def where() -> str:
    """The device that the figures belong to."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
