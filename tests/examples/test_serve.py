"""`examples/serve.py`: transformers' server in a process of its own, asked by the real OpenAI client."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from openai import APIError, BadRequestError, OpenAI, UnprocessableEntityError

from modeling_sorted_llama import SortedLlamaForCausalLM
from tests.tiny import save_tiny, tiny_sorted, tiny_tokenizer


ROOT = Path(__file__).parents[2]
CHAT = [{"role": "user", "content": "count to three"}]
pytestmark = pytest.mark.slow


@contextmanager
def serving(path, *flags):
    """A client of a server that is up."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), str(path), "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen([*command, *flags], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            if server.poll() is not None:
                pytest.fail(server.stderr.read())
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health")
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=60)
    finally:
        server.kill()
        server.communicate()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("serve") / "model", tiny_sorted(exit_layers=[1, 2, 4]))


def ask(client, path, stream=False, **call):
    config = {"generation_config": json.dumps({"max_new_tokens": 8, "do_sample": False, **call})}
    reply = client.chat.completions.create(model=path, messages=CHAT, stream=stream, extra_body=config)
    if stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in reply if chunk.choices)
    return reply.choices[0].message.content


def expected(path, **call):
    model, tokenizer = SortedLlamaForCausalLM.from_pretrained(path), tiny_tokenizer()
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, **call)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_each_request_has_its_depth(path):
    with serving(path) as client:
        for call in ({}, {"exit_layer": 1}, {"exit_threshold": 0.5}, {"assistant_early_exit": 1}):
            assert ask(client, path, **call) == expected(path, **call), call
            # Half a character at the end is not streamed
            assert ask(client, path, stream=True, **call) == expected(path, **call).rstrip("\N{REPLACEMENT CHARACTER}")
        assert ask(client, path, exit_layer=1) != ask(client, path)
        with pytest.raises(BadRequestError, match="`exit_layer` must be an integer from 1 to 4, got 9"):
            ask(client, path, exit_layer=9)
        with pytest.raises(APIError) as refused:
            ask(client, path, stream=True, exit_layer=9)
        assert "`exit_layer` must be an integer from 1 to 4, got 9" in str(refused.value.body)
        with pytest.raises(UnprocessableEntityError) as refused:
            client.chat.completions.create(model=path, messages=CHAT, extra_body={"exit_layer": 1})
        assert "Unexpected fields in the request" in refused.value.response.text
        assert ask(client, path, exit_layer=1) == expected(path, exit_layer=1)  # it goes on


def test_continuous_batching_refuses_another_depth(path):
    flags = ["--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "64"]
    with serving(path, *flags) as client:
        assert ask(client, path) == expected(path)
        for call in ({"exit_layer": 1}, {"exit_threshold": 0.5}):
            with pytest.raises(BadRequestError, match="Continuous batching runs all requests .* cannot honour"):
                ask(client, path, **call)
        assert ask(client, path, exit_layer=4) == expected(path)


def test_servers_of_several_depths(tmp_path, monkeypatch, capsys):
    """`examples/serve_depths.py`, without vLLM: what it starts, and where LiteLLM is told to look."""
    started = []

    class Server:
        def poll(self):
            return None

        def terminate(self):
            started.append("stopped")

        def wait(self):
            pass

    def start_server(*arguments, **options):
        started.append((arguments, options))
        return Server()

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import serve_depths

    monkeypatch.setattr(serve_depths, "start_server", start_server)
    monkeypatch.setattr(serve_depths, "wait_until_up", lambda server, port: None)
    monkeypatch.setattr(serve_depths.time, "sleep", interrupt)
    monkeypatch.setattr(serve_depths.signal, "signal", lambda *_: None)
    path = str(save_tiny(tmp_path / "final"))
    flags = ["--max-model-len", "512", "--enforce-eager"]
    monkeypatch.setattr(sys, "argv", ["serve_depths.py", path, "--depths", "10", "full", "--port", "9000", *flags])
    serve_depths.main()
    assert started == [
        ((path, "10", 9000, *flags), {"name": "final@10"}),
        ((path, "full", 9001, *flags), {"name": "final@full"}),
        "stopped",
        "stopped",
    ]
    routes = yaml.safe_load((tmp_path / "final.litellm.yaml").read_text())["model_list"]
    assert [route["model_name"] for route in routes] == ["final@10", "final@full"]
    assert routes[1]["litellm_params"]["model"] == "openai/final@full"
    assert routes[1]["litellm_params"]["api_base"] == "http://localhost:9001/v1"
    assert "LITELLM_MASTER_KEY=" in capsys.readouterr().out
    for arguments, message in (
        ([path, "--depths", "ten"], "must be a number of layers or \"full\", got 'ten'"),
        (["--max-model-len", "512", path], "the path of the checkpoint comes first"),
    ):
        monkeypatch.setattr(sys, "argv", ["serve_depths.py", *arguments])
        with pytest.raises(SystemExit):
            serve_depths.main()
        assert message in capsys.readouterr().err
    # A model of the Hub: the routes are in the folder where one is
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["serve_depths.py", "user/hub-model", "--depths", "3"])
    serve_depths.main()
    assert (tmp_path / "hub-model.litellm.yaml").is_file()
