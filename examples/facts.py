"""
The demo's data: true facts with one short answer, and two tasks over them.

- `reading`: the fact stands in the prompt, and is asked for.
- `recalling`: the same question without the sentence; only what the model knows can help.

The facts are tables below `data/`, one entity a line; `relations.json` says what is asked about them. An empty cell is
a fact left out because its answer can be argued about. Only what is widely `known` is asked for in `recalling`: the
rest would measure memorising instead of knowledge. `python examples/facts.py` prints the counts and a few rows.
"""

import csv
import json
import random
import re
from pathlib import Path
from typing import NamedTuple


DATA = Path(__file__).parent / "data"

# In training, the sentence to read gives the entity another one's answer, so that the model learns to read instead of
# to remember; this many times for each wording of a question. Test rows, and all that is to be recalled, are true.
NUM_SWAPS = 2


Entity = dict[str, str]  # a line of a table, by column
Tables = dict[str, list[Entity]]


class Relation(NamedTuple):
    """
    What is asked about a table's entities: `subject` and `answer` name columns; `{s}` and `{a}` stand for them in the
    `sentences` that state the fact and the `questions` that ask for it. `recall=False` is asked for in `reading` only.
    """

    table: str
    subject: str
    answer: str
    sentences: list[str]
    questions: list[str]
    recall: bool = True

    def facts(self, entities: list[Entity]) -> list[Entity]:
        """The entities for which it holds."""
        return [e for e in entities if e[self.subject] and e[self.answer]]


def load_relations() -> list[Relation]:
    return [Relation(**fields) for fields in json.loads((DATA / "relations.json").read_text(encoding="utf-8"))]


def load_tables() -> Tables:
    """The entities of every table, by the name that a [`Relation`] knows it under."""
    tables: Tables = {}
    for name in dict.fromkeys(relation.table for relation in load_relations()):
        with (DATA / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            tables[name] = list(csv.DictReader(file))
    return tables


def fill(template: str, relation: Relation, entity: Entity) -> str:
    """A sentence or a question of `relation` about `entity`, with a capital first letter."""
    text = template.format(s=entity[relation.subject], a=entity[relation.answer])
    return text[0].upper() + text[1:]


def contains(text: str, answer: str) -> bool:
    """Whether `answer` stands in `text` as whole words: the symbol "C" is not in "Carbon"."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None


def build_facts(seed: int = 0, held_out: float = 0.2) -> tuple[list[dict], list[dict]]:
    """
    Builds both tasks, split by entity: no training row tells or asks anything of a held-out country, element, ...; its
    name, capital, ... may be the (wrong) answer that a training sentence gives of another.

    Args:
        seed (`int`, *optional*, defaults to 0): Of the split, the wordings, the swapped answers and the order.
        held_out (`float`, *optional*, defaults to 0.2): Share of every table's entities that is kept for the test.

    Returns:
        `tuple[list[dict], list[dict]]`: rows to train on (every wording of a question) and to test with (one wording a
        fact): `{"prompt": str, "completion": str, "task": "reading" or "recalling"}`, a space before the completion.

    Raises:
        ValueError: If `held_out` is not between 0 and 1.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"`held_out` is {held_out!r}, but must lie between 0 and 1 (both excluded).")
    rng = random.Random(seed)
    train, test = _split(load_tables(), held_out, rng)
    rows: tuple[list[dict], list[dict]] = ([], [])
    for split, found in zip((train, test), rows, strict=True):
        for relation in load_relations():
            every = relation.facts(train[relation.table]) + relation.facts(test[relation.table])
            for entity in relation.facts(split[relation.table]):
                found += _ask(relation, entity, every if split is train else None, rng)
        found[:] = {row["prompt"]: row for row in found}.values()  # a swap may come up twice
        rng.shuffle(found)
    return rows


def _split(tables: Tables, held_out: float, rng: random.Random) -> tuple[Tables, Tables]:
    """Entities to train on and held out: the same share of the known and of the others, whatever the seed."""
    train: Tables = {}
    test: Tables = {}
    for name, table in tables.items():
        train[name], test[name] = [], []
        for known in (True, False):
            group = [entity for entity in table if (entity["known"] == "yes") is known]
            rng.shuffle(group)
            cut = round(len(group) * held_out)
            test[name] += group[:cut]
            train[name] += group[cut:]
    return train, test


def _ask(relation: Relation, entity: Entity, swaps: list[Entity] | None, rng: random.Random) -> list[dict]:
    """The rows about a fact: to test with one wording; to train with all, and answers to read taken from `swaps`."""
    rows = []
    for template in relation.questions if swaps else [rng.choice(relation.questions)]:
        for _ in range(NUM_SWAPS if swaps else 1):
            told = {**entity, relation.answer: rng.choice(swaps)[relation.answer]} if swaps else entity
            rows.append(_row(relation, told, template, rng.choice(relation.sentences)))
        recall = _row(relation, entity, template)
        answered = contains(recall["prompt"], recall["completion"][1:])
        if entity["known"] == "yes" and relation.recall and not answered:
            rows.append(recall)
    return rows


def _row(relation: Relation, entity: Entity, template: str, sentence: str | None = None) -> dict:
    """A question about `entity`: `reading` after the `sentence` that answers it, else `recalling`."""
    question = f"Question: {fill(template, relation, entity)}\nAnswer:"
    prompt = question if sentence is None else f"{fill(sentence, relation, entity)}\n{question}"
    task = "recalling" if sentence is None else "reading"
    return {"prompt": prompt, "completion": f" {entity[relation.answer]}", "task": task}


def main() -> None:
    for name, rows in zip(("train", "test"), build_facts(), strict=True):
        for task in ("reading", "recalling"):
            chosen = [row for row in rows if row["task"] == task]
            print(f"\n== {name}, {task}: {len(chosen)} rows")
            for row in chosen[:3]:
                print(f"{row['prompt']}{row['completion']}\n")


if __name__ == "__main__":
    main()
