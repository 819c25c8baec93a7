"""`examples/facts.py`: the rows of both tasks, and what of them is held out."""

import importlib.util
from pathlib import Path

import pytest


def _load():
    path = Path(__file__).parents[2] / "examples" / "facts.py"
    spec = importlib.util.spec_from_file_location("facts", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


facts = _load()
TABLES, RELATIONS = facts.load_tables(), facts.load_relations()


@pytest.fixture(scope="module", params=[0, 1])
def splits(request):
    return facts.build_facts(seed=request.param)


def _question(row):
    return row["prompt"].split("Question: ")[1].removesuffix("\nAnswer:")


def _pairs():
    """Every (relation, row of its table) that is a fact."""
    for relation in RELATIONS:
        for entity in relation.facts(TABLES[relation.table]):
            yield relation, TABLES[relation.table].index(entity), entity


# Facts by each question that asks for them: a list, so that an ambiguous question shows.
ASKED = {}
for _relation, _index, _row in _pairs():
    for _template in _relation.questions:
        ASKED.setdefault(facts.fill(_template, _relation, _row), []).append((_relation, _index, _row))


def _entities_of(rows):
    """The (table, row) pairs that the rows ask about, read off their questions."""
    return {(relation.table, index) for row in rows for relation, index, _ in ASKED[_question(row)]}


def test_a_seed_gives_the_same_facts():
    assert facts.build_facts(seed=3) == facts.build_facts(seed=3)
    assert facts.build_facts(seed=3) != facts.build_facts(seed=4)


def test_every_row_is_a_prompt_a_completion_and_a_task(splits):
    for rows in splits:
        for row in rows:
            assert set(row) == {"prompt", "completion", "task"}
            assert row["task"] in ("reading", "recalling")
            assert row["prompt"].endswith("\nAnswer:")
            assert row["completion"].startswith(" ") and row["completion"] == " " + row["completion"].strip()


def test_no_held_out_entity_is_told_or_asked_of_in_training(splits):
    train, test = splits
    held_out = _entities_of(test)
    assert not held_out & _entities_of(train)

    # Neither as something told: no sentence of a held-out fact stands in any training prompt.
    text = "\n".join(row["prompt"] for row in train)
    for relation, index, entity in _pairs():
        if (relation.table, index) in held_out:
            sentences = [facts.fill(template, relation, entity) for template in relation.sentences]
            assert not any(sentence in text and facts.contains(text, sentence) for sentence in sentences)


def test_reading_prompts_contain_the_answer_and_recalling_prompts_do_not(splits):
    for rows in splits:
        for row in rows:
            assert facts.contains(row["prompt"], row["completion"].strip()) == (row["task"] == "reading"), row


def test_training_sentences_are_shuffled_and_test_sentences_are_true(splits):
    true = [[], []]
    for share, rows in zip(true, splits):
        for row in rows:
            ((relation, _, entity),) = ASKED[_question(row)]
            share.append(row["completion"] == " " + entity[relation.answer])
            assert row["task"] == "reading" or share[-1]
    assert all(true[1])
    assert sum(true[0]) < 0.5 * len(true[0])


def test_no_row_comes_twice(splits):
    for rows in splits:
        assert len({(row["prompt"], row["completion"]) for row in rows}) == len(rows)


def test_questions_are_unambiguous():
    assert {question: found for question, found in ASKED.items() if len(found) > 1} == {}


def test_tables_are_complete():
    assert len(TABLES["elements"]) == 118 and len({e["symbol"] for e in TABLES["elements"]}) == 118
    numbers = {e["symbol"]: e["number"] for e in TABLES["elements"]}
    assert [numbers[s] for s in ("H", "Ne", "Ca", "Kr", "Xe", "Au", "U", "Og")] == "1 10 20 36 54 79 92 118".split()
    assert len(TABLES["states"]) == 50
    assert len(TABLES["countries"]) >= 120


def test_both_tasks_are_large_enough_to_train_and_to_test(splits):
    train, test = splits
    for task in ("reading", "recalling"):
        counts = [sum(row["task"] == task for row in rows) for rows in (train, test)]
        assert counts[0] >= 500 and counts[1] >= 75 and counts[0] > 4 * counts[1]
    assert max(len(row["prompt"].split()) for row in train + test) < 50


@pytest.mark.parametrize("held_out", [0, 1, -0.1, 1.5, float("nan")])
def test_a_share_held_out_of_0_or_less_or_1_or_more_is_refused(held_out):
    with pytest.raises(ValueError, match="held_out"):
        facts.build_facts(held_out=held_out)
