"""Tasks: what is asked, and what counts as right."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sorted_llama.hub_card.tasks import (
    KINDS,
    closed_book,
    exact_match,
    final_answer,
    first_line,
    load_task,
    normalize_answer,
    token_f1,
)
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize(
    "score, text, answers, expected",
    [
        (exact_match, "\n Paris\nQuestion:", ["Lyon", "Paris"], {"exact_match": 1.0}),
        (exact_match, "paris", ["Paris"], {"exact_match": 0.0}),
        (exact_match, "", ["Paris"], {"exact_match": 0.0}),
        (closed_book, "The  Beatles!", ["beatles"], {"exact_match": 1.0, "f1": 1.0}),
        (closed_book, "the cat sat\nParis", ["a cat"], {"exact_match": 0.0, "f1": 2 / 3}),
        (closed_book, "New York", ["NYC", "new-york"], {"exact_match": 1.0, "f1": 1.0}),
        (closed_book, "cat cat cat", ["cat dog"], {"exact_match": 0.0, "f1": 0.4}),
        (closed_book, "", ["x"], {"exact_match": 0.0, "f1": 0.0}),
        (final_answer, "2+2=4\n#### 4\nQuestion", ["so\n#### 4"], {"final_answer": 1.0}),
        (final_answer, "#### 1,004.", ["#### 1004"], {"final_answer": 1.0}),
        (final_answer, "#### 4.50", ["#### 4.5"], {"final_answer": 1.0}),
        (final_answer, "#### -3", ["#### 3"], {"final_answer": 0.0}),
        (final_answer, "#### 40", ["#### 4"], {"final_answer": 0.0}),
        (final_answer, "the answer is 4", ["#### 4"], {"final_answer": 0.0}),
        (final_answer, "####", ["####"], {"final_answer": 0.0}),
    ],
)
def test_answers_are_scored(score, text, answers, expected):
    assert score(text, answers) == pytest.approx(expected)


@given(st.text(), st.text())
def test_the_normalisation_is_idempotent_and_f1_symmetric(text, other):
    once = normalize_answer(text)
    assert normalize_answer(once) == once == once.strip()
    assert token_f1(once, normalize_answer(other)) == token_f1(normalize_answer(other), once)
    line = first_line(text)
    assert closed_book(text, [line]) == {"exact_match": 1.0, "f1": float(bool(normalize_answer(line)))}


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_questions_are_asked_and_any_alias_counts(tmp_path):
    rows = [{"question": "Capital?", "answers": ["Paris", "City of Paris"]}, {"question": "Two?", "answer": "2"}]
    task = load_task("qa", write(tmp_path / "trivia.jsonl", rows), tiny_tokenizer())
    assert (task.name, task.metrics) == ("trivia", ["exact_match", "f1"])
    assert [row["prompt"] for row in task.rows] == ["Question: Capital?\nAnswer:", "Question: Two?\nAnswer:"]
    assert task.rows[0]["completion"] == " Paris</s>"
    assert task.score(["city of Paris.", "three"]) == pytest.approx({"exact_match": 0.5, "f1": 0.5})
    assert task.max_new_tokens == 7  # of the longest first answer, and two more
    chat = load_task("qa", task.source, tiny_tokenizer(), limit=1, chat=True)
    assert len(chat.rows) == 1 and chat.rows[0]["prompt"].endswith("<s>assistant\n")
    assert chat.digest != task.digest


@pytest.mark.parametrize(
    "row, answers",
    [
        ({"answer": {"value": "Paris", "aliases": ["Lutetia"]}}, ["Paris", "Lutetia"]),
        ({"answers": {"text": ["Paris", "Lutetia"], "answer_start": [3, 9]}}, ["Paris", "Lutetia"]),
        ({"answers": [4, "four"]}, ["4", "four"]),
        ({"answer": 4}, ["4"]),
    ],
    ids=str,
)
def test_all_forms_of_answers_are_read(tmp_path, row, answers):
    (tmp_path / "rows.json").write_text(json.dumps(row | {"question": "a"}))
    if answers == ["4", "four"]:  # of two types, which no table of a file has
        assert KINDS["qa"].read(row | {"question": "a"})["answers"] == answers
        return
    task = load_task("qa", str(tmp_path / "rows.json"), tiny_tokenizer())
    assert task.rows[0]["answers"] == answers and task.rows[0]["completion"] == f" {answers[0]}</s>"


def test_a_completion_of_several_lines_is_scored_by_its_first(tmp_path):
    rows = [{"prompt": "Sing:", "completion": "\n La la\nla"}]
    task = load_task("completions", write(tmp_path / "songs.jsonl", rows), tiny_tokenizer())
    assert task.score(["\n La la\nla"]) == task.score(["La la"]) == {"exact_match": 1.0}
    assert task.score(["la"]) == {"exact_match": 0.0}


def test_problems_are_scored_by_their_number(tmp_path):
    rows = [{"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}]
    task = load_task("gsm8k", write(tmp_path / "test.jsonl", rows), tiny_tokenizer())
    assert task.score(["It is\n#### 2"]) == {"final_answer": 1.0}


@pytest.mark.parametrize(
    "kind, rows, message",
    [
        ("poems", [{"question": "a", "answer": "b"}], "`kind` must be one of qa, gsm8k, completions, got 'poems'"),
        ("qa", [{"question": "a", "answer": "b"}, {"question": "a"}], "Row 1 .* lacks answers or answer"),
        ("completions", [{"question": "a"}], "Row 0 .* lacks prompt, completion"),
        ("qa", [{"question": "a", "answers": []}], r"Row 0 .*`answers` must be text, a number, .* got \[\]"),
        ("qa", [{"question": "a", "answer": {"said": "b"}}], "Row 0 .*`answer` must be text, a number"),
    ],
    ids=str,
)
def test_wrong_rows_are_told(tmp_path, kind, rows, message):
    with pytest.raises(ValueError, match=message):
        load_task(kind, write(tmp_path / "rows.jsonl", rows), tiny_tokenizer())


def test_a_file_without_rows_is_told(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\n")
    with pytest.raises(ValueError, match="rows.csv' could not be read: .*no data"):
        load_task("qa", str(tmp_path / "rows.csv"), tiny_tokenizer())
    (tmp_path / "rows.csv").write_text("question,answer\na,b\n")
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"`limit` must be an integer of at least 1, got {limit}"):
            load_task("qa", str(tmp_path / "rows.csv"), tiny_tokenizer(), limit=limit)
