"""
Claim: `assistant_early_exit=k` costs what its layers cost: a draft step what `k` layers take, a verification what the
rest takes. So it beats transformers' loop on the same weights at every exit and length, and `"auto"` lengths never
lose to plain decoding.

Peers: plain full depth; transformers' own `LlamaForCausalLM.generate(assistant_early_exit=k)`; transformers' assisted
generation with the extracted sub-model. Greedy, the same prompts and weights, in turns in one process, medians. The
ideal is what these very cycles take when a draft step is the bare forward of `k` layers and head, and a verification
the bare forward of the layers above for all its tokens: they are run so, in turns with the rest. Held to: at least
0.92 of the ideal; above transformers' loop; `"auto"` at least 0.95 x plain on a model that was never SoFT-trained.

```shell
python benchmarks/self_speculation.py --model out/demo/final
python benchmarks/self_speculation.py --model out/gsm8k --prompts gsm8k_held_out.jsonl --rows 1 8 --dtypes float32
```
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import torch
from _common import (
    DEVICE,
    SMALL,
    Bare,
    endless,
    in_turns,
    load_sorted,
    print_head,
    print_row,
    ratio,
    step_parts,
    trace,
    where,
)
from facts import build_facts


def read_prompts(file: Path | None) -> list[str]:
    rows = build_facts()[1] if file is None else [json.loads(line) for line in file.read_text().splitlines()]
    return [row["prompt"] for row in rows]


def batches(tokenizer, prompts: list[str], rows: int, number: int) -> list[dict[str, torch.Tensor]]:
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, SMALL["vocab_size"], (number, rows, 8), generator=generator)
        return [{"input_ids": i.to(DEVICE), "attention_mask": torch.ones_like(i).to(DEVICE)} for i in ids]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chunks = [prompts[i * rows : (i + 1) * rows] for i in range(number)]
    return [dict(tokenizer(chunk, return_tensors="pt", padding=True).to(DEVICE)) for chunk in chunks]


def layer_token_passes(model, rows: int, generate) -> int:
    """How many times `generate()` runs a layer for a token."""
    return sum(rows * tokens * (last - first) for first, last, tokens, _ in trace(model, generate, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/demo/final", help="a SoFT checkpoint, or any Llama")
    parser.add_argument("--prompts", type=Path, help="JSON lines with a field `prompt`; default: the demo's questions")
    parser.add_argument("--exits", type=int, nargs="+", default=[5, 10, 15, 20])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no_peers", action="store_true", help="only plain decoding and this project")
    parser.add_argument("--small", action="store_true", help="a tiny random model: only checks that it runs")
    args = parser.parse_args()
    if args.small:
        args.exits, args.lengths, args.new_tokens, args.runs, args.rows = [2], [2], 6, 1, [1, 2]
    prompts = [] if args.small else read_prompts(args.prompts)

    print(f"{args.model}, {where()}; {args.batches} batches, {args.new_tokens} new tokens, {args.runs} runs, greedy")
    for dtype in args.dtypes:
        model, tokenizer = load_sorted(args.small, getattr(torch, dtype), args.model)
        for rows in args.rows:
            measure(args, model, dtype, rows, batches(tokenizer, prompts, rows, args.batches))


COLUMNS = ["exit", "draft tokens", "accepted", "tokens a cycle", "passes a token", "tokens/s", "x plain", "x ideal"]
COLUMNS += ["transformers' loop: passes, x plain", "its assisted generation, x plain"]


class Decoding:
    """The calls that one table compares, by kind (`this`, `ideal`, `loop`, `assistant`), exit and draft length."""

    def __init__(self, args, model, rows: int, inputs: list[dict[str, torch.Tensor]]):
        self.args, self.model, self.rows, self.inputs = args, model, rows, inputs
        self.layers = model.config.num_hidden_layers
        self.plain = model.extract_submodel(self.layers)
        self.options = {"do_sample": False, "max_new_tokens": args.new_tokens, "pad_token_id": 0}
        context = max(batch["input_ids"].shape[1] for batch in inputs) + args.new_tokens // 2
        self.bare = Bare(self.plain, rows, context)

    def generate(self, model, setup=None, **arguments) -> list:
        """Every batch once; `setup` is where transformers reads the draft length."""
        if setup is not None:
            config, length = setup
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = length, "constant"
            config.assistant_confidence_threshold = 0.0
        return [model.generate(**batch, **{**self.options, **arguments}) for batch in self.inputs]

    def calls(self) -> dict:
        step = [(0, self.layers, 1, 0), (0, 0, 1, 1)]
        calls = {
            ("plain",): partial(self.generate, self.plain),
            ("first",): partial(self.generate, self.plain, max_new_tokens=1),
            ("ideal", "plain"): partial(self.bare.replay, step * ((self.args.new_tokens - 1) * len(self.inputs))),
        }
        for k in self.args.exits:
            for n in self.args.lengths:
                calls |= self.calls_of(k, n)
            calls["this", k, "auto"] = partial(self.generate, self.model, assistant_early_exit=k)
        calls["this", "auto", "auto"] = partial(self.generate, self.model, assistant_early_exit="auto")
        return calls

    def calls_of(self, k: int, n: int) -> dict:
        drafting = {"assistant_early_exit": k, "num_assistant_tokens": n}
        calls = {("this", k, n): partial(self.generate, self.model, **drafting)}
        if self.rows == 1 and not self.args.no_peers:
            setup = self.plain.generation_config, n
            calls["loop", k, n] = partial(self.generate, self.plain, setup, assistant_early_exit=k)
            draft = self.model.extract_submodel(k)
            draft.generation_config.eos_token_id = None
            setup = draft.generation_config, n
            calls["assistant", k, n] = partial(self.generate, self.plain, setup, assistant_model=draft)
        parts = []
        for batch in self.inputs:
            call = partial(self.model.generate, **{**batch, **self.options, **drafting})
            parts += step_parts(self.model, self.rows, call)
        calls["ideal", k, n] = partial(self.bare.replay, parts)
        return calls


def measure(args, model, dtype: str, rows: int, inputs: list[dict[str, torch.Tensor]]) -> None:
    decoding = Decoding(args, model, rows, inputs)
    with endless(model, decoding.plain):  # everyone decodes the same number of tokens
        calls = decoding.calls()
        statistics_of = {}
        for kind, *setting in calls:
            if kind == "this":
                outputs = calls[kind, *setting](return_dict_in_generate=True)
                statistics_of[tuple(setting)] = [output.draft_statistics for output in outputs]
        loops = {
            tuple(setting): layer_token_passes(decoding.plain, rows, calls[kind, *setting])
            for kind, *setting in calls
            if kind == "loop"
        }
        seconds = in_turns(calls, args.runs)
    print_table(decoding, dtype, seconds, statistics_of, loops)


def print_table(decoding: Decoding, dtype: str, seconds: dict, statistics_of: dict, loops: dict) -> None:
    layers, rows, inputs = decoding.layers, decoding.rows, decoding.inputs
    new_tokens = len(inputs) * rows * decoding.args.new_tokens
    of_prompt = sum(batch["input_ids"].numel() for batch in inputs) * layers
    plain = seconds["plain",]

    def of_ideal(taken: list[float], ideal: list[float]) -> str:
        """The prompt, and the parts that ran after it, over what the call took."""
        of_runs = zip(seconds["first",], ideal, taken, strict=True)
        return f"{statistics.median((first + i) / s for first, i, s in of_runs):.2f}"

    plain_speed, plain_of_ideal = new_tokens / statistics.median(plain), of_ideal(plain, seconds["ideal", "plain"])
    print(f"\n{dtype}, {rows} row(s); plain: {plain_speed:.1f} tokens/s, {plain_of_ideal} of its bare forwards")
    print_head(*COLUMNS)
    print_row("plain", "", "", 1, layers, f"{plain_speed:.1f}", "1.00", plain_of_ideal, "", "")
    for (k, n), all_statistics in statistics_of.items():
        drafted, accepted, cycles, tokens, passes = (
            sum(getattr(s, name) for s in all_statistics)
            for name in ("drafted", "accepted", "cycles", "new_tokens", "layer_token_passes")
        )
        taken = seconds["this", k, n]
        counts = [f"{accepted / drafted if drafted else 0.0:.2f}", f"{tokens / cycles / rows:.2f}"]
        passes = f"{(passes - of_prompt) / new_tokens:.0f}"
        speeds = [f"{new_tokens / statistics.median(taken):.1f}", f"{ratio(plain, taken):.2f}"]
        ideal, peers = "" if n == "auto" else of_ideal(taken, seconds["ideal", k, n]), ["", ""]
        if (k, n) in loops:
            loop_passes = (loops[k, n] - of_prompt) / new_tokens
            peers = [f"{loop_passes:.0f}, {ratio(plain, seconds['loop', k, n]):.2f}"]
            peers += [f"{ratio(plain, seconds['assistant', k, n]):.2f}"]
        print_row(k, n, *counts, passes, *speeds, ideal, *peers)


if __name__ == "__main__":
    main()
