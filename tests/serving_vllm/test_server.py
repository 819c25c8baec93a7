"""vLLM's OpenAI server at an exit, under fault."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from openai import APIError, BadRequestError, OpenAI


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from _vllm import start_server, wait_until_up  # noqa: E402
from test_vllm_sorted_llama import make  # noqa: E402


FLAGS = [
    "--dtype",
    "float32",
    "--max-model-len",
    "64",
    "--max-num-seqs",
    "4",
    "--enforce-eager",
    "--skip-tokenizer-init",
]
PROMPT = [5, 40, 7, 100]


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def serve(path):
    servers = []

    def serve(depth: str):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        server = start_server(str(path), depth, port, *FLAGS, name="model")
        servers.append(server)
        wait_until_up(server, port)
        return server, OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=60)

    yield serve
    for server in servers:
        server.terminate()
    for server in servers:
        server.wait()


def ask(client, stream=False, max_tokens=8, prompt=PROMPT, **fields):
    fields = {"ignore_eos": True, "return_token_ids": True, **fields}
    return client.completions.create(
        model="model", prompt=prompt, max_tokens=max_tokens, temperature=0, stream=stream, extra_body=fields
    )


def tokens(client, **options):
    return ask(client, **options).choices[0].token_ids


def expected(path, exit_layer):
    from sorted_llama import SortedLlamaForCausalLM

    model = SortedLlamaForCausalLM.from_pretrained(path)
    inputs = torch.tensor([PROMPT])
    found = model.generate(inputs, exit_layer=exit_layer, max_new_tokens=8, do_sample=False, eos_token_id=None)
    return found[0, len(PROMPT) :].tolist()


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def test_two_servers_and_their_faults(path, serve):
    before = digest(path)
    shallow, client = serve("2")
    _, other = serve("full")
    assert tokens(client) == expected(path, 2) and tokens(other) == expected(path, 4)
    # A field that the server does not know is passed over: a depth is the server's, not the request's
    assert tokens(client, exit_layer=1) == expected(path, 2)

    stream = ask(client, stream=True, max_tokens=50)
    next(iter(stream))
    stream.close()
    with pytest.raises(BadRequestError, match="64"):
        tokens(client, prompt=PROMPT * 20)
    assert tokens(client) == expected(path, 2)

    streams = [ask(client, stream=True, max_tokens=60) for _ in range(4)]
    failed = []

    def read(stream):
        try:
            if sum(1 for _ in stream) < 60:
                failed.append("cut off")
        except Exception as error:
            failed.append(error)

    for stream in streams:
        next(iter(stream))
    threads = [threading.Thread(target=read, args=(stream,)) for stream in streams]
    subprocess.run(["pkill", "-KILL", "-P", str(shallow.pid)], check=True)
    os.kill(shallow.pid, signal.SIGKILL)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert failed
    with pytest.raises(APIError):
        tokens(client)
    assert tokens(other) == expected(path, 4)
    assert digest(path) == before
    _, client = serve("2")
    assert tokens(client) == expected(path, 2)


def test_a_bad_depth_ends_the_start_with_the_allowed_ones(path):
    command = [sys.executable, "-c", "import sys; from _vllm import start_server; "]
    command[-1] += f"sys.exit(start_server({str(path)!r}, '9', 1, *{FLAGS!r}).wait())"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    assert "`exit_layer` must be an integer from 1 to 4, got 9" in run.stdout + run.stderr
