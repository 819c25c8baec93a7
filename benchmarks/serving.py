"""
Claim: vLLM serves an exit of a sorted checkpoint at >= 0.98 of the speed at which it serves the extracted plain Llama,
and has room for L / k times the tokens of full depth in the same memory.

For each exit two of vLLM's OpenAI servers are up, of the checkpoint and of the extracted folder; they are asked in
turns by 1, 8 and 32 clients at once, each for a number of streamed answers of the same length. Of two servers on one
machine the one that was started first can be the slower for as long as both are up, so all of it is done twice, with
either started first, and the ratio is the geometric mean of the two.

```shell
make test-vllm                                                   # makes the environment
.venv-vllm/bin/python benchmarks/serving.py --model out/demo/final
.venv-vllm/bin/python benchmarks/serving.py --model out/demo/final --exits 10 --soak 1000     # does memory grow?
```
"""

import argparse
import asyncio
import math
import os
import re
import signal
import statistics
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

from _common import SMALL, print_head, print_row
from _vllm import start_server, wait_until_up
from facts import build_facts
from openai import AsyncOpenAI

from sorted_llama.hub_card.extract import extract
from sorted_llama.modeling_sorted_llama import SortedLlamaConfig, SortedLlamaForCausalLM


FLAGS = ["--dtype", "bfloat16", "--max-model-len", "512", "--max-num-seqs", "32", "--no-enable-prefix-caching"]
FLAGS += ["--disable-uvicorn-access-log"]
SECONDS_UP = 3.0  # between two looks at the memory of a server


class Server:
    """A vLLM server and what it is asked."""

    def __init__(self, path: str, depth: str, port: int, prompts: list, max_tokens: int, flags: list[str]):
        self.process = start_server(path, depth, port, *FLAGS, *flags, name="model")
        self.url, self.prompts, self.max_tokens = f"http://localhost:{port}", prompts, max_tokens
        wait_until_up(self.process, port)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait()

    def cached_tokens(self) -> int:
        """Tokens that there is room for."""
        metrics = urllib.request.urlopen(f"{self.url}/metrics").read().decode()
        (line,) = re.findall(r"^vllm:cache_config_info{(.*)}", metrics, re.MULTILINE)
        fields = dict(re.findall(r'(\w+)="([^"]*)"', line))
        return int(fields["num_gpu_blocks"]) * int(fields["block_size"])

    def memory_mb(self) -> float:
        """Resident memory of the server and its children, what they share counted once."""
        pids, kilobytes = [self.process.pid], 0
        while pids:
            pid = pids.pop()
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            (share,) = re.findall(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
            kilobytes += int(share)
        return kilobytes / 1024

    async def answer(self, client: AsyncOpenAI, i: int) -> float:
        """Ask once; seconds to the first token."""
        start, first = time.perf_counter(), 0.0
        stream = await client.completions.create(
            model="model",
            prompt=self.prompts[i % len(self.prompts)],
            max_tokens=self.max_tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for _ in stream:
            first = first or time.perf_counter() - start
        return first

    def run(self, clients: int, requests: int) -> tuple[float, float, int]:
        """Tokens a second, median seconds to the first token, errors; `requests` a client."""

        async def ask_all():
            async with AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=600) as client:

                async def one(c: int) -> list:
                    return [await self.answer(client, c * requests + i) for i in range(requests)]

                return await asyncio.gather(*map(one, range(clients)), return_exceptions=True)

        start = time.perf_counter()
        results = asyncio.run(ask_all())
        seconds = time.perf_counter() - start
        firsts = [first for result in results if isinstance(result, list) for first in result]
        errors = sum(isinstance(result, BaseException) for result in results)
        return len(firsts) * self.max_tokens / seconds, statistics.median(firsts or [0.0]), errors


def soak(server: Server, requests: int, clients: int) -> None:
    """Memory while many requests come in: growth over the last half, in percent."""
    sizes, errors = [server.memory_mb()], 0
    of_client = math.ceil(requests / clients / 10)
    for _ in range(10):
        errors += server.run(clients, of_client)[2]
        time.sleep(SECONDS_UP)
        sizes.append(server.memory_mb())
    growth = 100 * (sizes[-1] / sizes[len(sizes) // 2] - 1)
    print(f"{10 * of_client * clients} requests of {clients} clients, {errors} errors")
    print(f"memory, MB: {[round(size) for size in sizes]}")
    print(f"growth over the last half: {growth:+.2f} % (held to 2)")


def measure(paths: dict[str, tuple[str, str]], args, arguments: tuple) -> tuple[dict[int, list], int]:
    """The runs of either order, by number of clients; and the tokens that the server of the exit has room for."""
    found: dict[int, list] = {clients: [] for clients in args.clients}
    for order in (["sorted", "plain"], ["plain", "sorted"]):
        with ExitStack() as stack:
            servers = {}
            for i, name in enumerate(order):
                servers[name] = Server(*paths[name], args.port + i, *arguments)
                stack.callback(servers[name].stop)
            room = servers["sorted"].cached_tokens()
            for clients in args.clients:
                runs = []
                for _ in range(args.runs + 1):
                    runs.append({name: server.run(clients, args.requests) for name, server in servers.items()})
                found[clients].append(runs[1:])  # the first is a warm-up
    return found, room


def print_exit(k: int, found: dict[int, list]) -> None:
    """A row for each number of clients."""
    for clients, orders in found.items():
        every = [run for runs in orders for run in runs]
        ours, plain = (statistics.median(run[name][0] for run in every) for name in ("sorted", "plain"))
        ratio = statistics.geometric_mean(
            statistics.median(run["sorted"][0] / run["plain"][0] for run in runs) for runs in orders
        )
        first = statistics.median(run["sorted"][1] for run in every)
        errors = sum(of_server[2] for run in every for of_server in run.values())
        print_row(k, clients, f"{ours:.0f}", f"{plain:.0f}", f"{ratio:.2f}", f"{first:.2f}", errors)


def compare(args, folder: str, arguments: tuple) -> None:
    print(f"{args.runs} runs in turns in either order, after a warm-up; medians; answers of {args.max_tokens} tokens")
    print_head("exit", "clients", "tokens/s", "plain Llama's", "ratio", "first token, s", "errors")
    rooms = {}
    for k in args.exits:
        extract(args.model, k, f"{folder}/plain{k}")
        paths = {"sorted": (args.model, str(k)), "plain": (f"{folder}/plain{k}", "full")}
        found, rooms[k] = measure(paths, args, arguments)
        print_exit(k, found)
    full = args.exits[-1]
    print(f"\nTokens cached in {os.environ['VLLM_CPU_KVCACHE_SPACE']} GiB, and x those of exit {full}:")
    for k, room in rooms.items():
        print(f"exit {k}: {room}, {room / rooms[full]:.2f} (layers: {full / k:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/demo/final")
    parser.add_argument("--exits", type=int, nargs="+", default=[10, 20, 30])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=2, help="of each client in a run")
    parser.add_argument("--max_tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--soak", type=int, help="only this: so many requests of the most clients at the first exit")
    parser.add_argument("--port", type=int, default=8101)
    parser.add_argument("--small", action="store_true", help="a tiny random model: only checks that it runs")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    flags, prompts = [], [row["prompt"] for row in build_facts()[1]]
    with tempfile.TemporaryDirectory() as folder:
        if args.small:
            fields = SMALL | {"num_attention_heads": 2, "num_key_value_heads": 1}  # of a width that vLLM knows
            SortedLlamaForCausalLM(SortedLlamaConfig(**fields, exit_layers=[2, 6])).save_pretrained(f"{folder}/tiny")
            args.model, args.exits, args.clients, args.runs = f"{folder}/tiny", [2, 6], [1, 2], 1
            flags, prompts = ["--skip-tokenizer-init", "--enforce-eager"], [[5, 6, 7]]
        arguments = (prompts, args.max_tokens, flags)
        if args.soak:
            # A cache that is soon used whole: memory that is touched for the first time is no leak
            flags += ["--num-gpu-blocks-override", "128"]
            with ExitStack() as stack:
                server = Server(args.model, str(args.exits[0]), args.port, *arguments)
                stack.callback(server.stop)
                soak(server, args.soak, args.clients[-1])
            return
        compare(args, folder, arguments)


if __name__ == "__main__":
    main()
