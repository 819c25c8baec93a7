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
from _common import DEVICE, SMALL, Bare, in_turns, load_sorted, ratio, step_parts, where
from facts import build_facts


def batches(tokenizer, prompts: list[str], rows: int, number: int) -> list[dict[str, torch.Tensor]]:
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, SMALL["vocab_size"], (number, rows, 8), generator=generator)
        return [{"input_ids": i.to(DEVICE), "attention_mask": torch.ones_like(i).to(DEVICE)} for i in ids]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chunks = [prompts[i * rows : (i + 1) * rows] for i in range(number)]
    return [dict(tokenizer(chunk, return_tensors="pt", padding=True).to(DEVICE)) for chunk in chunks]


def layer_token_passes(model, generate) -> int:
    """How many times `generate()` runs a layer for a token, counted by hooks."""
    passes = 0

    def count(_, inputs, kwargs):
        nonlocal passes
        states = inputs[0] if inputs else kwargs["hidden_states"]
        passes += states.shape[0] * states.shape[1]

    hooks = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in model.model.layers]
    try:
        generate()
    finally:
        for hook in hooks:
            hook.remove()
    return passes


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
        prompts: list[str] = []
    elif args.prompts:
        prompts = [json.loads(line)["prompt"] for line in args.prompts.read_text().splitlines()]
    else:
        prompts = [row["prompt"] for row in build_facts()[1]]

    print(f"{args.model}, {where()}; {args.batches} batches, {args.new_tokens} new tokens, {args.runs} runs, greedy")
    for dtype in args.dtypes:
        model, tokenizer = load_sorted(args.small, getattr(torch, dtype), args.model)
        for rows in args.rows:
            measure(args, model, dtype, rows, batches(tokenizer, prompts, rows, args.batches))


def measure(args, model, dtype: str, rows: int, inputs: list[dict[str, torch.Tensor]]) -> None:
    layers = model.config.num_hidden_layers
    plain = model.extract_submodel(layers)
    for decoded in (model, plain):  # everyone decodes the same number of tokens
        decoded.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": args.new_tokens, "pad_token_id": 0}

    def generate(model, setup=None, **arguments):
        """Every batch once; `setup` is where transformers reads the draft length."""
        if setup is not None:
            config, length = setup
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = length, "constant"
            config.assistant_confidence_threshold = 0.0
        return [model.generate(**batch, **{**options, **arguments}) for batch in inputs]

    context = max(batch["input_ids"].shape[1] for batch in inputs) + args.new_tokens // 2
    bare = Bare(plain, rows, context)
    step = [(0, layers, 1, 0), (0, 0, 1, 1)]
    calls = {
        "plain": partial(generate, plain),
        "first": partial(generate, plain, max_new_tokens=1),
        "ideal plain": partial(bare.replay, step * ((args.new_tokens - 1) * len(inputs))),
    }
    for k in args.exits:
        for n in args.lengths:
            calls[f"this {k} {n}"] = partial(generate, model, assistant_early_exit=k, num_assistant_tokens=n)
            if rows == 1 and not args.no_peers:
                setup = plain.generation_config, n
                calls[f"loop {k} {n}"] = partial(generate, plain, setup, assistant_early_exit=k)
                draft = model.extract_submodel(k)
                draft.generation_config.eos_token_id = None
                calls[f"assistant {k} {n}"] = partial(
                    generate, plain, (draft.generation_config, n), assistant_model=draft
                )
            parts = []
            for batch in inputs:
                drafting = {**batch, **options, "assistant_early_exit": k, "num_assistant_tokens": n}
                parts += step_parts(model, rows, partial(model.generate, **drafting))
            calls[f"ideal {k} {n}"] = partial(bare.replay, parts)
        calls[f"this {k} auto"] = partial(generate, model, assistant_early_exit=k)
    calls["this auto auto"] = partial(generate, model, assistant_early_exit="auto")

    statistics_of = {}
    for name in calls:
        if name.startswith("this"):
            outputs = calls[name](return_dict_in_generate=True)
            statistics_of[name] = [output.draft_statistics for output in outputs]
    seconds = in_turns(calls, args.runs)
    new_tokens = len(inputs) * rows * args.new_tokens
    plain_seconds = statistics.median(seconds["plain"])

    def of_ideal(name: str) -> float:
        """The prompt, and the parts that ran after it, over what the call took."""
        ideal = seconds["ideal " + name.removeprefix("this ")]
        return statistics.median((f + i) / s for f, i, s in zip(seconds["first"], ideal, seconds[name], strict=True))

    print(
        f"\n{dtype}, {rows} row(s); plain: {new_tokens / plain_seconds:.1f} tokens/s, "
        f"{of_ideal('plain'):.2f} of its bare forwards"
    )
    print(
        "| exit | draft tokens | accepted | tokens a cycle | passes a token | tokens/s | x plain | x ideal "
        "| transformers' loop: passes, x plain | its assisted generation, x plain |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    print(f"| plain | | | 1 | {layers} | {new_tokens / plain_seconds:.1f} | 1.00 | {of_ideal('plain'):.2f} | | |")
    for name, all_statistics in statistics_of.items():
        _, k, n = name.split()
        drafted = sum(s.drafted for s in all_statistics)
        accepted = sum(s.accepted for s in all_statistics) / drafted if drafted else 0.0
        cycles = sum(s.cycles for s in all_statistics)
        passes = sum(s.layer_token_passes for s in all_statistics)
        prompt_tokens = sum(batch["input_ids"].numel() for batch in inputs)
        mine = statistics.median(seconds[name])
        ideal = "" if n == "auto" else f"{of_ideal(name):.2f}"
        peers = ["", ""]
        if f"loop {k} {n}" in calls:
            loop_passes = layer_token_passes(plain, calls[f"loop {k} {n}"]) - prompt_tokens * layers
            peers = [
                f"{loop_passes / new_tokens:.0f}, {ratio(seconds['plain'], seconds[f'loop {k} {n}']):.2f}",
                f"{ratio(seconds['plain'], seconds[f'assistant {k} {n}']):.2f}",
            ]
        print(
            f"| {k} | {n} | {accepted:.2f} | {sum(s.new_tokens for s in all_statistics) / cycles / rows:.2f} "
            f"| {(passes - prompt_tokens * layers) / new_tokens:.0f} | {new_tokens / mine:.1f} "
            f"| {ratio(seconds['plain'], seconds[name]):.2f} | {ideal} | {peers[0]} | {peers[1]} |"
        )


if __name__ == "__main__":
    main()
