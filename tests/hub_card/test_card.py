"""The page of an evaluation: what was measured is shown, what comes from outside stays text."""

import json
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from sorted_llama.hub_card import card, evaluate, load_evaluation
from sorted_llama.hub_card.card import exits_block, write_card
from sorted_llama.hub_card.commands import main
from sorted_llama.hub_card.extract import _scores
from sorted_llama.modeling_sorted_llama import SortedLlamaConfig
from sorted_llama.trainer.escaping import one_line
from tests.hub_card.records import EXITS, QUICK, TASK, cells, data, make_folder, make_record
from tests.tiny import save_tiny, tiny_sorted, tiny_tokenizer
from tests.trainer.test_escaping import AWKWARD, MARK, PARSER, inline, shown


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A checkpoint with its evaluation of one task."""
    folder = make_folder(tmp_path_factory.mktemp("evaluated"))
    evaluate(str(folder / "model"), data(folder)[:1], **QUICK)
    return folder


@pytest.fixture
def folder(evaluated, tmp_path):
    """A copy of it, not evaluated."""
    shutil.copytree(evaluated, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model" / "evaluation.json").unlink()
    return tmp_path


@pytest.fixture
def shapes(tmp_path):
    """The folder of a checkpoint as far as a page of it needs one."""
    SortedLlamaConfig(num_hidden_layers=4, exit_layers=EXITS).save_pretrained(tmp_path)
    return tmp_path


def test_the_page_shows_what_was_measured(folder, capsys):
    path = str(folder / "model")
    files = [f"{kind}={source}" for kind, source in data(folder)]
    flags = [
        "--exit_thresholds",
        "0.5",
        "--num_timed",
        "1",
        "--max_new_tokens",
        "2",
        "--runs",
        "1",
        "--dtype",
        "float32",
    ]
    main(["evaluate", path, "--data", *files, *flags])
    printed = capsys.readouterr().out
    main(["card", path, "--name", "user/name", "--base_model", "base/llama", "--license", "apache-2.0"])
    assert "README.md" in capsys.readouterr().out
    record, page = load_evaluation(path), (folder / "model" / "README.md").read_text()

    assert cells(printed) == [row for row in cells(page) if row[0]][: len(cells(printed))]
    results, full = record["tasks"]["trivia"], record["speed"]["exit 4"]["median"]
    calls, exits_of_page = cells(page)[:7], cells(page)[7:11]
    names = [f"exit {k}" for k in EXITS] + ["threshold 0.5", "draft 1", "draft 2"]
    shown_calls = ["exit_layer=1", "exit_layer=2", "exit_layer=4", "exit_threshold=0.5"]
    shown_calls += ["assistant_early_exit=1", "assistant_early_exit=2"]
    for row, name, call in zip(calls[1:], names, shown_calls, strict=True):
        shown = dict(zip(calls[0], row, strict=True))
        assert row[0] == f"`{call}`" + (" (full)" if name == "exit 4" else "")
        score = results["settings"]["exit 4" if "draft" in name else name]["exact_match"]
        assert shown["trivia: exact match"] == f"{100 * score:.1f} %"
        assert shown["speed-up"] == f"{record['speed'][name]['median'] / full:.2f}x"
    for row, k in zip(exits_of_page[1:], map(str, EXITS), strict=True):
        shown = dict(zip(exits_of_page[0], row, strict=True))
        assert shown["exit"] == k and shown["KV bytes a token"] == f"{record['exits'][k]['kv_bytes']:,}"
        assert shown["trivia: loss"] == f"{results['exits'][k]['loss']:.3f}"
        assert f"{100 * results['exits'][k]['agreement']:.1f} %" in row
    assert (folder / "model" / "quality_speed.png").read_bytes().startswith(b"\x89PNG")
    assert "(quality_speed.png)" in page
    assert "not evaluated" not in page.lower()

    metadata = yaml.safe_load(page.split("---")[1])
    assert metadata["base_model"] == "base/llama" and metadata["license"] == "apache-2.0"
    assert {"sorted-llama", "soft", "early-exit", "self-speculation"} <= set(metadata["tags"])
    (index,) = metadata["model-index"]
    values = {
        (result["dataset"]["name"], metric["name"]): metric["value"]
        for result in index["results"]
        for metric in result["metrics"]
    }
    for k in EXITS:
        score = record["tasks"]["trivia"]["settings"][f"exit {k}"]["f1"]
        assert values["trivia", f"f1, {k} of 4 layers"] == pytest.approx(score, abs=1e-6)
    assert len(values) == 3 * (2 + 1)


def test_the_calls_on_the_page_are_those_of_the_exits_and_of_the_tokenizer(folder):
    """That they run: tests/trainer/test_model_card.py."""
    path = folder / "model"
    write_card(path, name=str(path))
    (code,) = re.findall(r"```python\n(.*?)```", (path / "README.md").read_text(), re.DOTALL)
    asked = re.findall(r"generate\(\*\*inputs, (.*?), max_new_tokens", code)
    assert asked == ["exit_layer=1", "exit_threshold=0.9", "assistant_early_exit=1"]
    assert "apply_chat_template" in code
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (path / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(path)
    write_card(path, name=str(path))
    assert "apply_chat_template" not in (path / "README.md").read_text()
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "x"}))  # as older versions do
    write_card(path, name=str(path))
    assert "apply_chat_template" in (path / "README.md").read_text()


def test_nothing_unmeasured_is_shown(folder):
    path = folder / "model"
    write_card(path)
    page = (path / "README.md").read_text()
    assert "Not evaluated yet" in page and "model-index" not in page
    assert "Exits 1, 2, 4 with weights 1, 1, 1" in page
    evaluate(str(path), data(folder)[:1], exit_layers=[2, 4], **QUICK)
    write_card(path)
    rows = cells((path / "README.md").read_text())
    (missing,) = [row for row in rows if row[0] == "`exit_layer=1`"]
    assert missing[1] == "not evaluated" and not any(missing[2:])


def test_edits_of_the_owner_of_a_page_survive(folder, evaluated):
    path = folder / "model"
    write_card(path)
    file = path / "README.md"
    mine = file.read_text().replace("# model\n", "# My model\n\nMy words.\n").replace("license", "licence")
    mine = mine.replace("tags:\n", "language: nl\ntags:\n- mine\n") + "\n## More of mine\n\nThe end.\n"
    # The block of limits is taken out, with its marks
    mine = re.sub(r"<!-- sorted-llama: limits -->.*<!-- /sorted-llama: limits -->", "Mine.", mine, flags=re.DOTALL)
    file.write_text(mine)
    shutil.copy(evaluated / "model" / "evaluation.json", path)
    for _ in range(2):
        write_card(path)
        page = file.read_text()
        for words in ("# My model\n\nMy words.\n", "## More of mine\n\nThe end.", "language: nl", "- mine", "Mine."):
            assert page.count(words) == 1, words
        assert "Not evaluated yet" not in page and "trivia: loss" in page and "cache that was filled" not in page
    assert ModelCard.load(file).data.language == "nl"


def test_a_page_of_somebody_else_stays(folder):
    file = folder / "model" / "README.md"
    file.write_text("---\nlicense: mit\ndatasets:\n- some/data\n---\n# Theirs\n\nText.\n")
    write_card(folder / "model")
    page = file.read_text()
    assert "# Theirs\n\nText." in page and page.index("## The exits") < page.index("# Theirs")
    card = ModelCard.load(file)
    assert card.data.license == "mit" and card.data.datasets == ["some/data"] and "early-exit" in card.data.tags


def test_peers_are_shown_where_they_were_measured_alike(folder, capsys):
    path = folder / "model"
    save_tiny(folder / "small", tiny_sorted(num_hidden_layers=2, initializer_range=0.2, exit_layers=None))
    with pytest.raises(ValueError, match="the checkpoint has none"):
        write_card(path, peers=[("small", write_results(folder, "small"))])
    record, peer = (load_evaluation(write_results(folder, name)) for name in ("model", "small"))
    write_card(path)
    alone = (path / "quality_speed.png").read_bytes()
    main(["card", str(path), "--peers", f"a small Llama={folder / 'small'}"])
    (row,) = [row for row in cells((path / "README.md").read_text()) if row[0] == "a small Llama"]
    score, speed = peer["tasks"]["trivia"]["settings"]["exit 2"]["exact_match"], peer["speed"]["exit 2"]["median"]
    assert row[1] == f"{100 * score:.1f} %"
    assert row[3] == f"{speed / record['speed']['exit 4']['median']:.2f}x"
    assert (path / "quality_speed.png").read_bytes() != alone
    write_card(path, name="user/name")  # as pushing does: what was shown stays
    assert row in cells((path / "README.md").read_text())

    (folder / "trivia.jsonl").write_text('{"question": "another?", "answer": "no"}')
    write_results(folder, "small", overwrite=True, **QUICK | {"max_new_tokens": 3})
    with pytest.raises(ValueError, match="`peers`: 'small' was measured with other rows .*; timed .*'max_new_tokens'"):
        write_card(path, peers=[("small", folder / "small")])
    with pytest.raises(SystemExit, match="`--peers` takes NAME=PATH"):
        main(["card", str(path), "--peers", str(folder / "small")])


def write_results(folder, name, **options):
    evaluate(str(folder / name), data(folder)[:1], **QUICK | options)
    return folder / name


def test_peers_are_shown_beside_an_evaluation_without_speeds(shapes):
    record = make_record() | {"peers": {"other": make_record(score=0.25)}}
    del record["speed"]
    (row,) = [row for row in cells(page_of(shapes, record)) if row[0] == "other"]
    assert row == ["other", "25.0 %"]


def test_a_page_needs_the_folder_of_a_checkpoint(folder):
    with pytest.raises(ValueError, match="`path` must be the folder of a checkpoint"):
        write_card(folder)


def test_an_evaluation_of_another_depth_is_not_shown(folder, evaluated):
    save_tiny(folder / "shallow", tiny_sorted(num_hidden_layers=3, exit_layers=[1, 3]))
    with pytest.raises(ValueError, match="`evaluation` is of a model of 4 layers"):
        write_card(folder / "shallow", evaluation=evaluated / "model")


# What comes from outside


def page_of(folder, record, **options):
    (folder / "evaluation.json").write_text(json.dumps(record))
    write_card(folder, **options)
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("name", AWKWARD[:-1], ids=ascii)  # the last one no file system gives
def test_a_name_in_the_page_is_text(shapes, monkeypatch, name):
    record, harmless = make_record(name, command=f"python {name}", machine=name), make_record()
    record["harness"] = {name: {name: {str(k): {f"{name},none": 0.5} for k in EXITS}}}
    harmless["harness"] = {TASK: {TASK: {str(k): {"x,none": 0.5} for k in EXITS}}}
    record["peers"] = {name: make_record(name, machine=name)}
    harmless["peers"] = {"peer": make_record()}
    page = page_of(shapes, record)
    monkeypatch.setattr(card, "plot_quality_speed", lambda *arguments: True)  # it was drawn once
    assert page_of(shapes, record) == page and page_of(shapes, make_record()) != page
    assert page_of(shapes, record) == page, "the page neither grows nor keeps anything"
    ours, theirs = (PARSER.parse(text.split("\n---\n", 1)[1]) for text in (page, page_of(shapes, harmless)))
    assert [token.type for token in ours] == [token.type for token in theirs], "the blocks are those of any name"
    texts = ["".join(child.content for child in children if "text" in child.type) for children in inline(page)]
    assert f"{one_line(name)}: exact match" in texts and f"{one_line(name)}: loss" in texts
    assert yaml.safe_load(page.split("\n---\n")[0].removeprefix("---\n"))["tags"]


@settings(max_examples=50, deadline=None)
@given(st.text().filter(one_line))
def test_any_name_in_a_table_is_one_cell(name):
    for header in (exits_block(make_record(name), EXITS, False), "\n".join(_scores(make_record(name), 1))):
        tables = [token for token in PARSER.parse(header) if token.type == "tr_open"]
        assert len(tables) in (6 + 1 + 3 + 1, 3)
    rows = [token.children for token in PARSER.parse("\n".join(_scores(make_record(name), 1))) if token.children]
    assert [shown(rows[i]) for i in (3, 6)] == [one_line(name)] * 2


def test_a_mark_in_the_name_of_the_folder_or_the_base(shapes):
    page = page_of(shapes, make_record(), name=f"user/{MARK}\n```\n# x", base_model=f"a{MARK}")
    assert page_of(shapes, make_record()) == page and page.count(f"\n{MARK}\n") == 1
    (code,) = re.findall(r"```python\n(.*?)\n```\n", page, re.DOTALL)
    (line,) = [line for line in code.splitlines() if line.startswith("name = ")]
    assert eval(line.removeprefix("name = ")) == f"user/{MARK}\n```\n# x"


@pytest.mark.parametrize(
    "page", [b"\xff", b"---\na: [1\n---\n# x\n", b"---\n- 1\n---\n", b"---\ntags: 5\n---\n"], ids=str
)
def test_a_page_that_cannot_be_read_stays(shapes, page):
    (shapes / "README.md").write_bytes(page)
    with pytest.raises(ValueError, match="README.md' could not be read"):
        write_card(shapes)
    assert (shapes / "README.md").read_bytes() == page
