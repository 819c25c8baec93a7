"""What exits are asked: rows of questions and right answers, and how a generated answer is scored."""

import hashlib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import maybe_apply_chat_template

from sorted_llama.modeling_sorted_llama.configuration_sorted_llama import check_int
from sorted_llama.trainer.escaping import one_line


QUESTION = "Question: {question}\nAnswer:"
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class Task:
    """Rows to answer, and how the answers are scored."""

    name: str
    kind: str  # one of `KINDS`
    rows: list[dict]  # `prompt` and `completion` as the model reads them, and the `answers` that count as right
    max_new_tokens: int
    source: str
    digest: str  # of the rows

    @property
    def metrics(self) -> list[str]:
        """Names of the scores; the page shows the first."""
        return list(KINDS[self.kind].score("", [""]))

    def scores(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Each score, from 0 to 1, of generated answers, one for each row."""
        return [KINDS[self.kind].score(text, row["answers"]) for text, row in zip(texts, self.rows, strict=True)]

    def score(self, texts: Sequence[str]) -> dict[str, float]:
        """Mean of each score over the rows."""
        scores = self.scores(texts)
        return {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}


def load_task(
    kind: str, source: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None, chat: bool = False
) -> Task:
    """
    A task from a file or dataset, of which `limit` rows are taken, asked through the chat template with `chat`.

    Args:
        kind (`str`):
            `"qa"`: rows of `question` and `answers` (or `answer`): text, a number, a list of them, or TriviaQA's and
            SQuAD's own form; `"gsm8k"`: of `question` and `answer`, whose number stands behind `####`;
            `"completions"`: of `prompt` and `completion`, text or chat messages.
        source (`str`): A .json, .jsonl, .csv or .parquet file, or a dataset of the Hub: see [`load_rows`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
        limit (`int`, *optional*): Number of rows, from the first. Defaults to all.
        chat (`bool`, *optional*, defaults to `False`): Whether questions are asked through the chat template.

    Raises:
        ValueError: If an argument or a row is none of those, or if `chat` is asked for and there is no chat template.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
    if limit is not None:
        check_int(limit, "limit", 1)
    if chat and tokenizer.chat_template is None:
        raise ValueError("`chat` asks through the chat template, and the tokenizer has none.")
    rows = load_rows(source)[:limit]
    if not rows:
        raise ValueError(f"{source!r} has no rows.")
    texts = []
    for number, row in enumerate(rows):
        try:
            texts.append(_as_asked(row, KINDS[kind], tokenizer, chat))
        except ValueError as error:
            raise ValueError(f"Row {number} of {source!r}: {error}") from error
    longest = max(len(tokenizer(row["answer"])["input_ids"]) for row in texts) + 2
    content = [(row["prompt"], row["completion"], row["answers"]) for row in texts]
    return Task(
        name=Path(source).stem if Path(source).is_file() else source,
        kind=kind,
        rows=texts,
        max_new_tokens=min(longest, KINDS[kind].max_new_tokens),
        source=source,
        digest=hashlib.sha256(repr(content).encode()).hexdigest(),
    )


def _as_asked(row: dict, kind: "Kind", tokenizer: PreTrainedTokenizerBase, chat: bool) -> dict:
    """The row as the model reads it, and the answers that count as right."""
    missing = [names for names in kind.fields if not any(row.get(name) is not None for name in names.split(" or "))]
    if missing:
        raise ValueError(f"It lacks {', '.join(missing)}.")
    row = kind.read(row)
    if chat and isinstance(row["prompt"], str):
        question, completion = row["prompt"].strip(), row["completion"].strip()
        row["prompt"] = [{"role": "user", "content": question}]
        row["completion"] = [{"role": "assistant", "content": completion}]
    if not isinstance(row["prompt"], str) and tokenizer.chat_template is None:
        raise ValueError("It is a chat, and the tokenizer has no chat template.")
    (text,) = as_text([row], tokenizer)
    return {**text, "answers": row.get("answers") or [text["answer"]]}


def load_rows(source: str) -> list[dict]:
    """Rows of a file, or of a dataset of the Hub (its `test` split, else `train`); `ValueError` if there are none."""
    path = Path(source)
    kind = FORMATS.get(path.suffix)
    if path.is_file() != (kind is not None):
        wrong = "is not there" if kind is not None else f"must end in {', '.join(FORMATS)}"
        raise ValueError(f"The file {source!r} {wrong}.")
    try:
        if kind is not None:
            return list(load_dataset(kind, data_files=source, split="train"))
        splits = load_dataset(source)
        return list(splits["test" if "test" in splits else "train"])
    except Exception as error:  # of datasets, of many kinds: StopIteration where a file is empty
        what = "" if path.exists() else "is no file here, and from the Hub it "
        reason = one_line(str(error.__cause__ or error)) or "it is empty."
        raise ValueError(f"{source!r} {what}could not be read: {reason}") from error


def as_text(rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """
    Rows as TRL trains them: `prompt` and `completion` as text, chat messages through the template, plain text with the
    end-of-text token behind it; and the `answer` without special tokens, and the `task` (`"all"`).
    """
    texts = []
    for row in rows:
        text = maybe_apply_chat_template({"prompt": row["prompt"], "completion": row["completion"]}, tokenizer)
        if isinstance(row["completion"], str):
            text["completion"] += tokenizer.eos_token
        elif tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
            text["prompt"] = text["prompt"].removeprefix(tokenizer.bos_token)  # the tokenizer adds it itself
        answer = tokenizer(text["completion"], add_special_tokens=False)["input_ids"]
        answer = tokenizer.decode(answer, skip_special_tokens=True).strip()
        texts.append({**text, "answer": answer, "task": row.get("task", "all")})
    return texts


def first_line(text: str) -> str:
    """The first line that says something, stripped."""
    return (text.strip().splitlines() or [""])[0].strip()


def exact_match(text: str, answers: Sequence[str]) -> dict[str, float]:
    """Whether the first line is that of one of the answers."""
    return {"exact_match": float(any(first_line(text) == first_line(answer) for answer in answers))}


def normalize_answer(text: str) -> str:
    """TriviaQA's normalisation: lower case, no punctuation, no articles, single spaces."""
    punctuation = string.punctuation + "‘’´`"
    text = "".join(" " if character in punctuation else character for character in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def closed_book(text: str, answers: Sequence[str]) -> dict[str, float]:
    """TriviaQA's exact match and F1 of the first line, the best over the aliases."""
    given = normalize_answer(first_line(text))
    right = [normalize_answer(answer) for answer in answers]
    return {"exact_match": float(given in right), "f1": max(token_f1(given, answer) for answer in right)}


def token_f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the answer's words."""
    given, right = text.split(), answer.split()
    common = sum((Counter(given) & Counter(right)).values())
    return 2 * common / (len(given) + len(right)) if common else 0.0


def final_number(text: str) -> str | None:
    """The number behind GSM8K's `####`."""
    found = re.search(r"####\s*(-?[\d,]*\.?\d+)", text)
    return found and found[1].replace(",", "")


def final_answer(text: str, answers: Sequence[str]) -> dict[str, float]:
    """GSM8K: whether the number behind `####` is the right one."""
    given = final_number(text)
    right = [float(number) for number in map(final_number, answers) if number is not None]
    return {"final_answer": float(given is not None and float(given) in right)}


@dataclass(frozen=True)
class Kind:
    """How rows of a kind are read and scored."""

    fields: Sequence[str]
    read: Callable[[dict], dict]
    score: Callable[[str, Sequence[str]], dict[str, float]]
    max_new_tokens: int


def _read_question(row: dict) -> dict:
    name = "answer" if row.get("answers") is None else "answers"
    value = row[name]
    if isinstance(value, dict) and "value" in value:  # TriviaQA
        value = [value["value"], *value.get("aliases", ())]
    elif isinstance(value, dict) and "text" in value:  # SQuAD
        value = value["text"]
    answers = [str(v) if isinstance(v, int | float) else v for v in (value if isinstance(value, list) else [value])]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"`{name}` must be text, a number, or a list of at least one of them, got {row[name]!r}.")
    if not isinstance(row["question"], str):
        raise ValueError(f"`question` must be text, got {row['question']!r}.")
    prompt = QUESTION.format(question=row["question"])
    return {"prompt": prompt, "completion": f" {answers[0]}", "answers": answers}


def _read_problem(row: dict) -> dict:
    problem = _read_question(row)
    if not any(final_number(answer) for answer in problem["answers"]):  # no answer would ever be right
        raise ValueError(f"`answer` must end in `#### ` and a number, got {row['answer']!r}.")
    return problem


def _read_completion(row: dict) -> dict:
    def is_chat(part: Any) -> bool:
        is_list = isinstance(part, list) and len(part) > 0
        return is_list and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in part)

    prompt, completion = row["prompt"], row["completion"]
    both_text = isinstance(prompt, str) and isinstance(completion, str)
    if not both_text and not (is_chat(prompt) and is_chat(completion)):
        got = f"{prompt!r} and {completion!r}"
        raise ValueError(f"`prompt` and `completion` must both be text, or both lists of chat messages, got {got}.")
    return dict(row)


KINDS = {
    "qa": Kind(["question", "answers or answer"], _read_question, closed_book, 24),
    "gsm8k": Kind(["question", "answer"], _read_problem, final_answer, 256),
    "completions": Kind(["prompt", "completion"], _read_completion, exact_match, 128),
}
