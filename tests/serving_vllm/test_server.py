"""vLLM's OpenAI servers, at one exit and at all of them, and under fault."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import APIError, BadRequestError, OpenAI


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from _vllm import at_depth, per_request, start_server, wait_until_up  # noqa: E402

from sorted_llama import SortedLlamaForCausalLM  # noqa: E402
from tests.serving_vllm.engines import expected_tokens, make, random_prompts  # noqa: E402


FLAGS = [
    "--dtype",
    "float32",
    "--max-model-len",
    "64",
    "--max-num-seqs",
    "4",
    "--enforce-eager",
]
PROMPT = [5, 40, 7, 100]


@pytest.fixture
def path(tmp_path):
    make(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def serve(path):
    servers = []

    def serve(*flags: str):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        server = start_server(str(path), port, *FLAGS, *flags)
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


def expected(path, exit_layer, prompt=PROMPT, max_tokens=8):
    model = SortedLlamaForCausalLM.from_pretrained(path)
    return expected_tokens(model, [(prompt, exit_layer)], max_tokens)[0]


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def test_two_servers_and_their_faults(path, serve):
    before = digest(path)
    shallow, client = serve(*at_depth(2))
    _, other = serve()
    assert tokens(client) == expected(path, 2) and tokens(other) == expected(path, 4)
    assert tokens(client, vllm_xargs={"exit_layer": 2}) == expected(path, 2)
    with pytest.raises(BadRequestError, match="`exit_layer` must be 2, the only depth of this server"):
        tokens(client, vllm_xargs={"exit_layer": 1})

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
    _, client = serve(*at_depth(2))
    assert tokens(client) == expected(path, 2)


def test_a_bad_depth_ends_the_start_with_the_allowed_ones(path):
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), *FLAGS, *at_depth(9)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    assert "`exit_layer` must be an integer from 1 to 4, got 9" in run.stdout + run.stderr


def test_a_server_of_all_depths_and_its_requests(path, serve):
    _, client = serve(*per_request([1, 2, 4]))
    depths = [1, 2, 4, None] * 4
    prompts = random_prompts(len(depths), longest=20)

    def asked(exit_layer):
        return {} if exit_layer is None else {"vllm_xargs": {"exit_layer": exit_layer}}

    def whole(prompt, exit_layer):
        return tokens(client, prompt=prompt, max_tokens=30, **asked(exit_layer))

    def streamed(prompt, exit_layer):
        stream = ask(client, stream=True, prompt=prompt, max_tokens=30, **asked(exit_layer))
        return [token for part in stream for token in part.choices[0].token_ids or ()]

    def left(prompt, exit_layer):
        stream = ask(client, stream=True, prompt=prompt, max_tokens=40, **asked(exit_layer))
        next(iter(stream))
        stream.close()

    rows = [expected(path, exit_layer, prompt, 30) for prompt, exit_layer in zip(prompts, depths)]
    with ThreadPoolExecutor(12) as clients:  # more than the server runs at once
        some_leave = [clients.submit(left, *request) for request in zip(prompts[:8], depths)]
        assert list(clients.map(whole, prompts, depths)) == rows
        assert list(clients.map(streamed, prompts, depths)) == rows
        [leaves.result() for leaves in some_leave]

    for bad in (3, 0, "2", 2.0, [2]):
        with pytest.raises(BadRequestError) as refused:
            tokens(client, vllm_xargs={"exit_layer": bad})
        assert f"`exit_layer` must be one of 1, 2, 4, got {bad!r}." in refused.value.message
    chat = {"messages": [{"role": "user", "content": "?"}], "model": "model"}
    with pytest.raises(BadRequestError, match="must be one of 1, 2, 4, got 3"):
        client.chat.completions.create(**chat, extra_body=asked(3))
    answers = [
        client.chat.completions.create(**chat, temperature=0, max_tokens=8, extra_body=asked(k)) for k in (1, 4)
    ]
    assert answers[0].choices[0].message.content != answers[1].choices[0].message.content
    assert whole(prompts[0], depths[0]) == rows[0]
