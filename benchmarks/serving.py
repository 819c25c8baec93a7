"""
Claims, of vLLM's OpenAI server of a sorted checkpoint:

1. It serves an exit at >= 0.98 of the speed at which it serves the extracted plain Llama, and has room for L / k times
   the tokens of full depth in the same memory (`--exits`, the default).
2. One server that takes a depth from each request gives as many tokens a second as two servers of one depth each on
   the same machine, with the weights in memory once; a token of a shallow request takes at most 0.7 of the time of one
   of full depth; and at a single depth it gives >= 0.95 of the server of that depth (`--mixed 10 30`).
3. Drafts from the model's own first layers are lossless, leave room for (L + k) / L times the tokens that there is
   room for with a draft model of the same layers, and have the first token sooner (`--drafts 10`).

All servers that are compared are up, and are asked in turns by clients that stream greedy answers. Of two servers on
one machine the one that was started first can be the slower for as long as both are up, so the first claim is measured
twice, with either started first.

```shell
make test-vllm                                                   # makes the environment
.venv-vllm/bin/python benchmarks/serving.py --model out/demo/final
.venv-vllm/bin/python benchmarks/serving.py --model out/demo/final --mixed 10 30
.venv-vllm/bin/python benchmarks/serving.py --model out/demo/final --mixed 10 30 --soak 1000    # does memory grow?
.venv-vllm/bin/python benchmarks/serving.py --model out/demo/final --drafts 10
```
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack

from _common import SMALL, print_head, print_row
from _vllm import Load, Server, Throughput, ask, ask_all, at_depth, client_of, per_request, run_loads
from facts import build_facts

from sorted_llama.hub_card.extract import extract
from sorted_llama.modeling_sorted_llama import SortedLlamaConfig, SortedLlamaForCausalLM


FLAGS = [
    "--max-model-len",
    "2048",
    "--max-num-seqs",
    "32",
    "--no-enable-prefix-caching",
    "--disable-uvicorn-access-log",
]
SECONDS_UP = 3.0  # between two looks at the memory of a server


class Bench:
    """What all claims share: the checkpoint, what is asked of it, and the servers that are up."""

    def __init__(self, args: argparse.Namespace, folder: str, stack: ExitStack):
        self.args, self.folder, self.stack, self.port = args, folder, stack, args.port
        self.prompts = [row["prompt"] for row in build_facts()[1]]
        if args.small:
            args.dtype = "float32"  # vLLM's kernels for bfloat16 may count on an earlier, larger product
            fields = SMALL | {"num_attention_heads": 2, "num_key_value_heads": 1}  # of a width that vLLM knows
            model = SortedLlamaForCausalLM(SortedLlamaConfig(**fields, exit_layers=[2, 6], initializer_range=0.3))
            model.save_pretrained(f"{folder}/tiny")
            args.model, args.exits, args.clients, args.runs = f"{folder}/tiny", [2, 6], [1, 2], 1
            args.mixed, args.drafts, args.seconds = args.mixed and [2, 6], args.drafts and 2, 1.0
            self.prompts = [[5, 6, 7], [9] * 8]
        self.flags = [*FLAGS, "--dtype", args.dtype]
        if args.small:
            self.flags += ["--skip-tokenizer-init", "--enforce-eager"]

    def start(self, path: str, *flags: str, cores: str = "") -> Server:
        self.port += 1
        server = Server(path, self.port, *self.flags, *flags, cores=cores)
        self.stack.callback(server.stop)
        return server

    def in_turns(self, sides: dict[str, list[Load]]) -> dict[str, list[list[Throughput]]]:
        """Throughputs of each side's loads, run by run, there and back, after a warm-up."""
        found: dict[str, list[list[Throughput]]] = {name: [] for name in sides}
        for run in range(self.args.runs + 1):
            for name in list(sides) if run % 2 else reversed(sides):
                print(f"run {run}, {name}", file=sys.stderr, flush=True)
                seconds = self.args.seconds if run else 2.0
                measured = run_loads(sides[name], self.prompts, self.args.max_tokens, seconds)
                if run:
                    found[name].append(measured)
        return found


def median_speed(runs: list[list[Throughput]]) -> float:
    """Median over the runs of the tokens a second of all loads together."""
    return statistics.median(sum(load.tokens_per_second for load in run) for run in runs)


def milliseconds(runs: list[list[Throughput]], load: int) -> tuple[str, str]:
    """Median and 95th percentile of the time of a token."""
    gaps = sorted(gap for run in runs for gap in run[load].gaps)
    return f"{1000 * statistics.median(gaps):.0f}", f"{1000 * gaps[int(0.95 * len(gaps))]:.0f}"


def errors(found: dict[str, list[list[Throughput]]]) -> int:
    return sum(load.errors for runs in found.values() for run in runs for load in run)


def compare_exits(bench: Bench) -> None:
    """Each exit against its extracted plain Llama."""
    args, rooms = bench.args, {}
    print(f"{args.runs} runs of {args.seconds:.0f} s in turns in either order; medians; {args.dtype}")
    print_head("exit", "clients", "tokens/s", "plain Llama's", "ratio", "first token, s", "errors")
    for k in args.exits:
        plain = str(extract(args.model, k, f"{bench.folder}/plain{k}"))
        sides = {"sorted": (args.model, at_depth(k)), "plain": (plain, [])}
        found: dict[int, list] = {clients: [] for clients in args.clients}
        for order in (["sorted", "plain"], ["plain", "sorted"]):
            with ExitStack() as bench.stack:
                servers = {name: bench.start(sides[name][0], *sides[name][1]) for name in order}
                rooms[k] = servers["sorted"].cached_tokens()
                for clients, orders in found.items():
                    orders.append(bench.in_turns({name: [Load(s, clients)] for name, s in servers.items()}))
        for clients, orders in found.items():
            every = {name: [run for order in orders for run in order[name]] for name in sides}
            ratio = statistics.geometric_mean(median_speed(o["sorted"]) / median_speed(o["plain"]) for o in orders)
            first = statistics.median(first for run in every["sorted"] for first in run[0].firsts)
            speeds = [f"{median_speed(every[name]):.0f}" for name in sides]
            print_row(k, clients, *speeds, f"{ratio:.2f}", f"{first:.2f}", errors(every))
    full = args.exits[-1]
    print(f"\nTokens cached in {os.environ['VLLM_CPU_KVCACHE_SPACE']} GiB, and x those of exit {full}:")
    for k, room in rooms.items():
        print(f"exit {k}: {room}, {room / rooms[full]:.2f} (layers: {full / k:.2f})")


def compare_mixed(bench: Bench) -> None:
    """One server of all depths against a server a depth, which share the cores or have half of them each."""
    args, depths = bench.args, bench.args.mixed
    one = bench.start(args.model, *per_request(depths))
    alone = [bench.start(args.model, *at_depth(k)) for k in depths]
    rivals = {"two": alone, "two, half of the cores each": start_on_halves(bench)}
    print(f"{args.runs} runs of {args.seconds:.0f} s in turns; medians; {args.dtype}, answers of {args.max_tokens}")
    times = [f"exit {k}: {what} ms" for k in depths for what in ("median", "95 %")]
    print_head("clients", "servers", *(f"exit {k}: tokens/s" for k in depths), "together", "ratio", *times, "errors")
    for clients in args.clients:
        sides = {name: [Load(server, clients) for server in servers] for name, servers in rivals.items() if servers}
        found = bench.in_turns({"one": [Load(one, clients, k) for k in depths], **sides})
        for name, runs in found.items():
            print_mixed(f"{clients} + {clients}", name, found["one"], runs)

    print("\nA single depth, the server of all depths / the server of that depth:")
    print_head("exit", "clients", "tokens/s", "server of one depth", "ratio")
    for k, server in zip(depths, alone, strict=True):
        for clients in args.clients:
            found = bench.in_turns({"all": [Load(one, clients, k)], "one": [Load(server, clients)]})
            ratio = median_speed(found["all"]) / median_speed(found["one"])
            print_row(k, clients, *(f"{median_speed(runs):.0f}" for runs in found.values()), f"{ratio:.2f}")

    memory = f"{one.memory_mb():.0f}, of two servers {sum(server.memory_mb() for server in alone):.0f}"
    print(f"\nResident memory, MB, with the keys and values that were used: of one server {memory}")


def start_on_halves(bench: Bench) -> list[Server]:
    """A server a depth, each bound to cores of its own; none where there are too few."""
    depths, cores = bench.args.mixed, os.cpu_count() or 1
    share = cores // len(depths)
    bounds = [f"{i * share}-{(i + 1) * share - 1}" for i in range(len(depths))] if share else []
    return [bench.start(bench.args.model, *at_depth(k), cores=bound) for k, bound in zip(depths, bounds)]


def print_mixed(clients: str, name: str, ours: list[list[Throughput]], runs: list[list[Throughput]]) -> None:
    """A row: speed by depth and together, what `ours` gives for it, times of a token by depth, errors."""
    loads = range(len(runs[0]))
    speeds = [statistics.median(run[i].tokens_per_second for run in runs) for i in loads]
    ratios = [
        sum(a.tokens_per_second for a in us) / sum(b.tokens_per_second for b in them) for us, them in zip(ours, runs)
    ]
    gaps = [text for i in loads for text in milliseconds(runs, i)]
    shown = [f"{speed:.0f}" for speed in (*speeds, median_speed(runs))]
    print_row(clients, name, *shown, f"{statistics.median(ratios):.2f}", *gaps, errors({name: runs}))


def soak(bench: Bench, requests: int) -> None:
    """Many requests of all depths, a third of them hung up on: errors, wrong depths, what is left, memory."""
    args, draw = bench.args, random.Random(0)
    # A cache that is soon used whole: memory that is touched for the first time is no leak
    server = bench.start(args.model, *per_request(args.mixed), "--num-gpu-blocks-override", "1024")
    depths, length, rounds = args.mixed, 16, 10

    def answers(jobs: list[tuple[int, int, int]], clients: int) -> list:
        asked = [
            {"prompt": bench.prompts[i], "max_tokens": length, "exit_layer": k, "stop_after": end}
            for i, k, end in jobs
        ]
        return asyncio.run(ask_all(server, asked, clients, keep_errors=True))

    some = range(min(16, len(bench.prompts)))
    keys = [(prompt, depth) for prompt in some for depth in depths]
    alone = answers([(*key, 0) for key in keys], 1)
    expected = {key: answer.tokens for key, answer in zip(keys, alone, strict=True)}
    failed = wrong = done = 0
    sizes = [server.memory_mb()]
    for _ in range(rounds):
        jobs = [(*draw.choice(keys), draw.choice([0, 0, draw.randrange(1, 12)])) for _ in range(requests // rounds)]
        for (prompt, depth, _), answer in zip(jobs, answers(jobs, 16), strict=True):
            failed += isinstance(answer, Exception)
            if not isinstance(answer, Exception):
                done += 1
                wrong += answer.tokens != expected[prompt, depth][: len(answer.tokens)]
        time.sleep(SECONDS_UP)
        sizes.append(server.memory_mb())
    left = {name: value for name, value in server.metrics().items() if name in LEFT_BEHIND}
    print(f"{done} answers at depths {depths} by 16 clients, {failed} errors, {wrong} unlike the same request alone")
    print(f"left behind: {left}")
    print(
        f"memory, MB: {[round(size) for size in sizes]}, {100 * (sizes[-1] / sizes[5] - 1):+.2f} % over the last half"
    )


LEFT_BEHIND = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


def compare_drafts(bench: Bench) -> None:
    """Drafts from the first layers against a draft model of the same layers, and against no drafts."""
    args, k = bench.args, bench.args.drafts
    plain = str(extract(args.model, k, f"{bench.folder}/plain{k}"))

    def speculative(path: str) -> list[str]:
        fields = {"method": "draft_model", "model": path, "num_speculative_tokens": args.num_drafts}
        return ["--speculative-config", json.dumps(fields)]

    overrides = ["--hf-overrides", json.dumps({"assistant_early_exit": k})]
    servers = {
        "first layers": bench.start(args.model, *overrides, *speculative(args.model)),
        "draft model": bench.start(args.model, *speculative(plain)),
        "no drafts": bench.start(args.model),
    }
    prompts = bench.prompts[:50]

    async def first_tokens(server: Server) -> float:
        long = [[(7 * i + j) % 400 + 3 for i in range(1000)] for j in range(6)]
        async with client_of(server) as client:
            answers = [await ask(client, prompt, 1) for prompt in long]
        return statistics.median(answer.arrivals[0] - answer.asked_at for answer in answers[1:])

    jobs = [{"prompt": prompt, "max_tokens": args.max_tokens} for prompt in prompts]
    answered = {name: asyncio.run(ask_all(server, jobs, 8)) for name, server in servers.items()}
    answers = {name: [answer.tokens for answer in of_server] for name, of_server in answered.items()}
    accepted = {name: server.metrics() for name, server in servers.items()}
    speeds = bench.in_turns({name: [Load(server, 1)] for name, server in servers.items()})
    print(f"{args.num_drafts} drafts at exit {k}; {args.runs} runs of {args.seconds:.0f} s in turns; {args.dtype}")
    print_head(
        "drafts from", "as without", "accepted", "room, tokens", "first of 1,000 tokens, s", "tokens/s", "memory, MB"
    )
    for name, server in servers.items():
        same = sum(a == b for a, b in zip(answers[name], answers["no drafts"]))
        counts = [
            accepted[name].get(f"vllm:spec_decode_num_{what}_tokens_total", 0.0) for what in ("accepted", "draft")
        ]
        rate = f"{counts[0] / counts[1]:.2f}" if counts[1] else ""
        first = statistics.median(asyncio.run(first_tokens(server)) for _ in range(args.runs))
        speed, memory = median_speed(speeds[name]), server.memory_mb()
        row = (
            f"{same} of {len(prompts)}",
            rate,
            server.cached_tokens(),
            f"{first:.2f}",
            f"{speed:.0f}",
            f"{memory:.0f}",
        )
        print_row(name, *row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/demo/final")
    parser.add_argument("--exits", type=int, nargs="+", default=[10, 20, 30])
    parser.add_argument("--mixed", type=int, nargs=2, help="two depths of one server, the second full depth")
    parser.add_argument("--drafts", type=int, help="exit that drafts")
    parser.add_argument("--num_drafts", type=int, default=3)
    parser.add_argument(
        "--clients", type=int, nargs="+", help="at once; defaults to 1 8 32, and to 1 8 a depth with --mixed"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of a run")
    parser.add_argument("--max_tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--soak", type=int, help="with --mixed, only this: so many requests, some of them hung up on")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--small", action="store_true", help="a tiny random model: only checks that it runs")
    args = parser.parse_args()
    args.clients = args.clients or ([1, 8] if args.mixed else [1, 8, 32])
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bench = Bench(args, folder, stack)
        if args.mixed and args.soak:
            soak(bench, args.soak)
        elif args.mixed:
            compare_mixed(bench)
        elif args.drafts:
            compare_drafts(bench)
        else:
            compare_exits(bench)


if __name__ == "__main__":
    main()
