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
from collections.abc import Iterator
from functools import partial
from operator import eq
from typing import NamedTuple

import torch
from _common import DEVICE, Bare, endless, in_turns, load_sorted, print_head, print_row, step_parts, where
from facts import build_facts

from sorted_llama.hub_card.measure import answers
from sorted_llama.hub_card.tasks import as_text, first_line


def points(exits: list[int], small: bool) -> dict[str, dict]:
    """What is compared: name and keyword arguments of `generate`; full depth, the measure of the others, is first."""
    compared: dict[str, dict] = {f"exit {k}": {"exit_layer": k} for k in reversed(exits)}
    for threshold in (0.9,) if small else (0.5, 0.8, 0.9, 0.97):
        compared[f"all exits, {threshold}"] = {"exit_threshold": threshold}
    for k in sorted({exits[0], exits[-2]}):
        for threshold in (0.9,) if small else (0.6, 0.8, 0.95):
            thresholds = [2.0] * (len(exits) - 1)  # never
            thresholds[exits.index(k)] = threshold
            compared[f"exit {k} only, {threshold}"] = {"exit_threshold": thresholds}
    return compared


OPTIONS = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
COLUMNS = ["", "mean depth", "exact match", "as full depth", "answers/s", "x full depth", "step / its parts"]
COLUMNS += ["beaten by"]


class Point(NamedTuple):
    """A row of the table."""

    depth: float
    answers_per_second: float
    speed: float  # x full depth
    exact: float
    agreement: float
    step_cost: float | None


def print_point(name: str, done: dict[str, Point]) -> None:
    point = done[name]
    beaten = []
    if not name.startswith("exit ") or "only" in name:
        fixed = {other: p for other, p in done.items() if other.startswith("exit ") and "only" not in other}
        beaten = [other for other, p in fixed.items() if p.speed > point.speed and p.exact > point.exact]
    depth = point.depth if isinstance(point.depth, int) else f"{point.depth:.1f}"
    shares = [f"{100 * share:.1f} %" for share in (point.exact, point.agreement)]
    speeds = [f"{value:.2f}" for value in (point.answers_per_second, point.speed)]
    cost = "" if point.step_cost is None else f"{point.step_cost:.2f}"
    print_row(name, depth, *shares, *speeds, cost, ", ".join(beaten))


def load(args) -> tuple:
    """The model, its tokenizer, what is answered and wanted for the quality, and the inputs that are timed."""
    model, tokenizer = load_sorted(args.small, getattr(torch, args.dtype), args.model)
    if args.small:
        prompts = [torch.randint(3, 500, (1, 8), device=DEVICE) for _ in range(args.questions)]
        return model, None, [], [], [{"input_ids": p, "attention_mask": torch.ones_like(p)} for p in prompts]
    rows = as_text(build_facts()[1], tokenizer)
    rows = rows[:: max(1, len(rows) // args.questions)]
    texts, wanted = [row["prompt"] for row in rows], [row["answer"] for row in rows]
    timed = texts[:: max(1, len(texts) // args.timed)][: args.timed]
    return model, tokenizer, texts, wanted, [dict(tokenizer(t, return_tensors="pt").to(DEVICE)) for t in timed]


def generate(model, inputs: list[dict], mode: dict, **extra) -> list:
    return [model.generate(**one, **{**OPTIONS, **mode, **extra}) for one in inputs]


def mean_depth(model, inputs: list[dict], mode: dict) -> float:
    """Layers that a new token takes on average."""
    outputs = generate(model, inputs, mode, return_dict_in_generate=True)
    used = torch.cat([output.exit_layers_used.flatten() for output in outputs]).float()
    return used[used > 0].mean().item()


def measure_quality(model, tokenizer, texts: list[str], wanted: list[str], compared: dict[str, dict]) -> Iterator:
    """Name, exact match and agreement with the first of `compared`, as they are measured; 0 without questions."""
    full: list[str] = []
    for name, mode in compared.items():
        if not texts:
            yield name, 0.0, 0.0
            continue
        found = [first_line(text) for text in answers(model, tokenizer, texts, **mode)]
        full = full or found
        yield name, *(statistics.mean(map(eq, found, expected)) for expected in (wanted, full))


def measure_steps(model, inputs: list[dict], modes: dict[str, dict], steps: int, runs: int) -> dict[str, float]:
    """What a step costs: `steps` tokens less one, over the same parts bare, in turns."""
    bare = Bare(model, 1, 32 + steps // 2)
    calls = {}
    with endless(model):
        for name, mode in modes.items():
            for length, tokens in (("long", steps), ("short", 1)):
                calls[name, length] = partial(generate, model, inputs, mode, max_new_tokens=tokens)
            parts = []
            for one in inputs:
                call = {**one, **OPTIONS, **mode, "max_new_tokens": steps}
                parts += step_parts(model, 1, partial(model.generate, **call))
            calls[name, "parts"] = partial(bare.replay, parts)
        taken = in_turns(calls, runs)
    costs = {}
    for name in modes:
        of_runs = zip(*(taken[name, kind] for kind in ("long", "short", "parts")), strict=True)
        costs[name] = statistics.median((long - short) / parts for long, short, parts in of_runs)
    return costs


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
    if args.small:
        args.questions, args.timed, args.runs, args.steps = 2, 2, 1, 3
    model, tokenizer, texts, wanted, inputs = load(args)
    compared = points(model.config.exit_layers, args.small)

    print(f"{args.model}, {args.dtype}, {where()}; {len(inputs)} timed questions, {args.questions} for the quality")
    taken = in_turns({name: partial(generate, model, inputs, mode) for name, mode in compared.items()}, args.runs)
    seconds = {name: statistics.median(runs) for name, runs in taken.items()}
    stepped = {name: mode for name, mode in compared.items() if name.endswith(("0.8", "0.9"))}
    step_cost = measure_steps(model, inputs[:2], stepped, args.steps, args.runs)
    print_head(*COLUMNS)
    done: dict[str, Point] = {}
    for name, exact, agreement in measure_quality(model, tokenizer, texts, wanted, compared):
        depth = compared[name].get("exit_layer") or mean_depth(model, inputs, compared[name])
        speed = seconds[next(iter(compared))] / seconds[name]
        done[name] = Point(depth, len(inputs) / seconds[name], speed, exact, agreement, step_cost.get(name))
        print_point(name, done)
    if args.plot:
        plot(args.plot, {name: (point.speed, 100 * point.exact) for name, point in done.items() if texts})


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
