"""The evaluation of a tiny model, step by step, and what is told before it begins."""

import json
import sys
from functools import partial

import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.hub_card import evaluate, evaluation, harness, load_evaluation
from sorted_llama.hub_card.card import write_card
from sorted_llama.hub_card.commands import main
from sorted_llama.hub_card.cost import cost_of_exit
from sorted_llama.hub_card.measure import answers, teacher_forced
from sorted_llama.hub_card.tasks import load_task
from tests.hub_card.records import EXITS, QUICK, cells, data, make_folder
from tests.tiny import save_tiny, tiny_llama, tiny_sorted, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def test_every_exit_and_mode_is_scored_and_timed(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/hub_card/__main__.py", "evaluate", "a model"])
    record = evaluate(str(folder / "model"), data(folder), **QUICK)
    assert record == load_evaluation(folder / "model") == load_evaluation(folder / "model" / "evaluation.json")
    model, tokenizer = tiny_sorted(initializer_range=0.2, exit_layers=EXITS), tiny_tokenizer()
    assert list(record["tasks"]) == ["trivia", "held_out"]
    for (kind, source), results in zip(data(folder), record["tasks"].values(), strict=True):
        task = load_task(kind, source, tokenizer)
        prompts = [row["prompt"] for row in task.rows]
        modes = {f"exit {k}": {"exit_layer": k} for k in EXITS} | {"threshold 0.5": {"exit_threshold": 0.5}}
        assert list(results["settings"]) == list(modes)
        for name, mode in modes.items():
            assert results["settings"][name] == task.score(
                answers(model, tokenizer, prompts, task.max_new_tokens, **mode)
            )
        read = teacher_forced(model, tokenizer, task.rows, EXITS)
        for i, k in enumerate(EXITS):
            assert results["exits"][str(k)]["loss"] == pytest.approx(read.losses[i].mean().item(), rel=1e-4)
            assert results["exits"][str(k)]["agreement"] == pytest.approx(read.agrees[i].float().mean().item())
        assert results["exits"]["4"]["agreement"] == 1.0
        assert [s["wanted_agreement"] for s in results["suggested_thresholds"]] == [0.9, 0.95, 0.99]
    assert list(record["speed"]) == [*modes, "draft 1", "draft 2"]
    assert record["exits"]["2"]["parameters"] == cost_of_exit(model, 2).parameters
    assert record["made_by"]["versions"]["torch"] == torch.__version__
    assert record["made_by"]["command"] == "sorted-llama evaluate 'a model'"


def test_a_stopped_evaluation_goes_on(folder, monkeypatch):
    asked, real = [], evaluation.answers

    def stopping(model, tokenizer, prompts, max_new_tokens, batch_size, progress, **decoding):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((progress, decoding))
        return real(model, tokenizer, prompts, max_new_tokens, batch_size, **decoding)

    monkeypatch.setattr(evaluation, "answers", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(str(folder / "model"), data(folder), **QUICK)
    before = load_evaluation(folder / "model")
    assert list(before["tasks"]["trivia"]["settings"]) == ["exit 1", "exit 2", "exit 4"]
    asked.clear()
    monkeypatch.setattr(evaluation, "answers", lambda *a, **kw: asked.append(a[5]) or real(*a[:5], **kw))
    record = evaluate(str(folder / "model"), data(folder), **QUICK)
    assert asked == ["trivia, threshold 0.5"] + [f"held_out, {name}" for name in record["tasks"]["trivia"]["settings"]]
    assert record["tasks"]["trivia"]["exits"] == before["tasks"]["trivia"]["exits"]
    assert record["made_by"] == before["made_by"]


def test_a_file_of_an_earlier_version_is_read_and_gone_on_with(folder):
    """It held fields that nothing reads."""
    path = folder / "model"
    record = evaluate(str(path), data(folder)[:1], **QUICK)
    old = json.loads(json.dumps(record))
    old["exits"]["1"]["weight_bytes"] = 5
    task = old["tasks"]["trivia"]
    task["kind"] = "qa"
    task["suggested_thresholds"][0]["agreement"] = 0.9
    task["exits"]["1"] |= {"expected_draft_speed_up": 1.2, "expected_drafts": 3}
    task["exits"]["1"]["reliability"]["bins"] = [{"confidence": 0.5, "agreement": 0.5, "share": 1.0}]
    del old["speed"], task["settings"]["threshold 0.5"]
    (path / "evaluation.json").write_text(json.dumps(old))
    write_card(path)
    again = evaluate(str(path), data(folder)[:1], **QUICK)
    assert again["request"] == record["request"] and again["made_by"] == record["made_by"]
    assert again["tasks"]["trivia"]["settings"] == record["tasks"]["trivia"]["settings"] and list(again["speed"])
    assert again["tasks"]["trivia"]["exits"] == task["exits"]
    write_card(path)


def test_a_task_of_the_harness_is_run_at_every_exit_and_shown(folder, monkeypatch):
    rows = [{"question": f"what is {i}?", "choices": [f" {i}", " none"]} for i in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "numbers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": 0,
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }
    monkeypatch.setattr(
        harness, "TaskManager", partial(TaskManager, include_defaults=False)
    )  # else thousands of files
    yaml_file = str(folder / "numbers.yaml")
    (folder / "numbers.yaml").write_text(yaml.safe_dump(task))
    record = evaluate(str(folder / "model"), harness_tasks=[yaml_file], **QUICK)
    by_exit = record["harness"][yaml_file]["numbers"]
    assert list(by_exit) == [str(k) for k in EXITS] and record == load_evaluation(folder / "model")
    monkeypatch.setattr(harness, "evaluate_harness", None)  # what is there is not run again
    assert evaluate(str(folder / "model"), harness_tasks=[yaml_file], **QUICK) == record
    write_card(folder / "model")
    page = (folder / "model" / "README.md").read_text()
    header, *shown = cells(page)[:4]
    assert header[1] == "numbers: acc,none"
    assert [row[1] for row in shown] == [f"{by_exit[str(k)]['acc,none']:.4g}" for k in EXITS]
    assert "acc, 1 of 4 layers" in page


def test_results_of_other_settings_are_kept(folder):
    evaluate(str(folder / "model"), data(folder)[:1], **QUICK)
    (folder / "trivia.jsonl").write_text('{"question": "another?", "answer": "no"}')
    with pytest.raises(ValueError, match="`output=.*holds results of another tasks.*`overwrite`"):
        evaluate(str(folder / "model"), data(folder)[:1], **QUICK)
    record = evaluate(str(folder / "model"), data(folder)[:1], overwrite=True, **QUICK)
    assert record["request"]["tasks"]["trivia"]["rows"] == 1
    model = SortedLlamaForCausalLM.from_pretrained(folder / "model")
    model.model.layers[0].mlp.down_proj.weight.data *= 1.5  # trained on
    model.save_pretrained(folder / "model")
    with pytest.raises(ValueError, match="holds results of another weights"):
        evaluate(str(folder / "model"), data(folder)[:1], **QUICK)


def test_thresholds_leave_at_the_exits_that_are_evaluated(folder):
    """What is evaluated at a threshold leaves at the exits that are evaluated."""
    save_tiny(folder / "plain", tiny_llama(initializer_range=0.2))
    record = evaluate(str(folder / "plain"), data(folder)[:1], exit_layers=[2, 4], **QUICK)
    model, tokenizer = tiny_sorted(initializer_range=0.2, exit_layers=[2, 4]), tiny_tokenizer()
    task = load_task(*data(folder)[0], tokenizer)
    said = answers(model, tokenizer, [r["prompt"] for r in task.rows], task.max_new_tokens, exit_threshold=0.5)
    assert record["tasks"]["trivia"]["settings"]["threshold 0.5"] == task.score(said)
    save_tiny(folder / "lens", tiny_sorted(exit_layers=EXITS, exit_heads="lens"))
    with pytest.raises(ValueError, match=r"those that the checkpoint has weights for, \[1, 2, 4\], got \[2, 4\]"):
        evaluate(str(folder / "lens"), data(folder)[:1], exit_layers=[2, 4], **QUICK)


def test_exits_may_be_every_nth_layer(folder, capsys):
    record = evaluate(str(folder / "model"), data(folder)[:1], exit_layers="every:2", **QUICK)
    assert record["request"]["exit_layers"] == [2, 4]
    quick = ["--exit_thresholds", "--num_timed", "1", "--max_new_tokens", "2", "--runs", "1", "--dtype", "float32"]
    output = ["--output", str(folder / "out.json")]
    for given, exits in (["every:3"], [3, 4]), (["1", "4"], [1, 4]):
        asked = ["--data", f"qa={folder / 'trivia.jsonl'}", *quick, *output, "--overwrite", "--exit_layers", *given]
        main(["evaluate", str(folder / "model"), *asked])
        assert load_evaluation(folder / "out.json")["request"]["exit_layers"] == exits
    for given, message in (["1", "x"], r"got \[1, 'x'\]"), (["1,4"], "got '1,4'"), (["every:0"], "got 'every:0'"):
        with pytest.raises(SystemExit, match=message):
            main(["evaluate", str(folder / "model"), "--data", "qa=x.jsonl", "--exit_layers", *given])


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "nothing to evaluate"),
        ({"output": "nowhere/results.json"}, "`output` must be"),
        ({"exit_layers": [1, 2]}, r"`exit_layers` must be .* to 4, .* got \[1, 2\]"),
        ({"exit_layers": []}, r"`exit_layers` must be .* got \[\]"),
        ({"exit_layers": "1,2,4"}, "`exit_layers` must be .* got '1,2,4'"),
        ({"exit_thresholds": [-0.1]}, "`exit_thresholds` must be a finite number of at least 0, got -0.1"),
        ({"exit_thresholds": [float("nan")]}, "`exit_thresholds` must be .* got nan"),
        ({"exit_thresholds": ["0.5"]}, "`exit_thresholds` must be .* got '0.5'"),
        ({"device": "cuda:99"}, "`device` must be one that torch finds here, got 'cuda:99'"),
        ({"device": "gpu"}, "`device` must be one that torch finds here, got 'gpu'"),
        ({"device": "meta"}, "`device` must be one that torch finds here, got 'meta'"),
        ({"output": "."}, "`output` must be a file"),
        ({"exit_layers": [2, 1, 4]}, "`exit_layers` must be"),
        ({"exit_layers": [0, 4]}, "`exit_layers` must be"),
        ({"drafts": [4]}, "`drafts` must be an integer from 1 to 3, got 4"),
        ({"runs": 0}, "`runs` must be an integer of at least 1, got 0"),
        ({"num_timed": 0}, "`num_timed` must be an integer of at least 1, got 0"),
        ({"limit": 0}, "`limit` must be an integer of at least 1, got 0"),
        ({"harness_tasks": ["no_such_task"]}, "lm-evaluation-harness has no task 'no_such_task'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_told_before_weights_are_loaded(folder, monkeypatch, options, message):
    monkeypatch.setattr(evaluation, "load_model", None)
    with pytest.raises(ValueError, match=message):
        evaluate(str(folder / "model"), data(folder) if options else (), **QUICK | options)
    assert not (folder / "model" / "evaluation.json").exists()


def test_two_files_of_one_name_are_refused(folder):
    (folder / "other").mkdir()
    (folder / "other" / "trivia.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(ValueError, match="`data` has two tasks named 'trivia'"):
        evaluate(
            str(folder / "model"), [data(folder)[0], ("completions", str(folder / "other" / "trivia.jsonl"))], **QUICK
        )


def test_an_evaluation_with_what_is_no_number_is_not_written(folder):
    model = tiny_sorted(exit_layers=EXITS)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    model.save_pretrained(folder / "model")
    with pytest.raises(ValueError, match="`tasks.trivia.exits.2.loss` must be a finite number, got nan"):
        evaluate(str(folder / "model"), data(folder)[:1], **QUICK)
    assert not (folder / "model" / "evaluation.json").exists()


def test_weights_that_are_missing_are_not_made_up(folder):
    weights = load_file(folder / "model" / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lack 1 tensors, model.layers.3.mlp.up_proj.weight"):
        evaluate(str(folder / "model"), data(folder)[:1], **QUICK)
    config = json.loads((folder / "model" / "config.json").read_text())
    for fault in ({"intermediate_size": 2 * config["intermediate_size"]}, {}):
        (folder / "model" / "config.json").write_text(json.dumps(config | fault))
        with pytest.raises(ValueError, match="The weights of .* could not be loaded"):
            evaluate(str(folder / "model"), data(folder)[:1], **QUICK)
        (folder / "model" / "model.safetensors").write_text("no weights")


def test_a_checkpoint_that_runs_at_an_exit_by_default_is_evaluated_at_all(folder):
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"exit_layer": 2}))
    record = evaluate(str(folder / "model"), data(folder)[:1], **QUICK)
    assert record["request"]["exit_layers"] == EXITS


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "held_out.jsonl"], "KIND=FILE"),
        (["--data", "poems=held_out.jsonl"], "`kind` must be one of"),
        ([], "nothing to evaluate"),
    ],
    ids=str,
)
def test_a_wrong_command_of_an_evaluation_is_told(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match=message):
        main(["evaluate", "model", *arguments])
