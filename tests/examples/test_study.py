"""`examples/study.py` on a tiny model: every kind of arm, a second sitting, the scores."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import save_tiny, tiny_llama


ROOT = Path(__file__).parents[2]
GSM8K = [
    {"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(12)
]


def run(study, folder, monkeypatch, *flags):
    """
    Run the script in `folder`; returns what it prints. The processes that it starts are this one, which has imported
    all that is slow to import, but for those of the arm `alone 2`.
    """
    start = subprocess.run

    def start_here(command, **options):
        assert command[0] == sys.executable and Path(command[1]).name == "study.py"
        if "alone 2" in command[-2]:
            env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            return start(command, **options, env=env, timeout=300)
        return subprocess.CompletedProcess(command, 0, main(command[1:]))

    def main(words):
        with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            patch.setattr(sys, "argv", list(map(str, words)))
            study.main()
        return printed.getvalue()

    monkeypatch.chdir(folder)
    monkeypatch.setattr(study.subprocess, "run", start_here)
    command = ["study.py", "--model", "model", "--small", "--max_steps", "2", "--num_held_out", "4"]
    command += ["--exit_layers", "1", "2", "4", "--results", "study.jsonl", "--seeds", "0"]
    return main([*command, *flags])


def test_what_is_there_is_not_run_again(study, tmp_path, monkeypatch):
    save_tiny(tmp_path / "model")
    (tmp_path / "gsm8k_train.jsonl").write_text("\n".join(map(json.dumps, GSM8K)))
    flags = ["--data", ".", "--tasks", "gsm8k"]
    first = run(study, tmp_path, monkeypatch, *flags, "--arms", "SFT", "alone 2")
    layers = ["layers, frozen", "layers, frozen, distilled, the last layer"]
    arms = ["SFT", "SFT+ICT", "alone 2", "SoFT", "lenses", *layers]
    second = run(study, tmp_path, monkeypatch, *flags, "--arms", *arms)
    assert "gsm8k, SFT, seed 0 ..." in first and "gsm8k, SFT, seed 0 ..." not in second

    results = [json.loads(line) for line in (tmp_path / "study.jsonl").read_text().splitlines()]
    by_arm = {r["arm"]: r for r in results}
    assert list(by_arm) == ["SFT", "alone 2", "SFT+ICT", "SoFT", "lenses", *layers] and len(results) == 7
    for arm, result in by_arm.items():
        assert list(result["exits"]) == (["2"] if arm == "alone 2" else ["1", "2", "4"])
        assert result["steps"] == 2 and result["seconds"] > 0 and result["peak_memory_mb"] > 0
        for values in result["exits"].values():
            assert values["loss"] > 0 and 0 <= values["score"] <= 1 and 0 <= values["agreement"] <= 1
    # ICT starts from SFT and leaves its full depth alone
    assert by_arm["SFT+ICT"]["exits"]["4"] == pytest.approx(by_arm["SFT"]["exits"]["4"])
    assert by_arm["SFT+ICT"]["exits"]["1"]["loss"] < by_arm["SFT"]["exits"]["1"]["loss"]
    hidden, vocabulary = 32, 259
    own = 2 * (hidden + hidden * vocabulary)
    assert by_arm["SFT+ICT"]["trained_parameters"] == own
    assert by_arm["SFT+ICT"]["stored_parameters"] == by_arm["SFT"]["stored_parameters"] + own
    own = 2 * (hidden + hidden * hidden)  # a lens for each exit below full depth
    assert by_arm["lenses"]["stored_parameters"] == by_arm["SFT"]["stored_parameters"] + own
    # Full depth as after SFT, but for the clipping and for 2 steps' rounding
    assert by_arm["lenses"]["exits"]["4"]["loss"] == pytest.approx(by_arm["SFT"]["exits"]["4"]["loss"], rel=1e-3)
    # Layers on SFT's weights leave them alone, and may begin as another one than the next
    frozen, last = by_arm["layers, frozen"], by_arm["layers, frozen, distilled, the last layer"]
    assert frozen["exits"]["4"] == last["exits"]["4"] == by_arm["SFT"]["exits"]["4"]
    own = sum(p.numel() for p in tiny_llama().model.layers[0].parameters()) + hidden
    assert frozen["trained_parameters"] == last["trained_parameters"] == 2 * own
    assert frozen["exits"]["1"]["loss"] != last["exits"]["1"]["loss"]
    assert by_arm["alone 2"]["trained_parameters"] < by_arm["SFT"]["trained_parameters"]

    table = (tmp_path / "study.md").read_text()
    assert table in second
    for arm, result in by_arm.items():
        for k, values in result["exits"].items():
            assert f"| {arm} | {k} | {values['loss']:.3f} | {values['score']:.3f} |" in table
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_tells_the_spread_over_seeds(study):
    def result(seed, loss):
        values = {"loss": loss, "score": 0.5, "agreement": 1.0}
        return {
            "task": "t", "arm": "SFT", "seed": seed, "metric": "exact match", "exits": {"4": values}, "seconds": 60.0,
            "cpu_seconds": 120.0, "peak_memory_mb": 10.0, "trained_parameters": 10**6, "stored_parameters": 10**6,
        }  # fmt: skip

    table = study.report([result(0, 1.0), result(1, 2.0)])
    assert (
        "| SFT | 4 | 1.500 ± 0.707 | 0.500 ± 0.000 | 1.000 ± 0.000 | 1.0 ± 0.0 | 2.0 ± 0.0 | 10 ± 0 | 1.0 | 1.0 |"
        in table
    )


@pytest.mark.parametrize(
    "metric, text, answer, value",
    [
        ("exact match", " Paris\nQuestion", "Paris", 1.0),
        ("exact match", "Paris is", "Paris", 0.0),
        ("exact match", "", "Paris", 0.0),
        ("final answer", "so 2+2=4\n#### 4\nQuestion", "#### 4", 1.0),
        ("final answer", "#### 40", "#### 4", 0.0),
        ("token F1", "The cat sat", "the cat", 2 / 3),
        ("token F1", "", "the cat", 0.0),
    ],
)
def test_an_answer_is_scored_as_its_task_says(study, metric, text, answer, value):
    assert study.SCORES[metric](text, answer) == pytest.approx(value)


def test_rows_held_out_are_not_trained_on(study, tmp_path):
    """And the split is the same every time."""
    (tmp_path / "gsm8k_train.jsonl").write_text("\n".join(map(json.dumps, GSM8K)))
    (tmp_path / "dolly_15k.jsonl").write_text(
        "\n".join(
            json.dumps(
                {"instruction": f"do\u2028 {i}", "context": "" if i % 2 else "given", "response": f"done {i}"},
                ensure_ascii=False,
            )
            for i in range(20)
        )
    )
    assert list(study.load_tasks(None, 3)) == ["facts"]
    tasks = study.load_tasks(tmp_path, 3)
    assert list(tasks) == ["facts", "gsm8k", "instructions"]
    assert len(tasks["instructions"].train) == 7
    for name, task in tasks.items():
        assert len(task.held_out) == 3
        assert task.held_out == study.load_tasks(tmp_path, 3)[name].held_out
        assert not [row for row in task.held_out if row in task.train]


WRONG = {
    "no_folder": (["--data", "nowhere"], "--data must be a folder, got nowhere"),
    "broken_data": (["--data", "broken"], "gsm8k_train.jsonl, line 2"),
    "columns": (["--data", "columns"], "gsm8k_train.jsonl, line 1: there must be question, answer"),
    "model_offline": (["--model", "user/model"], "user/model"),
    "wrong_types": (["--model", "types"], "hidden_size"),
    "comma_list": (["--exit_layers", "1,2,4"], "'1,2,4'"),
    "not_ascending": (["--exit_layers", "2", "1", "4"], "must be a list of integers from 1 to 4, ascending"),
    "too_deep": (["--exit_layers", "2", "5"], "from 1 to 4, ascending"),
    "task": (["--tasks", "gsm8k"], "--tasks must be of facts, got gsm8k"),
    "arm": (["--arms", "sft"], "--arms must be of SFT, "),
    "order": (["--arms", "SFT+ICT"], "--arms SFT SFT+ICT"),
    "broken_results": (["--results", "broken.jsonl"], "broken.jsonl, line 1"),
    "no_results": (["--report"], "holds no runs"),
}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("flags, said", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line_before_a_model_is_loaded(study, tmp_path, monkeypatch, flags, said):
    save_tiny(tmp_path / "model")
    for folder, lines in (("broken", '{"question": "a", "answer": "b"}\n{"quest'), ("columns", '{"question": "a"}\n')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "gsm8k_train.jsonl").write_text(lines)
    (tmp_path / "types").mkdir()
    (tmp_path / "types" / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}')
    (tmp_path / "broken.jsonl").write_text('{"task": "facts", "ar')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study.subprocess, "run", None)
    monkeypatch.setattr(sys, "argv", ["study.py", "--model", "model", "--results", "study.jsonl", *flags])
    with pytest.raises(SystemExit) as error:
        study.main()
    assert said in error.value.code and "\n" not in error.value.code


def test_exits_are_named_by_numbers_or_their_spacing(study):
    assert study.read_exits(["every:2"], 5) == [2, 4, 5] and study.read_exits(["1", "4"], 4) == [1, 4]
    assert study.read_exits(None, 30) == [10, 15, 20, 30]
