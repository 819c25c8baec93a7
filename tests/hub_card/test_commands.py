"""What is wrong with a command is told in one line, before a model is loaded."""

import json
import shutil
from functools import partial

import pytest
from lm_eval.tasks import TaskManager

from sorted_llama.hub_card import evaluation, harness
from sorted_llama.hub_card.checkpoint import check_device
from sorted_llama.hub_card.commands import main
from tests.tiny import save_tiny, tiny_sorted


FILES = {
    "empty.json": b"",
    "empty.jsonl": b"",
    "empty.csv": b"",
    "empty.parquet": b"",
    "broken.json": b"{bad",
    "broken.jsonl": b'{"prompt": "a", "completion": "b"}\n{bad',
    "broken.parquet": b"PAR1",
    "bytes.jsonl": b"\xff\xfe",
    "number.json": b"5",
    "rows.txt": b"hello",
}
ROWS = {
    "numbers": ({"prompt": 1, "completion": 2}, "completions", "must both be text, or both lists of chat messages"),
    "mixed": ({"prompt": "a", "completion": [{"role": "a", "content": "b"}]}, "completions", "must both be text"),
    "no messages": ({"prompt": [], "completion": []}, "completions", "must both be text"),
    "no question": ({"question": ["a"], "answer": "b"}, "qa", "`question` must be text"),
    "no number": ({"question": "a", "answer": "four"}, "gsm8k", "must end in `#### ` and a number, got 'four'"),
}
TASK = {"task": "t", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test"}
YAMLS = {
    "no yaml": "a: [1",
    "no task": "5",
    "no data": json.dumps({**TASK, "dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}),
    "no kind": json.dumps({**TASK, "output_type": "guess"}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("saved") / "model", tiny_sorted(exit_layers=[1, 2, 4]))


@pytest.fixture
def folder(saved, tmp_path, monkeypatch, offline):
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "load_model", None)
    monkeypatch.setattr(
        harness, "TaskManager", partial(TaskManager, include_defaults=False)
    )  # else thousands of files
    return tmp_path


def told(*command):
    with pytest.raises(SystemExit) as raised:
        main([str(argument) for argument in command])
    message = str(raised.value)
    assert len(message.splitlines()) == 1 and len(message) > 20, message
    return message


@pytest.mark.parametrize("file", [*FILES, "not_there.jsonl", "somewhere/not_there.csv"])
def test_data_that_cannot_be_read_is_told(folder, file):
    if file in FILES:
        (folder / file).write_bytes(FILES[file])
    message = told("evaluate", "model", "--data", f"completions={file}")
    assert file in message and ("could not be read: " in message or "The file" in message)


@pytest.mark.parametrize("source", ["user/name", "name", "a/b/c"])
def test_data_of_the_hub_out_of_reach_is_told(folder, source):
    message = told("evaluate", "model", "--data", f"qa={source}")
    assert f"'{source}' is no file here, and from the Hub it could not be read: " in message


@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_something_else_are_told(folder, rows):
    row, kind, expected = ROWS[rows]
    (folder / "rows.jsonl").write_text(json.dumps(row))
    message = told("evaluate", "model", "--data", f"{kind}=rows.jsonl")
    assert "Row 0 of 'rows.jsonl'" in message and expected in message


@pytest.mark.parametrize("task", YAMLS)
def test_a_task_that_is_broken_is_told(folder, task):
    (folder / "task.yaml").write_text(YAMLS[task])
    assert "The task 'task.yaml' could not be made: " in told("evaluate", "model", "--tasks", "task.yaml")


def test_a_tokenizer_that_does_not_fit_is_told(folder):
    (folder / "chat.jsonl").write_text(
        json.dumps({role: [{"role": "user", "content": "a"}] for role in ("prompt", "completion")})
    )
    (folder / "model" / "chat_template.jinja").unlink()
    assert "`chat` asks" in told("evaluate", "model", "--data", "completions=good.jsonl", "--chat")
    assert "Row 0 of 'chat.jsonl': It is a chat" in told("evaluate", "model", "--data", "completions=chat.jsonl")
    config = json.loads((folder / "model" / "tokenizer_config.json").read_text())
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    assert "has no end-of-text token" in told("evaluate", "model", "--data", "completions=good.jsonl")
    (folder / "model" / "tokenizer.json").write_text("{bad")
    assert "The tokenizer of 'model' could not be loaded" in told(
        "evaluate", "model", "--data", "completions=good.jsonl"
    )


CONFIGS = {
    "no folder": (None, "`path='model'` is no folder here"),
    "no config": ({}, "must be the folder of a checkpoint"),
    "an adapter": ({"adapter_config.json": "{}"}, "holds an adapter: merge it"),
    "empty": ({"config.json": ""}, "not a valid JSON file"),
    "a list": ({"config.json": "[]"}, "its config.json is none of a Llama"),
    "a number": ({"config.json": "5"}, "its config.json is none of a Llama"),
    "wrong type": ({"config.json": '{"num_hidden_layers": "4"}'}, "num_hidden_layers"),
    "another model": ({"config.json": '{"model_type": "gpt2"}'}, "holds a model of type 'gpt2'"),
    "another depth": ({"config.json": '{"num_hidden_layers": 2, "exit_layers": [1, 4]}'}, "from 1 to 2"),
}


@pytest.mark.parametrize(
    "command, config",
    [("extract", config) for config in CONFIGS]
    + [(command, config) for command in ("evaluate", "card", "push", "judge") for config in ("no folder", "a list")]
    + [(command, "an adapter") for command in ("card", "push")],
)
def test_a_checkpoint_that_is_none_is_told(folder, monkeypatch, command, config):
    files, expected = CONFIGS[config]
    shutil.rmtree(folder / "model")
    if files is not None:
        (folder / "model").mkdir()
        for name, content in files.items():
            (folder / "model" / name).write_text(content)
    options = {
        "evaluate": ["--data", "completions=good.jsonl", "--output", "out.json"],
        "push": ["user/name"],
        "judge": ["--exits", 1, 4, "--data", "completions=good.jsonl", "--judge", "m", "--base_url", "http://[::1]:1"],
        "extract": ["out", "--exit", 1],
    }
    message = told(command, "model", *options.get(command, []))
    folders_only = config in ("no folder", "an adapter") and command in ("card", "push")
    assert ("must be the folder of a checkpoint" if folders_only else expected) in message
    assert not (folder / "out").exists() and not (folder / "model" / "README.md").exists()


def test_a_model_of_the_hub_out_of_reach_is_told(folder):
    assert "`path='user/name'` is no folder here, and the Hub gives no such model" in told(
        *("extract", "user/name", "out", "--exit", 1)
    )
    assert "must be the folder" in told("card", "user/name") and "must be the folder" in told(
        "push", "user/name", "a/b"
    )


@pytest.mark.parametrize("content", ["", "{bad", "[]", '{"schema_version": 1}'])
def test_an_evaluation_that_is_broken_is_told(folder, content):
    (folder / "model" / "evaluation.json").write_text(content)
    for command in (["card", "model"], ["push", "model", "user/name"], ["extract", "model", "out", "--exit", 1]):
        assert "model/evaluation.json" in told(*command)
    assert "model/evaluation.json" in told("evaluate", "model", "--data", "completions=good.jsonl")
    (folder / "model" / "evaluation.json").unlink()
    assert "'nowhere.json' could not be read: No such file" in told("card", "model", "--evaluation", "nowhere.json")
    assert "'nowhere.json' could not be read" in told("card", "model", "--peers", "a=nowhere.json")
    assert not (folder / "model" / "README.md").exists() and not (folder / "out").exists()


@pytest.mark.parametrize(
    "file, content, expected",
    [
        ("model.safetensors", "no weights", "The weights of 'model' could not be read"),
        ("model.safetensors.index.json", "{bad", "is no index of weights"),
        ("model.safetensors.index.json", "{}", "is no index of weights"),
        ("README.md", "---\n- 1\n---\n", "README.md' could not be read"),
        ("tokenizer.json", "{bad", "The tokenizer of 'model' could not be loaded"),
    ],
)
def test_an_extraction_of_what_is_broken_is_told(folder, file, content, expected):
    (folder / "model" / file).write_text(content)
    assert expected in told("extract", "model", "out", "--exit", 2)
    assert not (folder / "out").exists()


def test_a_device_that_is_not_there_is_told():
    check_device(None)
    check_device("cpu")
    for device in ("cuda:99", "gpu", "meta", ""):
        with pytest.raises(ValueError, match=f"`device` must be one that torch finds here, got '{device}'"):
            check_device(device)


def test_a_push_without_a_network_changes_nothing(folder):
    assert told("push", "model", "user/name").startswith("The push to 'user/name' failed: ")
    assert not (folder / "model" / "README.md").exists()


def test_a_bug_shows_where_it_is(folder, monkeypatch):
    monkeypatch.setattr("sorted_llama.hub_card.card.write_card", lambda *path, **options: [][0])
    with pytest.raises(IndexError):
        main(["card", "model"])
