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
NAMES = [task["task"] for task in TASKS]


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
            for i in range(6)]  # fmt: skip
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


@pytest.fixture(scope="module")
def plain(checkpoint, manager):
    """What the harness's own model finds of each extracted sub-model."""
    return {
        k: samples(HFLM(str(checkpoint / f"plain{k}"), batch_size=3, dtype="float32", device="cpu"), manager, NAMES)
        for k in EXITS
    }


@pytest.mark.parametrize("k", [1, 4])
def test_the_harness_at_one_exit_is_the_sub_model(checkpoint, manager, plain, k):
    """`--model hf` with `exit_layer`, as it is: to the last digit."""
    arguments = {"batch_size": 3, "dtype": "float32", "device": "cpu"}
    at_exit = HFLM(str(checkpoint / "sorted"), trust_remote_code=True, exit_layer=k, **arguments)
    assert samples(at_exit, manager, NAMES) == plain[k]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_all_exits_are_scored_in_one_pass(checkpoint, manager, plain, batch_size, monkeypatch):
    lm = SortedLlamaLM(
        str(checkpoint / "sorted"), exit_layers=EXITS, batch_size=batch_size, dtype="float32", device="cpu"
    )
    passes, forward = [], lm.model.model.forward
    monkeypatch.setattr(lm.model.model, "forward", lambda *a, **kw: passes.append(1) or forward(*a, **kw))
    for k in EXITS:
        lm.exit_layer = k
        passes.clear()
        answers, results = samples(lm, manager, NAMES[:3])
        # 18 choices, 6 questions whose letters share a pass, 6 texts; the other exits are there already
        assert len(passes) == (sum(-(-n // batch_size) for n in (18 + 6, 6)) if k == EXITS[0] else 0)
        expected, expected_results = plain[k]
        for name in NAMES[:3]:
            assert numbers(answers[name]) == pytest.approx(numbers(expected[name]), rel=1e-4, abs=1e-4)
            for metric, value in expected_results[name].items():
                if isinstance(value, float):
                    assert results[name][metric] == pytest.approx(value, rel=1e-4)


def test_the_modes_of_the_harness_reach_generate(checkpoint, manager, plain):
    arguments = {"batch_size": 4, "dtype": "float32", "device": "cpu"}
    shallow, middle, full = (plain[k][0]["writing"] for k in EXITS)
    assert len({repr(answers) for answers in (shallow, middle, full)}) == 3
    ours = SortedLlamaLM(str(checkpoint / "sorted"), exit_layer=2, **arguments)
    theirs = HFLM(str(checkpoint / "sorted"), trust_remote_code=True, **arguments)
    for lm, mode, expected in (
        (ours, None, middle),
        (ours, {"assistant_early_exit": 1}, full),
        (ours, {"exit_threshold": 0.0}, shallow),
        (ours, {"exit_layer": 4}, full),
        (theirs, {"assistant_early_exit": 1}, full),
        (theirs, {"exit_threshold": 0.0}, shallow),
    ):
        assert samples(lm, manager, ["writing"], gen_kwargs=mode)[0]["writing"] == expected


def test_the_metrics_of_the_harness_are_by_exit(manager):
    model = tiny_sorted(initializer_range=0.2, exit_layers=EXITS)
    lm = SortedLlamaLM(model, exit_layers=EXITS, tokenizer=tiny_tokenizer(), batch_size=4)
    found = evaluate_harness(lm, EXITS, "choice", task_manager=manager, bootstrap_iters=0)
    assert list(found) == ["choice"] and list(found["choice"]) == [str(k) for k in EXITS]
    assert all(0 <= metrics["acc,none"] <= 1 for metrics in found["choice"].values())


@pytest.mark.parametrize("arguments", [{"exit_layer": 3, "exit_layers": [1, 4]}, {"exit_layer": 5}, {"exit_layer": 0}])
def test_wrong_exits_of_the_harness_are_refused(arguments):
    with pytest.raises(ValueError, match="`exit_layer=.*from 1 to 4"):
        SortedLlamaLM(tiny_sorted(), tokenizer=tiny_tokenizer(), **arguments)
