"""
Claim: letting every token leave at the exit it is sure at is worth more than any one depth for all, and a step costs
what ran in it.

Held-out questions, greedy, each answered alone: exact match, agreement with full depth's answer, mean depth of a
token, answers a second; for every fixed exit, and for thresholds at all exits or at one of them. Held to: no fixed
exit is both better and faster than the points of the curve; a step takes at most 1.08 x the bare forwards of the
layers and heads that ran in it. For that the answers are continued to `--steps` tokens, and what a call with one token
takes (the prompt, and `generate` itself) is subtracted.

```shell
python benchmarks/confidence_exit.py --model out/demo/final --plot docs/confidence_exit.png
```
"""

import argparse
import statistics
from functools import partial

import torch
from _common import DEVICE, Bare, in_turns, load_sorted, step_parts, where
from facts import build_facts

from sorted_llama.hub_card.measure import answers
from sorted_llama.hub_card.tasks import as_text, first_line


def points(exits: list[int], small: bool) -> dict[str, dict]:
    """What is compared: name and keyword arguments of `generate`."""
    compared: dict[str, dict] = {f"exit {k}": {"exit_layer": k} for k in exits}
    for threshold in (0.9,) if small else (0.5, 0.8, 0.9, 0.97):
        compared[f"all exits, {threshold}"] = {"exit_threshold": threshold}
    for k in sorted({exits[0], exits[-2]}):
        for threshold in (0.9,) if small else (0.6, 0.8, 0.95):
            thresholds = [2.0] * (len(exits) - 1)  # never
            thresholds[exits.index(k)] = threshold
            compared[f"exit {k} only, {threshold}"] = {"exit_threshold": thresholds}
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/demo/final")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--questions", type=int, default=200, help="for the quality")
    parser.add_argument("--timed", type=int, default=12, help="questions for the speed")
    parser.add_argument("--steps", type=int, default=24, help="new tokens for the cost of a step")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--plot", help="file for a picture of quality against speed")
    parser.add_argument("--small", action="store_true", help="a tiny random model: only checks that it runs")
    args = parser.parse_args()
    model, tokenizer = load_sorted(args.small, getattr(torch, args.dtype), args.model)
    if args.small:
        args.questions, args.timed, args.runs, args.steps = 2, 2, 1, 3
        prompts = [torch.randint(3, 500, (1, 8), device=DEVICE) for _ in range(args.questions)]
        inputs = [{"input_ids": p, "attention_mask": torch.ones_like(p)} for p in prompts]
    else:
        rows = as_text(build_facts()[1], tokenizer)
        rows = rows[:: max(1, len(rows) // args.questions)]
        texts, wanted = [row["prompt"] for row in rows], [row["answer"] for row in rows]
        timed = texts[:: max(1, len(texts) // args.timed)][: args.timed]
        inputs = [dict(tokenizer(text, return_tensors="pt").to(DEVICE)) for text in timed]
    exits = model.config.exit_layers
    compared = points(exits, args.small)
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}

    def generate(name: str, questions=inputs, **extra):
        return [model.generate(**one, **{**options, **compared[name], **extra}) for one in questions]

    seconds = in_turns({name: lambda name=name: generate(name) for name in compared}, args.runs)
    quality, agreement = {}, {}
    if not args.small:
        found = {
            name: [first_line(text) for text in answers(model, tokenizer, texts, **mode)]
            for name, mode in compared.items()
        }
        full = found[f"exit {exits[-1]}"]
        for name, given in found.items():
            quality[name] = statistics.mean(a == b for a, b in zip(given, wanted, strict=True))
            agreement[name] = statistics.mean(a == b for a, b in zip(given, full, strict=True))
    mean_depth = {}
    for name in compared:
        if "exit_layer" not in compared[name]:
            outputs = generate(name, return_dict_in_generate=True)
            used = torch.cat([output.exit_layers_used.flatten() for output in outputs]).float()
            mean_depth[name] = used[used > 0].mean().item()

    # The cost of a step: `--steps` tokens less one, against the same parts bare, in turns
    model.generation_config.eos_token_id = None
    bare = Bare(model, 1, 32 + args.steps // 2)
    stepped = [name for name in mean_depth if name.endswith("0.9") or name.endswith("0.8")]
    calls = {}
    for name in stepped:
        for length, tokens in (("long", args.steps), ("short", 1)):
            calls[name, length] = partial(generate, name, inputs[:2], max_new_tokens=tokens)
        parts = []
        for one in inputs[:2]:
            call = {**one, **options, **compared[name], "max_new_tokens": args.steps}
            parts += step_parts(model, 1, partial(model.generate, **call))
        calls[name, "parts"] = partial(bare.replay, parts)
    taken = in_turns(calls, args.runs)
    step_cost = {}
    for name in stepped:
        runs = zip(*(taken[name, kind] for kind in ("long", "short", "parts")), strict=True)
        step_cost[name] = statistics.median((long - short) / parts for long, short, parts in runs)

    fixed = {f"exit {k}": statistics.median(seconds[f"exit {k}"]) for k in exits}
    slowest = fixed[f"exit {exits[-1]}"]
    speed = {name: slowest / statistics.median(seconds[name]) for name in compared}
    print(f"{args.model}, {args.dtype}, {where()}; {len(inputs)} timed questions, {args.questions} for the quality")
    print("| | mean depth | exact match | as full depth | answers/s | x full depth | step / its parts | beaten by |")
    print("|---|---|---|---|---|---|---|---|")
    for name in compared:
        depth, parts_of_step, beaten = name.removeprefix("exit "), "", []
        if name not in fixed:
            depth = f"{mean_depth[name]:.1f}"
            parts_of_step = f"{step_cost[name]:.2f}" if name in step_cost else ""
            beaten = [o for o in fixed if quality and speed[o] > speed[name] and quality[o] > quality[name]]
        shown = [f"{100 * q[name]:.1f} %" if q else "" for q in (quality, agreement)]
        answered = len(inputs) / statistics.median(seconds[name])
        print(
            f"| {name} | {depth} | {' | '.join(shown)} | {answered:.2f} | {speed[name]:.2f} | {parts_of_step} "
            f"| {', '.join(beaten)} |"
        )
    if args.plot:
        plot(args.plot, {name: (speed[name], 100 * quality[name]) for name in compared} if quality else {})


def plot(path: str, points: dict[str, tuple[float, float]]) -> None:
    """Exact match against speed: the fixed exits, and the curve of thresholds at all exits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), dpi=150, layout="constrained")
    for prefix, label, style in (
        ("exit ", "one exit for all tokens", {"color": "#0072B2", "marker": "o", "linestyle": "--"}),
        ("all exits, ", "each token leaves when it is sure", {"color": "#D55E00", "marker": "s"}),
    ):
        chosen = {n.removeprefix(prefix): xy for n, xy in points.items() if n.startswith(prefix) and "only" not in n}
        axes.plot(*zip(*sorted(chosen.values())), label=label, **style)
        for name, (x, y) in chosen.items():
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8, color=style["color"])
    axes.set(xlabel="answers a second, multiples of full depth", ylabel="exact match, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
