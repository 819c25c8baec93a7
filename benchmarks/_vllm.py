"""vLLM's OpenAI server of a checkpoint, and clients that ask it."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from openai import AsyncOpenAI


def per_request(exit_layers: list[int]) -> list[str]:
    """Flags of a server that takes one of these depths from each request; the last one is full depth."""
    served = json.dumps({"exit_layers": exit_layers})
    return ["--additional-config", json.dumps({"exit_layer": "request"}), "--hf-overrides", served]


def at_depth(exit_layer: int) -> list[str]:
    """Flags of a server of one depth."""
    return ["--hf-overrides", json.dumps({"exit_layer": exit_layer})]


def start_server(path: str, port: int, *flags: str, name: str = "model", cores: str = "") -> subprocess.Popen:
    """vLLM's OpenAI server, on the cores of that number or on all; what it prints goes where this process prints."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path, "--port", str(port)]
    environment = {**os.environ, **({"VLLM_CPU_OMP_THREADS_BIND": cores} if cores else {})}
    return subprocess.Popen([*command, "--served-model-name", name, *flags], env=environment)


def wait_until_up(server: subprocess.Popen, port: int) -> None:
    """Wait for a server's first sign of health; `RuntimeError` if it ends before."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health")
            return
        except urllib.error.URLError:
            time.sleep(0.2)
    raise RuntimeError(f"The server on port {port} ended with status {server.returncode}: see what it printed.")


class Answer(NamedTuple):
    """What came back: the tokens, and when each came, in seconds of `time.perf_counter`."""

    asked_at: float
    arrivals: list[float]
    tokens: list[int]


class Server:
    """A vLLM server that is up."""

    def __init__(self, path: str, port: int, *flags: str, cores: str = ""):
        self.url = f"http://localhost:{port}"
        self.process = start_server(path, port, *flags, cores=cores)
        wait_until_up(self.process, port)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait()

    def metrics(self) -> dict[str, float]:
        """What the server counts, by name; its labels are left out."""
        text = urllib.request.urlopen(f"{self.url}/metrics").read().decode()
        return {name: float(value) for name, value in re.findall(r"^([\w:]+)(?:{.*})? (\S+)$", text, re.MULTILINE)}

    def cached_tokens(self) -> int:
        """Tokens of full depth that there is room for."""
        text = urllib.request.urlopen(f"{self.url}/metrics").read().decode()
        (line,) = re.findall(r"^vllm:cache_config_info{(.*)}", text, re.MULTILINE)
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


def client_of(server: Server) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600)


async def ask(
    client: AsyncOpenAI, prompt: str | list[int], max_tokens: int, exit_layer: int | None = None, stop_after: int = 0
) -> Answer:
    """A streamed greedy answer, at that depth or the server's own; hung up on after `stop_after` tokens."""
    fields: dict = {"ignore_eos": True, "return_token_ids": True}
    if exit_layer is not None:
        fields["vllm_xargs"] = {"exit_layer": exit_layer}
    answer = Answer(time.perf_counter(), [], [])
    stream = await client.completions.create(
        model="model", prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True, extra_body=fields
    )
    async for chunk in stream:
        tokens = chunk.choices[0].token_ids or []
        answer.tokens.extend(tokens)
        answer.arrivals.extend([time.perf_counter()] * len(tokens))
        if stop_after and len(answer.tokens) >= stop_after:
            await stream.close()
            break
    return answer


async def ask_all(server: Server, jobs: list[dict], clients: int, keep_errors: bool = False) -> list:
    """The answers to `jobs`, each the arguments of [`ask`], so many at once; errors are raised, or in their places."""
    limit = asyncio.Semaphore(clients)
    async with client_of(server) as client:

        async def one(job: dict) -> Answer:
            async with limit:
                return await ask(client, **job)

        return await asyncio.gather(*map(one, jobs), return_exceptions=keep_errors)


class Load(NamedTuple):
    """What clients ask of a server: how many at once, and for which depth."""

    server: Server
    clients: int
    exit_layer: int | None = None


class Throughput(NamedTuple):
    """What the clients of a load got."""

    tokens_per_second: float
    gaps: list[float]  # seconds between two tokens of an answer
    firsts: list[float]  # seconds to the first token
    errors: int


def run_loads(loads: list[Load], prompts: list, max_tokens: int, seconds: float) -> list[Throughput]:
    """All loads at once: each client asks again as soon as it is answered; counted is what arrives in the time."""
    return asyncio.run(_run_loads(loads, prompts, max_tokens, seconds))


async def _run_loads(loads: list[Load], prompts: list, max_tokens: int, seconds: float) -> list[Throughput]:
    start = time.perf_counter() + 0.5  # all are at work by then
    end = start + seconds

    async def one(client: AsyncOpenAI, number: int, exit_layer: int | None) -> list[Answer | Exception]:
        answers: list[Answer | Exception] = []
        while time.perf_counter() < end:
            prompt = prompts[(number + len(answers)) % len(prompts)]
            try:
                answers.append(await ask(client, prompt, max_tokens, exit_layer))
            except Exception as error:
                answers.append(error)
        return answers

    async def of_load(load: Load) -> Throughput:
        async with client_of(load.server) as client:
            of_clients = await asyncio.gather(*(one(client, 7 * i, load.exit_layer) for i in range(load.clients)))
        answers = [answer for of_client in of_clients for answer in of_client if isinstance(answer, Answer)]
        errors = sum(len(of_client) for of_client in of_clients) - len(answers)
        arrivals = [at for answer in answers for at in answer.arrivals]
        gaps = [b - a for answer in answers for a, b in zip(answer.arrivals, answer.arrivals[1:]) if start <= a <= end]
        firsts = [answer.arrivals[0] - answer.asked_at for answer in answers if answer.arrivals]
        return Throughput(sum(start <= at <= end for at in arrivals) / seconds, gaps, firsts, errors)

    return await asyncio.gather(*map(of_load, loads))
