"""The file of an evaluation: what is broken is told by its field, and what was written before can still be read."""

import json
import math
import subprocess

import pytest

import sorted_llama.hub_card.record as record_module
from sorted_llama.hub_card.card import write_card
from sorted_llama.hub_card.record import check_record, load_evaluation
from sorted_llama.modeling_sorted_llama import SortedLlamaConfig
from tests.hub_card.records import EXITS, TASK, make_record


def at(record, path):
    *way, last = path
    for key in way:
        record = record[key]
    return record, last


SCORE = ("tasks", TASK, "settings", "exit 4", "exact_match")
WRONG = [
    (SCORE, math.nan, "`tasks.trivia.settings.exit 4.exact_match` must be a number from 0 to 1, got nan"),
    (SCORE, math.inf, "got inf"),
    (SCORE, 10**400, "must be a number from 0 to 1, got 1000"),
    (SCORE, "0.5", "got '0.5'"),
    (SCORE, None, "got None"),
    (SCORE, True, "got True"),
    (SCORE, 1.5, "from 0 to 1, got 1.5"),
    (("tasks", TASK, "metric"), "bleu", "`tasks.trivia.settings.exit 1.bleu` is missing"),
    (("tasks", TASK, "exits", "2", "loss"), math.nan, "`tasks.trivia.exits.2.loss` must be a finite number, got nan"),
    (("tasks", TASK, "exits"), {}, "`tasks.trivia.exits.1` is missing"),
    (("tasks", TASK, "settings"), [], r"`tasks.trivia.settings` must be an object, got \[\]"),
    (("tasks", TASK, "settings"), {"exit one": {}}, "its key` must be the name of a setting, .*got 'exit one'"),
    (("speed", "exit 4", "median"), 0, "`speed.exit 4.median` must be a number above 0, got 0"),
    (("speed", "exit 4"), None, "`speed.exit 4` must be an object, got None"),
    (("speed",), {}, "`speed.exit 1` is missing"),
    (("tasks",), {}, "`tasks` or `request.timed.prompts` is empty"),
    (("request", "timed", "prompts"), 0, "`tasks` or `request.timed.prompts` is empty"),
    (("request", "exit_layers"), [2, 1, 4], "request.exit_layers` must be a list of integers"),
    (("request", "exit_layers"), [1, 2, 10**400], r"`request.exit_layers\[2\]` must be an integer"),
    (("request", "tasks", TASK, "rows"), 1.5, "`request.tasks.trivia.rows` must be an integer"),
    (("exits", "1", "flops"), -1, "`exits.1.flops` must be an integer"),
    (("exits",), {}, "`exits.4` is missing"),
    (("made_by", "date"), 5, "`made_by.date` must be text, got 5"),
    (("made_by",), None, "`made_by` must be an object, got None"),
    (("harness",), {"a": {"a": {"1": {"acc": math.nan}}}}, "`harness.a.a.1.acc` must be a finite number"),
    (("harness",), [], "`harness` must be an object"),
    (("peers",), {"other": {}}, "`peers.other.request` is missing|peers.other.`request` is missing"),
    (("schema_version",), None, "schema version None"),
]


@pytest.mark.parametrize("path, value, message", WRONG, ids=[f"{'.'.join(p)}={str(v)[:20]}" for p, v, _ in WRONG])
def test_a_wrong_field_of_the_file_is_named(tmp_path, path, value, message):
    record = make_record()
    holder, key = at(record, path)
    holder[key] = value
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message) as raised:
        load_evaluation(tmp_path)
    assert "evaluation.json" in str(raised.value) and len(str(raised.value)) < 500


def test_no_page_is_made_of_a_broken_file(tmp_path):
    SortedLlamaConfig(num_hidden_layers=4, exit_layers=EXITS).save_pretrained(tmp_path)
    record = make_record()
    record["tasks"][TASK]["exits"]["2"]["loss"] = math.nan
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="evaluation.json': `tasks.trivia.exits.2.loss` must be a finite number"):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists() and not (tmp_path / "quality_speed.png").exists()


@pytest.mark.parametrize("path", [p for p in map(lambda wrong: wrong[0], WRONG) if p != ("peers",)], ids=".".join)
def test_a_missing_field_of_the_file_is_named_or_not_needed(tmp_path, path):
    SortedLlamaConfig(num_hidden_layers=4, exit_layers=EXITS).save_pretrained(tmp_path)
    record = make_record()
    holder, key = at(record, path)
    del holder[key]
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    try:
        write_card(tmp_path)
    except ValueError as error:
        assert "is missing" in str(error) or "schema version" in str(error) or "is empty" in str(error)  # noqa: PT017
    else:
        assert "exit_layer=4" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "null", '{"schema_version": 1}', b"\xff\xfe", "[" * 10**5])
def test_a_file_of_something_else_is_no_evaluation(tmp_path, content):
    (tmp_path / "evaluation.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="evaluation.json"):
        load_evaluation(tmp_path)


def test_an_evaluation_that_is_not_there_is_told():
    with pytest.raises(ValueError, match="nowhere.json' could not be read: No such file"):
        load_evaluation("nowhere.json")


def test_a_whole_evaluation_is_right():
    check_record(make_record())


def test_a_task_whose_name_ends_like_a_field_that_may_be_missing_is_checked():
    record = make_record("what?")
    del record["tasks"]["what?"]["exits"]["2"]["reliability"]
    with pytest.raises(ValueError, match=r"`tasks.what\?.exits.2.reliability` is missing"):
        check_record(record)


def test_an_evaluation_of_a_later_schema_is_not_read(tmp_path):
    (tmp_path / "evaluation.json").write_text('{"schema_version": 2}')
    with pytest.raises(ValueError, match="schema version 2, this version reads 1"):
        load_evaluation(tmp_path)


def test_the_revision_is_of_the_repository_that_holds_the_package(tmp_path, monkeypatch):
    """Not of the one in whose environment it was installed, nor of one that a hook of git names."""

    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    package = tmp_path / ".venv" / "hub_card"
    package.mkdir(parents=True)
    (package / "record.py").write_text("")
    monkeypatch.setattr(record_module, "__file__", str(package / "record.py"))
    git("commit", "-q", "--allow-empty", "-m", "theirs")
    assert record_module._git_revision() is None
    git("add", "-f", ".venv")
    git("commit", "-q", "-m", "ours")
    assert record_module._git_revision() == git("rev-parse", "HEAD")
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other"))
    revision = record_module._git_revision()
    monkeypatch.delenv("GIT_DIR")
    assert revision == git("rev-parse", "HEAD")


CERTIFICATE = {
    "data": {"name": "rows"},
    "loss": "differs",
    "risk": 0.05,
    "delta": 0.05,
    "tested_on": 200,
    "tested": [{"setting": "threshold [2, 0.9]", "mean_loss": 0.01, "p_value": 0.02}],
    "setting": "threshold [2, 0.9]",
    "speed_up": 1.2,
    "weights": "0",
    "config": "0",
    "tokenizer": "0",
    "chat_template": "0",
    "dtype": "float32",
    "device": "cpu",
    "decoding": {"max_new_tokens": 5},
}
WRONG_CERTIFICATES = [
    ({"setting": "threshold high"}, r"`certificates\[0\].setting` must be the name of a setting"),
    ({"risk": 5}, r"`certificates\[0\].risk` must be a number from 0 to 1, got 5"),
    ({"tested": [{"setting": "exit 1", "mean_loss": 0.0}]}, r"`certificates\[0\].tested\[0\].p_value` is missing"),
    ({"speed_up": 0}, r"`certificates\[0\].speed_up` must be a number above 0"),
    ({"decoding": {}}, r"`certificates\[0\].decoding.max_new_tokens` is missing"),
    ({"weights": None}, r"`certificates\[0\].weights` must be text"),
    ({"dtype": "nn"}, r"`certificates\[0\].dtype` must be float32, float16 or bfloat16, got 'nn'"),
]


@pytest.mark.parametrize("fields, message", WRONG_CERTIFICATES, ids=str)
def test_a_wrong_field_of_a_certificate_is_named(fields, message):
    check_record({**make_record(), "certificates": [CERTIFICATE]})
    with pytest.raises(ValueError, match=message):
        check_record({**make_record(), "certificates": [{**CERTIFICATE, **fields}]})
