"""`examples/demo.py` on a tiny model: what it leaves, how it goes on, how it fits its time, what it refuses."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sorted_llama.hub_card import commands
from tests.tiny import save_tiny, tiny_sorted, tiny_tokenizer


ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"count to {n}:", "completion": " " + " ".join(map(str, range(n % 7 + 1)))} for n in range(40)]


def run(folder, *command):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture
def inputs(tmp_path):
    save_tiny(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


def test_a_run_leaves_a_checkpoint_and_an_interrupted_one_goes_on(demo, inputs, monkeypatch, capsys):
    command = [ROOT / "examples" / "demo.py", "--model", "model", "--data", "data.jsonl", "--max_steps", "3"]
    first = run(inputs, *command)
    for noise in ("FutureWarning", "Loading weights", "Map", "examples/s", "Writing model shards"):
        assert noise not in first.stderr, noise
    for bar in ("decoding speed", "reading answers", "exit 1", "exit 2", "exit 4"):
        assert first.stderr.count(f"{bar}: 100%") >= 2, bar  # before and after
    folder = inputs / "out" / "demo"
    final = folder / "final"
    page = (final / "README.md").read_text()
    assert 'name = "out/demo/final"' in page and "| optimization | 3 steps of 16 rows" in page
    assert not list(folder.rglob("checkpoint-*")) and not (folder / "README.md").exists()

    assert "No certificate: `risk=0.05` with `delta=0.05` takes 59 prompts" in first.stdout

    held_out = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    assert len(held_out) == 4 and all(row in ROWS for row in held_out)
    # From here on in this process, which has imported all that is slow to import
    monkeypatch.chdir(inputs)
    told = re.findall(r"^  \.venv/bin/sorted-llama (.*)$", first.stdout, re.MULTILINE)
    evaluate, certify, card = told
    assert [line.split()[0] for line in told] == ["evaluate", "certify", "card"]
    with pytest.raises(SystemExit, match="takes 59 prompts to test.*got 4"):
        commands.main(certify.split())
    for line in (evaluate, card):
        quick = ["--runs", "1", "--num_timed", "1", "--max_new_tokens", "4"] if "evaluate" in line else []
        commands.main([*line.split(), *quick])
    evaluation = json.loads((final / "evaluation.json").read_text())
    assert evaluation["request"]["exit_layers"] == [1, 2, 4]
    assert "| optimization | 3 steps of 16 rows" in (final / "README.md").read_text()

    # Interrupted before its end, it goes on with what it had planned
    state = json.loads((folder / "demo.json").read_text())
    del state["after"]
    state["plan"] |= {"steps": 2, "num_questions": 3}
    (folder / "demo.json").write_text(json.dumps(state))
    monkeypatch.setattr(demo, "hide_what_others_print", lambda: None)
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    capsys.readouterr()
    demo.main()
    second = capsys.readouterr().out
    assert "Going on with the interrupted run" in second and "Measuring" not in second
    assert "Plan: 2 steps" in second and "3 questions" in second
    assert [r["loss"] for r in json.loads((folder / "demo.json").read_text())["before"]] == [
        r["loss"] for r in state["before"]
    ]
    assert len((folder / "held_out.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("step", [0.01, 0.7, 3.5, 100.0])
@pytest.mark.parametrize("question", [0.01, 0.2, 1.0])
def test_what_fits_takes_the_time_and_not_more(plan, step, question):
    steps, questions = plan.fit(440, 400, 400, step=step, question=question, speed=10)
    assert 40 <= steps <= 400 and plan.MIN_QUESTIONS <= questions <= 400
    taken = steps * step + plan.ROUNDS * (10 + questions * question)
    if steps > 40:  # less shows nothing
        assert taken <= 440
    if steps < 400:
        assert taken + step > 440
    if (steps, questions) != (400, 400) and questions > plan.MIN_QUESTIONS:  # the rest is for training
        assert plan.ROUNDS * (10 + questions * question) <= plan.ANSWERS * 440
    if 400 * step + plan.ROUNDS * (10 + 400 * question) <= 440:
        assert (steps, questions) == (400, 400)


def test_a_dtype_that_is_emulated_is_not_tried(plan, monkeypatch):
    seconds_of = plan.seconds_of
    monkeypatch.setattr(plan, "seconds_of", lambda run, dtype: {"bfloat16": 5.0, "float32": 1.0}[dtype])
    assert plan.is_emulated("bfloat16", torch.device("cpu"))
    monkeypatch.setattr(plan, "seconds_of", seconds_of)
    monkeypatch.setattr(plan, "is_emulated", lambda dtype, device: dtype == "bfloat16")
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *args, enabled: autocast(*args, enabled=tried(enabled)))

    def tried(enabled):
        assert not enabled
        return enabled

    made = make_plan(plan)
    assert made.train_dtype == made.answer_dtype == "float32"


def test_each_part_has_the_dtype_that_is_faster_for_it(plan, monkeypatch):
    """One row in bfloat16, many in float32, training in bfloat16: as measured here by clocks that say so."""
    speeds = {torch.float32: 10.0, torch.bfloat16: 20.0}
    monkeypatch.setattr(
        plan, "decoding_speeds", lambda model, *_, **__: {"": SimpleNamespace(best=speeds[model.dtype])}
    )
    monkeypatch.setattr(plan, "is_emulated", lambda dtype, device: False)
    seconds = {torch.float32: 1.0, torch.bfloat16: 3.0, "float32": 2.0, "bfloat16": 1.0}
    monkeypatch.setattr(plan, "seconds_of", lambda run, argument: seconds[getattr(argument, "dtype", argument)])
    made = make_plan(plan)
    assert (made.train_dtype, made.answer_dtype, made.decode_dtype) == ("bfloat16", "float32", "bfloat16")
    assert made.step_seconds == pytest.approx(1.35)
    speed, question = 4 * 7 / 4 * 24 / 20, (1 + 7 / 4) * 1.0 / 4  # four turns of 24 tokens; 4 prompts took a second
    assert made.answer_seconds == pytest.approx(speed + 4 * question)


def test_the_measured_batch_is_typical(plan):
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": "a" * n, "completion": " b"} for n in (*range(1, 20), 60)]
    batch = plan.typical_batch(tokenizer, rows, 4)
    lengths = batch["attention_mask"].sum(1)
    assert lengths.float().mean() == pytest.approx(sum(len(row["prompt"]) + 3 for row in rows) / len(rows), abs=2)
    for labels, ids, length in zip(batch["labels"], batch["input_ids"], lengths, strict=True):
        assert labels[length - 3 : length].tolist() == ids[length - 3 : length].tolist()  # " b" and the end
        assert (labels != -100).sum() == 3


def make_plan(plan):
    model = {"float32": tiny_sorted, "bfloat16": lambda: tiny_sorted().to(torch.bfloat16)}
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    arguments = {"exits": [1, 2, 4], "max_steps": 5, "deadline": time.monotonic() + 600}
    return plan.make_plan(lambda dtype: model[dtype](), tokenizer, ROWS[4:], ROWS[:4], **arguments)


def test_a_plan_of_a_tiny_model(plan):
    made = make_plan(plan)
    assert (made.steps, made.num_questions) == (5, 4)
    assert {made.train_dtype, made.answer_dtype, made.decode_dtype} <= {"float32", "bfloat16"}
    assert 0 < made.step_seconds < 10 and 0 < made.answer_seconds < 100


WRONG = {
    "no_file": (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "empty": (["--data", "empty.jsonl"], "empty.jsonl"),
    "broken": (["--data", "broken.jsonl"], "broken.jsonl"),
    "columns": (["--data", "columns.jsonl"], "Row 0 of `--data` lacks a prompt"),
    "one_row": (["--data", "one.jsonl"], "at least 2 rows"),
    "dataset_offline": (["--data", "user/data"], "user/data"),
    "model_offline": (["--model", "user/model"], "user/model"),
    "no_model": (["--model", "data.jsonl"], "data.jsonl"),
    "not_a_llama": (["--model", "gpt2"], "gpt2"),
    "wrong_types": (["--model", "types"], "hidden_size"),
    "one_layer": (["--model", "shallow"], "needs a model of two layers or more, which shallow has not"),
    "no_steps": (["--max_steps", "0"], "--max_steps"),
    "no_time": (["--minutes", "-1"], "--minutes"),
    "output": (["--output_dir", "data.jsonl"], "data.jsonl"),
}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("flags, said", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line_before_a_model_is_loaded(demo, inputs, monkeypatch, flags, said):
    (inputs / "empty.jsonl").write_text("")
    (inputs / "broken.jsonl").write_text('{"prompt": "a", "compl')
    (inputs / "columns.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (inputs / "one.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (inputs / "gpt2").mkdir()
    (inputs / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    (inputs / "types").mkdir()
    (inputs / "types" / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}')
    save_tiny(inputs / "shallow", tiny_sorted(num_hidden_layers=1, exit_layers=[1]))
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(demo, "hide_what_others_print", lambda: None)
    monkeypatch.setattr(demo.SortedLlamaForCausalLM, "from_pretrained", None)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", "model", "--data", "data.jsonl", *flags])
    with pytest.raises(SystemExit) as error:
        demo.main()
    assert said in error.value.code and "\n" not in error.value.code
