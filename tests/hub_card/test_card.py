"""What comes from outside, in the page: text stays text, and a broken evaluation is told by its field."""

import json
import math
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sorted_llama.hub_card.card import exits_block, write_card
from sorted_llama.hub_card.extract import _scores
from sorted_llama.hub_card.record import check_record, load_evaluation
from sorted_llama.modeling_sorted_llama import SortedLlamaConfig
from sorted_llama.trainer.escaping import one_line
from tests.hub_card.records import EXITS, TASK, make_record
from tests.trainer.test_escaping import AWKWARD, MARK, PARSER, inline, shown


@pytest.fixture
def folder(tmp_path):
    SortedLlamaConfig(num_hidden_layers=4, exit_layers=list(EXITS)).save_pretrained(tmp_path)
    return tmp_path


def page_of(folder, record, **options):
    (folder / "evaluation.json").write_text(json.dumps(record))
    write_card(folder, **options)
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("name", AWKWARD[:-1], ids=ascii)  # the last one no file system gives
def test_a_name_in_the_page_is_text(folder, name):
    record, harmless = make_record(name, command=f"python {name}", machine=name), make_record()
    record["harness"] = {name: {name: {str(k): {f"{name},none": 0.5} for k in EXITS}}}
    harmless["harness"] = {TASK: {TASK: {str(k): {"x,none": 0.5} for k in EXITS}}}
    record["peers"] = {name: make_record(name, machine=name)}
    harmless["peers"] = {"peer": make_record()}
    page = page_of(folder, record)
    assert page_of(folder, record) == page and page_of(folder, make_record()) != page
    assert page_of(folder, record) == page, "the page neither grows nor keeps anything"
    ours, theirs = (PARSER.parse(text.split("\n---\n", 1)[1]) for text in (page, page_of(folder, harmless)))
    assert [token.type for token in ours] == [token.type for token in theirs], "the blocks are those of any name"
    texts = ["".join(child.content for child in children if "text" in child.type) for children in inline(page)]
    assert f"{one_line(name)}: exact match" in texts and f"{one_line(name)}: loss" in texts
    assert yaml.safe_load(page.split("\n---\n")[0].removeprefix("---\n"))["tags"]


@settings(max_examples=50, deadline=None)
@given(st.text().filter(one_line))
def test_any_name_in_a_table_is_one_cell(name):
    for header in (exits_block(make_record(name), list(EXITS), False), "\n".join(_scores(make_record(name), 1))):
        tables = [token for token in PARSER.parse(header) if token.type == "tr_open"]
        assert len(tables) in (6 + 1 + 3 + 1, 3)
    rows = [token.children for token in PARSER.parse("\n".join(_scores(make_record(name), 1))) if token.children]
    assert [shown(rows[i]) for i in (3, 6)] == [one_line(name)] * 2


def test_a_mark_in_the_name_of_the_folder_or_the_base(folder):
    page = page_of(folder, make_record(), name=f"user/{MARK}\n```\n# x", base_model=f"a{MARK}")
    assert page_of(folder, make_record()) == page and page.count(f"\n{MARK}\n") == 1
    (code,) = re.findall(r"```python\n(.*?)\n```\n", page, re.DOTALL)
    (line,) = [line for line in code.splitlines() if line.startswith("name = ")]
    assert eval(line.removeprefix("name = ")) == f"user/{MARK}\n```\n# x"


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
def test_a_wrong_field_is_named(folder, path, value, message):
    record = make_record()
    holder, key = at(record, path)
    holder[key] = value
    with pytest.raises(ValueError, match=message) as raised:
        page_of(folder, record)
    assert "evaluation.json" in str(raised.value) and len(str(raised.value)) < 500
    assert not (folder / "README.md").exists() and not (folder / "quality_speed.png").exists()


@pytest.mark.parametrize("path", [p for p in map(lambda wrong: wrong[0], WRONG) if p != ("peers",)], ids=".".join)
def test_a_missing_field_is_named_or_not_needed(folder, path):
    record = make_record()
    holder, key = at(record, path)
    del holder[key]
    try:
        assert "exit_layer=4" in page_of(folder, record)
    except ValueError as error:
        assert "is missing" in str(error) or "schema version" in str(error) or "is empty" in str(error)


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "null", '{"schema_version": 1}', b"\xff\xfe", "[" * 10**5])
def test_a_file_that_is_none(folder, content):
    (folder / "evaluation.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="evaluation.json"):
        load_evaluation(folder)
    (folder / "evaluation.json").unlink()
    with pytest.raises(ValueError, match="evaluation.json' could not be read: No such file"):
        load_evaluation(folder)


def test_a_whole_record_is_right():
    check_record(make_record())


@pytest.mark.parametrize(
    "page", [b"\xff", b"---\na: [1\n---\n# x\n", b"---\n- 1\n---\n", b"---\ntags: 5\n---\n"], ids=str
)
def test_a_page_that_cannot_be_read_stays(folder, page):
    (folder / "README.md").write_bytes(page)
    with pytest.raises(ValueError, match="README.md' could not be read"):
        write_card(folder)
    assert (folder / "README.md").read_bytes() == page
