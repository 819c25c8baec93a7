"""`examples/serve.py`: transformers' server in a process of its own, asked by the real OpenAI client."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI, UnprocessableEntityError

from sorted_llama import SortedLlamaForCausalLM
from tests.tiny import save_tiny, tiny_sorted, tiny_tokenizer


ROOT = Path(__file__).parents[2]
CHAT = [{"role": "user", "content": "count to three"}]


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


def ask(client, path, stream=False, config=json.dumps, **call):
    config = {"generation_config": config({"max_new_tokens": 8, "do_sample": False, **call})}
    reply = client.chat.completions.create(model=path, messages=CHAT, stream=stream, extra_body=config)
    if stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in reply if chunk.choices)
    return reply.choices[0].message.content


def expected(path, **call):
    model, tokenizer = SortedLlamaForCausalLM.from_pretrained(path), tiny_tokenizer()
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, **call)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_each_request_is_answered_at_its_depth(path, serve, capsys):
    with serving(path) as client:
        # What the script says of itself, as it stands but for the address and a model of four layers
        snippet = re.search(r"```python\n(.*?)```", serve.__doc__, re.DOTALL)[1]
        for there, here in (
            ("http://localhost:8000/v1", str(client.base_url)),
            ("out/demo/final", path),
            ('"exit_layer": 10, "max_new_tokens": 64', '"exit_layer": 1, "max_new_tokens": 8'),
        ):
            assert there in snippet
            snippet = snippet.replace(there, here)
        exec(snippet.replace("What is the capital of Peru?", CHAT[0]["content"]), {})
        assert capsys.readouterr().out.rstrip("\n") == expected(path, exit_layer=1).rstrip("\n")
        for call in ({}, {"exit_layer": 1}, {"exit_threshold": 0.5}, {"assistant_early_exit": 1}):
            assert ask(client, path, **call) == expected(path, **call), call
            # Half a character at the end is not streamed
            assert ask(client, path, stream=True, **call) == expected(path, **call).rstrip("\N{REPLACEMENT CHARACTER}")
        assert ask(client, path, exit_layer=1) != ask(client, path)
        with pytest.raises(UnprocessableEntityError) as refused:
            client.chat.completions.create(model=path, messages=CHAT, extra_body={"exit_layer": 1})
        assert "Unexpected fields in the request" in refused.value.response.text
        for stream in (False, True):
            # As an object, what everybody types first
            text = expected(path, exit_layer=2)
            text = text.rstrip("\N{REPLACEMENT CHARACTER}") if stream else text
            assert ask(client, path, stream, config=dict, exit_layer=2) == text
            for given, message in REFUSED:
                with pytest.raises(BadRequestError) as refused:
                    client.chat.completions.create(
                        model=path, messages=CHAT, stream=stream, extra_body={"generation_config": given}
                    )
                told = refused.value.response.json()["error"]["message"]
                assert message in told and "\n" not in told, given
        completion = {"model": path, "prompt": "count", "max_tokens": 8, "temperature": 0}
        texts = [
            client.completions.create(**completion, extra_body={"generation_config": config}).choices[0].text
            for config in ({"exit_layer": 1}, '{"exit_layer": 1}', {})
        ]
        assert texts[0] == texts[1] != texts[2]
        with pytest.raises(BadRequestError, match="unknown fields: 'exit_layr'"):
            client.completions.create(**completion, extra_body={"generation_config": {"exit_layr": 1}})
        with pytest.raises(BadRequestError, match="`generate` does not take"):
            ask(client, path, stop_strings=5)
        assert ask(client, path, exit_layer=1) == expected(path, exit_layer=1)  # it goes on


REFUSED = [
    ({"exit_layer": 9}, "`exit_layer` must be an integer from 1 to 4, got 9"),
    ({"exit_layer": 'a"b'}, "`exit_layer` must be"),
    ({"exit_threshold": [0.5]}, "`exit_threshold` must be a number of at least 0, or a list of 2"),
    ({"exit_threshold": -0.5}, "`exit_threshold` must be a number of at least 0"),
    ({"exit_threshold": 0.5, "assistant_early_exit": 1}, "contradict each other"),
    ({"exit_layr": 1}, "unknown fields: 'exit_layr'"),
    ({"exit_agreement": 0.5}, "unknown fields: 'exit_agreement'"),
    ({"exit_layer": "auto"}, '`exit_layer="auto"` was removed'),
    ({"_from_model_config": True, "exit_layer": 9}, "`exit_layer` must be an integer from 1 to 4, got 9"),
    ({"max_new_tokens": "ten"}, "`max_new_tokens` of `generation_config` must be an integer, got 'ten'"),
    ({"do_sample": "false"}, "`do_sample` of `generation_config` must be true or false, got 'false'"),
    ({"temperature": True}, "`temperature` of `generation_config` must be a number, got True"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0"),
    ({"pad_token_id": "x"}, "a value of a wrong type"),
    ('{"exit_layer": 1', "or a JSON string of one, got '{\"exit_layer\": 1'"),
    ('["exit_layer", 1]', "must be an object like"),
    ([1], "must be an object like"),
    (10, "must be an object like"),
    ("null", "must be an object like"),
]


def test_continuous_batching_refuses_another_depth(path):
    flags = ["--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "64"]
    with serving(path, *flags) as client:
        assert ask(client, path) == expected(path)
        for call in ({"exit_layer": 1}, {"exit_threshold": 0.5}):
            with pytest.raises(BadRequestError, match="Continuous batching runs all requests .* cannot honour"):
                ask(client, path, **call)
        assert ask(client, path, exit_layer=4) == expected(path)


@pytest.fixture
def taken():
    """A port that somebody else listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def start(serve, force_model=None, port=0, host="localhost"):
    """`serve.py` by its flags, in this process; it must end before a model is loaded."""
    with pytest.raises(SystemExit) as ended:
        serve.serve(force_model=force_model, host=host, port=port)
    assert "\n" not in str(ended.value)
    return str(ended.value)


def test_the_server_ends_in_one_line_before_a_model_is_loaded(serve, path, tmp_path, taken, monkeypatch):
    monkeypatch.setattr(serve, "Serve", lambda **_: pytest.fail("a model is loaded"))
    plain = save_tiny(tmp_path / "plain")
    assert f"'{tmp_path}/nowhere'` is no folder here" in start(serve, f"{tmp_path}/nowhere")
    assert f"{plain} is no sorted Llama but a LlamaForCausalLM" in start(serve, plain)
    assert f"Port {taken} of localhost cannot be used" in start(serve, path, taken)
    assert "Port 0 of nowhere.invalid cannot be used: " in start(serve, path, host="nowhere.invalid")
    assert "from 0 to 65535, got 70000" in start(serve, path, 70000)
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    assert 'pip install -e ".[serve]"' in start(serve, path)


def test_a_server_whose_weights_are_missing_ends_in_one_line(serve, tmp_path):
    folder = Path(save_tiny(tmp_path, tiny_sorted()))
    (folder / "model.safetensors").unlink()
    assert "no file named model.safetensors" in start(serve, str(folder))


@pytest.mark.parametrize(
    "edit, message",
    [
        (None, "is no folder here, and the Hub gives no such model"),
        ("remove", "must be the folder of a checkpoint, with a config.json"),
        ("{", "is not a valid JSON file"),
        ("[]", "its config.json is none of a Llama"),
        ({"model_type": "gpt2"}, "holds a model of type 'gpt2': a sorted model is made from"),
        ({"exit_layers": [3, 2]}, "ascending and ending in the full depth"),
        ({"num_hidden_layers": "four"}, "'num_hidden_layers'"),
    ],
)
def test_a_checkpoint_that_is_none_is_told_in_one_line(serve, tmp_path, edit, message):
    folder = tmp_path / "model"
    if edit is not None:
        tiny_sorted().config.save_pretrained(folder)
        file = folder / "config.json"
        if isinstance(edit, dict):
            file.write_text(json.dumps({**json.loads(file.read_text()), **edit}))
        elif edit == "remove":
            file.unlink()
        else:
            file.write_text(edit)
    told = start(serve, str(folder))
    assert message in told and str(folder) in told


def test_a_model_of_the_hub_without_a_network_is_told_in_one_line(serve, offline):
    assert "'user/nothing'` is no folder here, and the Hub gives " in start(serve, "user/nothing")
