"""
Claim: with `cache_implementation="static"` and a `compile_config`, every mode of `generate` decodes from compiled
graphs, a fixed depth as fast as the extracted Llama, and moving depth with little time outside of its graphs.

All calls decode the same prompts greedily, in turns in one process after a warm-up that compiles; medians.

- *x uncompiled*: the same call without `cache_implementation` and `compile_config`. Held to: at least 1.3 in bfloat16.
- *in graphs*: share of a call, behind its prompt, that is spent in compiled graphs and the head, timed in runs of its
  own. Held to: at least 0.92.
- *of the limit*: the time to read the weights of the layers and heads that ran, at the bandwidth that a matrix-vector
  product of the head's size has in turns with the calls, over the time that the call took.
- *x plain*: tokens a second, over those of the compiled extracted Llama of full depth. At full depth and for other
  fixed depths, *x extracted* compares with the compiled Llama of these layers. Held to: at least 0.97.
- *needs*: the acceptance from which drafting is faster than that plain decoding, every draft accepted alike, by the
  time that its cycles took.
- *peak*: memory at its peak over what was held before the call, uncompiled and compiled (on a CPU as Linux counts it).
- *launches*, on a GPU: kernels and graphs that the host launches for a token, uncompiled and compiled.

```shell
python benchmarks/compiled.py --model out/demo/final
python benchmarks/compiled.py --model out/demo/final --rows 8
```
"""

import argparse
import ctypes
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import DEVICE, endless, in_turns, load_sorted, print_head, print_row, ratio, synchronize, where
from self_speculation import batches, read_prompts
from transformers import CompileConfig

from sorted_llama.modeling_sorted_llama import drafting_sorted_llama, graphs_sorted_llama


COLUMNS = ["decoding", "ms a token", "compiled", "x uncompiled", "in graphs", "of the limit", "x plain", "x extracted"]
COLUMNS += ["accepted", "needs", "peak, MB", "launches"]


class Parts:
    """What the compiled parts of a call took: seconds in graphs and heads, and how many layers and heads ran."""

    def __init__(self):
        self.seconds, self.layers, self.heads = 0.0, 0, 0

    def timed(self, function: Callable) -> Callable:
        def call(layers, *args, **kwargs):
            started = self.now()
            result = function(layers, *args, **kwargs)
            self.seconds += self.now() - started
            self.layers += len(layers)
            return result

        return call

    @staticmethod
    def now() -> float:
        synchronize()
        return time.perf_counter()

    def before_head(self, *_) -> None:
        self.seconds, self.heads = self.seconds - self.now(), self.heads + 1

    def after_head(self, *_) -> None:
        self.seconds += self.now()


@contextmanager
def parts_of(model):
    """[`Parts`] of the calls of a sorted model."""
    parts, graph = Parts(), graphs_sorted_llama.graph_of
    graphs_sorted_llama.graph_of = lambda *args: parts.timed(graph(*args))
    heads = dict.fromkeys(model.exit_head(k) for k in model.config.exit_layers)
    hooks = [
        hook
        for h in heads
        for hook in (h.register_forward_pre_hook(parts.before_head), h.register_forward_hook(parts.after_head))
    ]
    try:
        yield parts
    finally:
        graphs_sorted_llama.graph_of = graph
        for hook in hooks:
            hook.remove()


@contextmanager
def accepting(share: float | None):
    """Drafts are accepted with a probability, whatever their verification says; `None`: as it says."""
    original = drafting_sorted_llama.accept_greedy
    generator = torch.Generator().manual_seed(0)

    def accept(scores, drafts, probabilities=None):
        kept = (torch.rand(drafts.shape, generator=generator) < share).long().cumprod(1).sum(1).to(drafts.device)
        return kept, drafting_sorted_llama.likeliest(scores).gather(1, kept[:, None])

    drafting_sorted_llama.accept_greedy = original if share is None else accept
    try:
        yield
    finally:
        drafting_sorted_llama.accept_greedy = original


def peak_mb(call: Callable[[], object]) -> float:
    """Memory at its peak during a call, over what was held before it."""
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if not sys.platform.startswith("linux"):
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)  # what was freed, and would be taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident_kb("VmRSS")
    call()
    return (resident_kb("VmHWM") - before) / 1e3


def resident_kb(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def launches(call: Callable[[], object]) -> int:
    """Kernels and graphs that the host launches on a GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
    names = ("LaunchKernel", "GraphLaunch")
    return sum(event.count for event in profile.key_averages() if any(name in event.key for name in names))


def least_acceptance(tokens: float, length: int) -> str:
    """The probability at which `1 + a + ... + a^length` tokens a cycle are as many as `tokens`."""
    if tokens > length + 1:
        return "never"
    shares = (share / 1000 for share in range(1001))
    return f"{next(a for a in shares if sum(a**i for i in range(length + 1)) >= tokens):.2f}"


class Table:
    """One table: the calls of all modes on one model, for some batches."""

    def __init__(self, args: argparse.Namespace, model: Any, inputs: list[dict[str, torch.Tensor]]):
        self.args, self.model, self.inputs = args, model, inputs
        self.layers = model.config.num_hidden_layers
        self.compiled = {"cache_implementation": "static", "compile_config": CompileConfig(backend=args.backend)}
        self.compiled["compile_config"]._compile_all_devices = True  # noqa: SLF001 - transformers' own, on a CPU
        self.fixed = {k: model.extract_submodel(k) for k in (*args.depths, self.layers)}
        self.modes: dict[str, tuple[dict[str, Any], float | None]] = {
            **{f"exit {k}": ({"exit_layer": k}, None) for k in self.fixed},
            f"threshold {args.threshold}": ({"exit_threshold": args.threshold}, None),
        }
        for k in args.drafts:
            for share in args.acceptance:
                forced = "" if share is None else f", {share} accepted"
                options = {"assistant_early_exit": k, "num_assistant_tokens": args.length}
                self.modes[f"{args.length} drafts at {k}{forced}"] = options, share

    def generate(self, model, options: dict[str, Any], share: float | None = None, **more: Any) -> list:
        common = {"do_sample": False, "max_new_tokens": self.args.new_tokens, "pad_token_id": 0, **more}
        with accepting(share):
            return [model.generate(**batch, **common, **options) for batch in self.inputs]

    def calls(self) -> dict:
        calls: dict[Any, Callable] = {}
        for name, (options, share) in self.modes.items():
            calls[name, "uncompiled"] = partial(self.generate, self.model, options, share)
            calls[name, "compiled"] = partial(self.generate, self.model, {**options, **self.compiled}, share)
            calls[name, "prompt"] = partial(self.generate, self.model, options, share, max_new_tokens=1)
        for k, model in self.fixed.items():
            calls[f"exit {k}", "extracted"] = partial(self.generate, model, self.compiled)
        weight = self.model.lm_head.weight
        states = torch.randn(weight.shape[1], dtype=weight.dtype, device=weight.device)
        calls["bandwidth",] = lambda: [torch.mv(weight, states) for _ in range(100)]
        return calls

    def print(self) -> None:
        with torch.no_grad(), endless(self.model, *self.fixed.values()):
            calls = self.calls()
            seconds = in_turns(calls, self.args.runs)
            print_head(*COLUMNS)
            for name in self.modes:
                print_row(name, *self.cells(name, calls, seconds))

    def cells(self, name: str, calls: dict, seconds: dict) -> list[str]:
        options, share = self.modes[name]
        uncompiled, compiled = seconds[name, "uncompiled"], seconds[name, "compiled"]
        steps = self.args.new_tokens * len(self.inputs)
        plain = seconds[f"exit {self.layers}", "extracted"]
        if "exit_layer" in options:
            shares = ["", f"{self.of_limit(name, seconds):.2f}"]
        else:
            parts, taken = self.parts(calls[name, "compiled"], calls[name, "prompt"])
            shares = [f"{parts.seconds / taken:.2f}", f"{self.of_limit(name, seconds, parts):.2f}"]
        extracted = seconds.get((name, "extracted"))
        of_extracted = "" if extracted is None else f"{ratio(extracted, compiled):.2f}"
        accepted, needs = "", ""
        if "assistant_early_exit" in options:
            all_statistics = [
                o.draft_statistics for o in self.generate(self.model, options, share, return_dict_in_generate=True)
            ]
            cycles, drafted, kept = (
                sum(getattr(s, f) for s in all_statistics) for f in ("cycles", "drafted", "accepted")
            )
            accepted = f"{kept / drafted:.2f}"
            per_cycle = statistics.median(compiled) / cycles / (statistics.median(plain) / steps)
            needs = least_acceptance(per_cycle, self.args.length)
        return [
            f"{1e3 * statistics.median(uncompiled) / steps:.1f}",
            f"{1e3 * statistics.median(compiled) / steps:.1f}",
            f"{ratio(uncompiled, compiled):.2f}",
            *shares,
            f"{ratio(plain, compiled):.2f}",
            of_extracted,
            accepted,
            needs,
            ", ".join(f"{peak_mb(calls[name, kind]):.0f}" for kind in ("uncompiled", "compiled")),
            self.launches(name, calls, steps),
        ]

    def launches(self, name: str, calls: dict, steps: int) -> str:
        if DEVICE != "cuda":
            return ""
        return ", ".join(f"{launches(calls[name, kind]) / steps:.0f}" for kind in ("uncompiled", "compiled"))

    def parts(self, call: Callable, prompt: Callable) -> tuple[Parts, float]:
        """The parts of a call behind its prompt, and what it took: of the run of median share."""
        runs = []
        for _ in range(self.args.runs):
            started = Parts.now()
            prompt()
            of_prompt = Parts.now() - started
            with parts_of(self.model) as parts:
                started = Parts.now()
                call()
                taken = Parts.now() - started - of_prompt
            runs.append((parts.seconds / taken, taken, parts))
        _, taken, parts = sorted(runs, key=lambda run: run[0])[len(runs) // 2]
        return parts, taken

    def of_limit(self, name: str, seconds: dict, parts: Parts | None = None) -> float:
        """Reading the weights that ran behind the prompt, at the bandwidth of the same run, over the call's time."""
        of_layer = sum(weight.nbytes for weight in self.model.model.layers[0].parameters())
        of_head = self.model.lm_head.weight.nbytes
        steps = (self.args.new_tokens - 1) * len(self.inputs)
        if parts is None:
            layers, heads = self.modes[name][0]["exit_layer"] * steps, steps
        else:
            layers, heads = parts.layers, parts.heads
        read = layers * of_layer + heads * of_head
        of_runs = zip(seconds[name, "compiled"], seconds[name, "prompt"], seconds["bandwidth",], strict=True)
        return statistics.median(read * probe / (100 * of_head) / (taken - prompt) for taken, prompt, probe in of_runs)


def of_one_length(tokenizer, prompts: list[str]) -> list[str]:
    """The most prompts of as many tokens: transformers compiles anew where its static cache is of another length."""
    groups: dict[int, list[str]] = {}
    for prompt in prompts:
        groups.setdefault(len(tokenizer(prompt).input_ids), []).append(prompt)
    return max(groups.values(), key=len)


def acceptance(value: str) -> float | None:
    return None if value == "real" else float(value)


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/demo/final", help="a SoFT checkpoint, or any Llama")
    parser.add_argument("--prompts", type=Path, help="JSON lines with a field `prompt`; default: the demo's questions")
    parser.add_argument("--depths", type=int, nargs="*", default=[10], help="fixed depths, beside the full one")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--drafts", type=int, nargs="*", default=[5, 10], help="exits that draft")
    parser.add_argument("--length", type=int, default=2, help="drafts a cycle")
    parser.add_argument("--acceptance", type=acceptance, nargs="+", default=[None], help="`real`, or shares to force")
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a tiny random model, not compiled: only that it runs")
    return parser


def main() -> None:
    args = arguments(__doc__).parse_args()
    if args.small:
        args.depths, args.drafts, args.new_tokens, args.runs, args.backend = [2], [2], 6, 1, "aot_eager"
    model, tokenizer = load_sorted(args.small, getattr(torch, args.dtype), args.model)
    prompts = [] if args.small else of_one_length(tokenizer, read_prompts(args.prompts))
    for rows in args.rows:
        print(
            f"\n{args.model}, {args.dtype}, {rows} row(s), {where()}; {args.new_tokens} new tokens, {args.runs} runs\n"
        )
        torch._dynamo.reset()  # graphs of other batch sizes
        Table(args, model, batches(tokenizer, prompts, rows, args.batches)).print()


if __name__ == "__main__":
    main()
