"""
Claim: in lm-evaluation-harness, the log-likelihoods of four exits cost at most 1.5 x those of full depth alone.

Multiple choice over the built-in facts, four answers a question, asked by the harness's `loglikelihood`: of its own
model `hf` at full depth, of `sorted-llama` at full depth, and of `sorted-llama` at all exits from one pass.

```shell
python benchmarks/harness_one_pass.py --model out/demo/final
```
"""

import argparse
import random
import statistics

import torch
from _common import DEVICE, in_turns, load_sorted, print_head, print_row, ratio, tokenizer_without_words, where
from facts import build_facts
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from sorted_llama.hub_card.harness import SortedLlamaLM


def make_requests(questions: int) -> list[Instance]:
    """Four answers to each question: its own, and three of others."""
    rows = build_facts()[1][:questions]
    draw = random.Random(0)
    requests: list[Instance] = []
    for row in rows:
        others = sorted({other["completion"] for other in rows} - {row["completion"]})
        for choice in [row["completion"], *draw.sample(others, 3)]:
            arguments = (row["prompt"], choice)
            requests.append(Instance("loglikelihood", doc={}, arguments=arguments, idx=len(requests)))
    return requests


def measure(model, tokenizer, requests: list[Instance], batch_size: int, runs: int) -> dict[str, list[float]]:
    exits = model.config.exit_layers
    # `hf` with no device of its own would move the model
    options = {"tokenizer": tokenizer, "batch_size": batch_size}
    plain = HFLM(model, **options)

    def scores(exit_layers: list[int]):
        lm = SortedLlamaLM(model, exit_layers=exit_layers, **options)  # a new one remembers nothing
        return lm.loglikelihood(requests, disable_tqdm=True)

    calls = {
        "hf, full depth": lambda: plain.loglikelihood(requests, disable_tqdm=True),
        "sorted-llama, full depth": lambda: scores(exits[-1:]),
        f"sorted-llama, exits {exits}": lambda: scores(exits),
    }
    for ours, theirs in zip(scores(exits), calls["hf, full depth"](), strict=True):
        assert abs(ours[0] - theirs[0]) < 0.05 * abs(theirs[0]) + 0.5, (ours, theirs)  # bfloat16
    return in_turns(calls, runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/demo/final")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a tiny random model: only checks that it runs")
    args = parser.parse_args()
    if args.small:
        args.questions, args.runs = 4, 1

    model, tokenizer = load_sorted(args.small, getattr(torch, args.dtype), args.model)
    requests = make_requests(args.questions)
    print(f"{args.model}, {args.dtype}, {where()} ({DEVICE}); {len(requests)} requests, batches of {args.batch_size}")
    seconds = measure(model, tokenizer or tokenizer_without_words(), requests, args.batch_size, args.runs)
    hf, full_depth, _ = seconds
    print_head("", "seconds", f"x {hf}", f"x {full_depth}")
    for name, taken in seconds.items():
        ratios = [f"{ratio(taken, seconds[other]):.2f}" for other in (hf, full_depth)]
        print_row(name, f"{statistics.median(taken):.2f}", *ratios)


if __name__ == "__main__":
    main()
