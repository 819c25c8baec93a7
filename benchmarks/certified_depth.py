"""
Claim: a certified depth breaks its promise as rarely as it says, and is faster than full depth all the same.

The demo's held-out questions are the population, so that the risk of every setting is known: all answers are generated
once, and kept in `--answers`. Then `--draws` times `--prompts` questions are drawn with replacement, and what
`sorted-llama certify` would do with them is compared with the point estimate, the cheapest setting whose mean loss
over the same questions is at most the risk. Held to: certificates are wrong in at most `delta` of the draws.
The last table is of a shift: certified on questions to read, used for those to recall.

```shell
python benchmarks/certified_depth.py --model out/demo/final
```
"""

import argparse
import statistics
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from _common import print_head, print_row, where
from facts import build_facts
from scipy.stats import binomtest

from sorted_llama.hub_card.answering import conditions
from sorted_llama.hub_card.certify import DIFFERS, Run, find_setting, settings_to_try
from sorted_llama.hub_card.checkpoint import load_answering_tokenizer, load_model
from sorted_llama.hub_card.judge import Replies
from sorted_llama.hub_card.measure import decoding_speeds
from sorted_llama.hub_card.settings import Setting
from sorted_llama.hub_card.tasks import Task, as_text


DELTA = 0.05
COLUMNS = ["risk", "chosen by", "wrong", "p of more than delta", "draws with a setting", "speed-up, median", "mostly"]


class Population:
    """Losses of all questions at every setting; to [`find_setting`] a run whose rows are their numbers."""

    loss = DIFFERS

    def __init__(self, losses: dict[str, np.ndarray], costs: dict[str, float], full: Setting):
        self.known, self.costs, self.full = losses, costs, full
        self.risks = {name: float(of.mean()) for name, of in losses.items()}

    def losses(self, task, setting: Setting) -> np.ndarray:
        return self.known[str(setting)][task.rows]

    def weights_read(self, task, setting: Setting) -> float:
        return self.costs[str(setting)]


class Draw(NamedTuple):
    """The setting of a draw, if any, by a certificate and by the point estimate."""

    certified: str | None
    estimated: str | None


def draw(population: Population, tried: list[list[Setting]], numbers: np.ndarray, risk: float) -> Draw:
    first, second = (SimpleNamespace(rows=rows) for rows in np.array_split(numbers, 2))
    certified = find_setting(population, first, second, tried, risk, DELTA).get("setting")
    names = [str(setting) for family in tried for setting in family]
    low = [name for name in names if population.known[name][numbers].mean() <= risk]
    cheap = [name for name in low if population.costs[name] < population.costs[str(population.full)]]
    return Draw(certified, min(cheap, key=lambda name: population.costs[name], default=None))


def read_model(args) -> tuple[dict[str, Population], list[list[Setting]], dict]:
    """Populations of all questions and of each task, the settings, and what times them."""
    tokenizer, model = load_answering_tokenizer(args.model), load_model(args.model, args.dtype)
    rows = as_text(build_facts()[1], tokenizer)
    tried, full = settings_to_try(model.config, None), Setting("exit", model.config.num_hidden_layers)
    task = Task("facts", "completions", rows, 12, "facts", "")
    run = Run(model, tokenizer, conditions(model, tokenizer, model.dtype), full, DIFFERS, Replies(args.answers))
    settings = [full, *(setting for family in tried for setting in family)]
    losses = {str(setting): run.losses(task, setting) for setting in settings}
    costs = {str(setting): run.weights_read(task, setting) for setting in settings}
    populations = {"all": Population(losses, costs, full)}
    for name in ("reading", "recalling"):
        of_task = np.array([row["task"] == name for row in rows])
        populations[name] = Population({key: of[of_task] for key, of in losses.items()}, costs, full)
    timed = [row["prompt"] for row in rows[:: max(1, len(rows) // args.timed)]][: args.timed]
    return populations, tried, {"model": model, "tokenizer": tokenizer, "prompts": timed, "runs": args.runs}


def made_up() -> tuple[dict[str, Population], list[list[Setting]], None]:
    """What fails at a threshold fails at all lower ones."""
    hard, thresholds = np.random.default_rng(0).random(500), [0.99, 0.9, 0.8, 0.5]
    tried, full = [[Setting("threshold", t) for t in thresholds]], Setting("exit", 4)
    losses = {str(s): (hard < i * 0.03).astype(float) for i, s in enumerate([full, *tried[0]])}
    costs = {str(s): 10.0 - i for i, s in enumerate([full, *tried[0]])}
    population = Population(losses, costs, full)
    return dict.fromkeys(("all", "reading", "recalling"), population), tried, None


def speed_ups(names: set[str], full: Setting, timed: dict | None) -> dict[str, float]:
    """Over full depth, one row at a time, in turns; 1 where nothing is measured."""
    ways = {name: Setting.read(name).arguments for name in [str(full), *sorted(names)]}
    if timed is None:
        return dict.fromkeys(ways, 1.0)
    found = decoding_speeds(settings=ways, max_new_tokens=12, progress=True, **timed)
    return {name: speed.median / found[str(full)].median for name, speed in found.items()}


def print_choice(risk: float, by: str, chosen: list[str | None], population: Population, speeds: dict) -> None:
    """A row; without a setting a draw stays at full depth."""
    full = str(population.full)
    wrong = sum(name is not None and population.risks[name] > risk for name in chosen)
    p_value = binomtest(wrong, len(chosen), DELTA, alternative="greater").pvalue
    settled = [name or full for name in chosen]
    share = f"{100 * sum(name is not None for name in chosen) / len(chosen):.1f} %"
    speed_up, mostly = statistics.median(speeds[name] for name in settled), statistics.mode(settled)
    print_row(f"{100 * risk:g} %", by, f"{100 * wrong / len(chosen):.1f} %", f"{p_value:.2g}", share,
              f"{speed_up:.2f}x", f"{mostly} (risk {100 * population.risks[mostly]:.2f} %)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/demo/final")
    parser.add_argument("--answers", default="certified_depth.answers.jsonl", help="kept from run to run")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--risks", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    parser.add_argument("--prompts", type=int, default=400, help="of a draw")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--timed", type=int, default=24, help="questions")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="made-up losses, to see that it runs")
    args = parser.parse_args()
    args.draws = 20 if args.small else args.draws
    populations, tried, timed = made_up() if args.small else read_model(args)

    rng, chosen = np.random.default_rng(0), {}
    for risk in args.risks:
        for name in ("all", "reading"):
            population = populations[name]
            size = len(next(iter(population.known.values())))
            numbers = rng.integers(size, size=(args.draws, args.prompts))
            chosen[risk, name] = [draw(population, tried, of_draw, risk) for of_draw in numbers]
    names = {name for draws in chosen.values() for one in draws for name in one if name is not None}
    speeds = speed_ups(names, populations["all"].full, timed)

    print(f"\n{args.draws} draws of {args.prompts} questions, delta {100 * DELTA:g} %; {where()}\n")
    for title, drawn, used in (
        ("As certified", "all", "all"),
        ("Certified on questions to read", "reading", "reading"),
        ("... and used for questions to recall", "reading", "recalling"),
    ):
        print(f"{title}\n")
        print_head(*COLUMNS)
        for risk in args.risks:
            for by in Draw._fields:
                of_draws = [getattr(one, by) for one in chosen[risk, drawn]]
                print_choice(risk, by, of_draws, populations[used], speeds)
        print()


if __name__ == "__main__":
    main()
