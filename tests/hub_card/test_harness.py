"""lm-evaluation-harness at every exit, against its own model on the extracted sub-models."""

import json

import pytest
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from sorted_llama.hub_card.harness import SortedLlamaLM, evaluate_harness
from tests.tiny import save_tiny, tiny_sorted, tiny_tokenizer


EXITS = [1, 2, 4]
CHOICE = {
    "task": "choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": 0,
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
LETTERS = {**CHOICE, "task": "letters", "doc_to_choice": ["A", "B", "C"]}  # one token each: one pass for all
ROLLING = {"task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
ROLLING |= {"metric_list": [{"metric": "word_perplexity"}]}
WRITING = {"task": "writing", "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "a"}
WRITING |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 6}, "metric_list": [{"metric": "exact_match"}]}
TASKS = [CHOICE, LETTERS, ROLLING, WRITING]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a sorted model and tokenizer, and folders with its sub-models as plain Llamas."""
    folder = tmp_path_factory.mktemp("harness")
    model = tiny_sorted(initializer_range=0.2, exit_layers=EXITS)
    save_tiny(folder / "sorted", model)
    for k in EXITS:
        save_tiny(folder / f"plain{k}", model.extract_submodel(k))
    return folder


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"what is {i}?", "choices": [f" {i}", " none", f" {i}{i} x"], "text": "go on " * (3 * i + 1)}
            for i in range(12)]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    for task in TASKS:
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**data, "test_split": "test", **task}))
    return TaskManager(include_path=str(folder), include_defaults=False)


def samples(model, manager, tasks, **kwargs):
    """What the model answered, by task, and the metrics."""
    found = simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **kwargs)
    answers = {name: [s["resps"] for s in of_task] for name, of_task in found["samples"].items()}
    return answers, found["results"]


def numbers(answers):
    return [float(x[0]) if isinstance(x, tuple) else x for row in answers for group in row for x in group]


NAMES = [task["task"] for task in TASKS]


@pytest.mark.slow
@pytest.mark.parametrize("k", EXITS)
def test_one_exit_is_the_sub_model(checkpoint, manager, k):
    """`--model hf` with `exit_layer`, as it is: to the last digit."""
    arguments = {"batch_size": 3, "dtype": "float32", "device": "cpu"}
    plain = HFLM(str(checkpoint / f"plain{k}"), **arguments)
    at_exit = HFLM(str(checkpoint / "sorted"), trust_remote_code=True, exit_layer=k, **arguments)
    assert samples(at_exit, manager, NAMES) == samples(plain, manager, NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 5])
def test_all_exits_from_one_pass(checkpoint, manager, batch_size, monkeypatch):
    lm = SortedLlamaLM(
        str(checkpoint / "sorted"), exit_layers=EXITS, batch_size=batch_size, dtype="float32", device="cpu"
    )
    passes, forward = [], lm.model.model.forward
    monkeypatch.setattr(lm.model.model, "forward", lambda *a, **kw: passes.append(1) or forward(*a, **kw))
    for k in EXITS:
        lm.exit_layer = k
        passes.clear()
        answers, results = samples(lm, manager, NAMES[:3])
        # 36 choices, 12 questions whose letters share a pass, 12 texts; the other exits are there already
        assert len(passes) == (sum(-(-n // batch_size) for n in (36 + 12, 12)) if k == EXITS[0] else 0)
        plain = HFLM(str(checkpoint / f"plain{k}"), batch_size=3, dtype="float32", device="cpu")
        expected, expected_results = samples(plain, manager, NAMES[:3])
        for name in NAMES[:3]:
            assert numbers(answers[name]) == pytest.approx(numbers(expected[name]), rel=1e-4, abs=1e-4)
            for metric, value in expected_results[name].items():
                if isinstance(value, float):
                    assert results[name][metric] == pytest.approx(value, rel=1e-4)
        answers, _ = samples(lm, manager, ["writing"])
        assert answers == samples(plain, manager, ["writing"])[0]


@pytest.mark.slow
def test_modes_reach_generate(checkpoint, manager):
    arguments = {"batch_size": 4, "dtype": "float32", "device": "cpu"}
    full = samples(HFLM(str(checkpoint / "plain4"), **arguments), manager, ["writing"])[0]
    shallow = samples(HFLM(str(checkpoint / "plain1"), **arguments), manager, ["writing"])[0]
    assert full != shallow
    for lm in (
        SortedLlamaLM(str(checkpoint / "sorted"), exit_layer=2, **arguments),
        HFLM(str(checkpoint / "sorted"), trust_remote_code=True, **arguments),
    ):
        for mode in ({"assistant_early_exit": 1}, {"exit_threshold": 2.0}, {"exit_layer": 4}):
            assert samples(lm, manager, ["writing"], gen_kwargs=mode)[0] == full
        assert samples(lm, manager, ["writing"], gen_kwargs={"exit_threshold": 0.0})[0] == shallow


@pytest.mark.slow
def test_metrics_by_exit(manager):
    model = tiny_sorted(initializer_range=0.2, exit_layers=EXITS)
    lm = SortedLlamaLM(model, exit_layers=EXITS, tokenizer=tiny_tokenizer(), batch_size=4)
    found = evaluate_harness(lm, EXITS, "choice", task_manager=manager, bootstrap_iters=0)
    assert list(found) == ["choice"] and list(found["choice"]) == [str(k) for k in EXITS]
    assert all(0 <= metrics["acc,none"] <= 1 for metrics in found["choice"].values())


@pytest.mark.parametrize("arguments", [{"exit_layer": 3, "exit_layers": [1, 4]}, {"exit_layer": 5}, {"exit_layer": 0}])
def test_wrong_exits(arguments):
    with pytest.raises(ValueError, match="`exit_layer=.*from 1 to 4"):
        SortedLlamaLM(tiny_sorted(), tokenizer=tiny_tokenizer(), **arguments)
