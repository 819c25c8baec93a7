"""Runs that are killed: `kill -9` at any file that is written, renamed or deleted, and at random moments."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager
from transformers.trainer_utils import get_last_checkpoint

from tests.tiny import tiny_llama
from tests.trainer.runs import BEST_IS_NOT_LAST, EXITS, assert_equal_weights, make_trainer


OPTIONS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "exit_schedule": "random"}
WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


def train(folder: Path, options: dict, kill_at: int | None = None, count=None, by=signal.SIGKILL) -> None:
    """Resume what is in `folder` and end it; killed before the `kill_at`-th change of a file there."""
    changes = 0

    def before_change(event, arguments):
        nonlocal changes
        written = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if (written or event in WRITES) and str(arguments[0]).startswith(str(folder)):
            changes += 1
            if count is not None:
                count.value = changes
            if changes == kill_at:
                os.kill(os.getpid(), by)

    sys.addaudithook(before_change)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared by all processes, and stays locked where one is killed
    trainer = make_trainer(folder, tiny_llama(), **options)
    trainer.train(resume_from_checkpoint=True if get_last_checkpoint(folder) else None)
    trainer.save_model()


def run(folder, options, kill_at=None, seconds=None, by=signal.SIGKILL):
    """In a process of its own: whether it came to its end, and how many files it changed."""
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("fork")  # torch is loaded already
    count = context.Value("i", 0, lock=False)
    process = context.Process(target=train, args=(folder, options, kill_at, count, by))
    process.start()
    process.join(120 if seconds is None else seconds)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL, -by)
    return process.exitcode == 0, count.value


def check(folder, options):
    """Whatever looks like a checkpoint or like a model is one, and not too many."""
    checkpoints = list(folder.glob("checkpoint-*"))
    for checkpoint in checkpoints:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert checkpoint.name == f"checkpoint-{state['global_step']}"
        assert AutoModelForCausalLM.from_pretrained(checkpoint).config.exit_layers == EXITS
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.load(checkpoint / name, weights_only=False)
        best = state["best_model_checkpoint"]
        assert best is None or Path(best).parent == folder
    assert len(checkpoints) <= options["save_total_limit"] + 1
    if (folder / "config.json").exists():
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    start = time.monotonic()
    ended, changes = run(folder, OPTIONS)
    assert ended and changes > 50
    return load_file(folder / "model.safetensors"), changes, time.monotonic() - start


def assert_as_undisturbed(folder, undisturbed):
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == undisturbed[0].keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in undisturbed[0].items())
    assert {"checkpoint-5", "checkpoint-6"} <= {p.name for p in folder.glob("checkpoint-*")}
    assert not (folder / "_unfinished").exists()


def test_a_run_killed_at_any_file_is_resumed_to_the_same_weights(tmp_path, undisturbed):
    """Eight times, before a file of the output folder changes, so also within saves and deletions."""
    draw = random.Random(0)
    folder, kills = tmp_path / "run", 0
    for i in range(8):
        by = (signal.SIGKILL, signal.SIGTERM)[i % 2]
        ended, _ = run(folder, OPTIONS, kill_at=draw.randint(1, undisturbed[1] // 4), by=by)
        kills += not ended
        check(folder, OPTIONS)
    assert run(folder, OPTIONS)[0]
    assert kills >= 4
    assert_as_undisturbed(folder, undisturbed)


def test_a_run_killed_at_random_moments_is_resumed_to_the_same_weights(tmp_path, undisturbed):
    draw = random.Random(0)
    folder, kills = tmp_path / "run", 0
    for _ in range(7):
        kills += not run(folder, OPTIONS, seconds=0.6 * draw.uniform(0, undisturbed[2]))[0]  # it may be faster now
        check(folder, OPTIONS)
    run(folder, OPTIONS)
    assert kills >= 1  # as the machine has it
    assert_as_undisturbed(folder, undisturbed)


def test_best_checkpoint_survives(tmp_path):
    """It is not deleted, and its path is the one that it has in the end."""
    options = {**BEST_IS_NOT_LAST, "max_steps": 5, "save_total_limit": 2, "metric_for_best_model": "exit_1_loss"}
    trainer = make_trainer(tmp_path, tiny_llama(initializer_range=0.02), **options)
    trainer.train()
    best = f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_global_step < 5
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [best, "checkpoint-5"]
    for folder in (best, "checkpoint-5"):
        state = json.loads((tmp_path / folder / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / best)


def written(folder, name):
    """Another way to write the path of `folder`."""
    link = folder.parent / "link"
    link.symlink_to(folder)
    return {"./": f"./{folder.name}", "/": f"{folder}/", "..": f"{folder}/../{folder.name}", "link": str(link)}[name]


@pytest.mark.parametrize("name, limit", [("./", 1), ("/", 2), ("..", 1), ("link", 1), ("link", 2)])
def test_best_checkpoint_survives_however_its_folder_is_written(tmp_path, monkeypatch, name, limit):
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    options = {**BEST_IS_NOT_LAST, "max_steps": 4, "save_total_limit": limit, "metric_for_best_model": "exit_1_loss"}
    deleted = []
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **kw: (deleted.append(Path(path).name), rmtree(path, **kw)))
    trainer = make_trainer(written(folder, name), tiny_llama(initializer_range=0.02), **options)
    trainer.train()
    best = f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_global_step < 4
    assert {p.name for p in folder.glob("checkpoint-*")} == ({best} if limit == 1 else {best, "checkpoint-4"})
    assert_equal_weights(trainer.model, AutoModelForCausalLM.from_pretrained(folder / best), 0.0)
    assert not any(path.startswith("checkpoint-") for path in deleted)  # renamed before


def test_checkpoint_that_cannot_be_deleted_stays_for_the_next_save(tmp_path, monkeypatch):
    """A file of it is in use: the training goes on, and neither a model nor a checkpoint is made of what is left."""
    unlink, busy = os.unlink, ["checkpoint-1", "checkpoint-2"]

    def unlink_unless_busy(path, *args, dir_fd=None, **kwargs):
        where = os.path.abspath(path) if dir_fd is None else f"{os.readlink(f'/proc/self/fd/{dir_fd}')}/{path}"
        if where.endswith("model.safetensors") and any(f"/{name}/" in where for name in busy):
            raise OSError(16, "Device or resource busy", where)
        return unlink(path, *args, dir_fd=dir_fd, **kwargs)

    monkeypatch.setattr(os, "unlink", unlink_unless_busy)
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    for steps in (3, 4):  # the second run saves under the names of the first
        trainer = make_trainer(tmp_path, max_steps=steps, **options)
        trainer.train()
        trainer.save_model()
        assert trainer.state.global_step == steps
        assert [p.name for p in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{steps}"]
    assert any(tmp_path.glob("_unfinished*/**/model.safetensors"))
    busy.clear()
    trainer.save_model()
    assert not list(tmp_path.glob("_unfinished*"))
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_checkpoint_that_cannot_be_renamed_stays_whole(tmp_path, monkeypatch):
    rename = os.rename

    def rename_unless_busy(source, target):
        if Path(source) == tmp_path / "checkpoint-1":
            raise OSError(16, "Device or resource busy", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_unless_busy)
    make_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1).train()
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")


def test_only_what_a_run_saved_is_deleted(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    make_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1).train()
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-best", "checkpoint-3"}


class At(TrainerCallback):
    """Calls a function after a step."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.function()


def test_folder_that_vanishes_is_made_again(tmp_path):
    options = {**BEST_IS_NOT_LAST, "max_steps": 3, "save_total_limit": 1, "metric_for_best_model": "exit_1_loss"}
    vanish = At(2, lambda: shutil.rmtree(tmp_path / "out"))
    trainer = make_trainer(tmp_path / "out", tiny_llama(initializer_range=0.02), callbacks=[vanish], **options)
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.state.best_global_step < 3
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-3")


def test_runs_in_one_folder_take_turns(tmp_path):
    """Neither deletes what the other is writing, and both come to their ends."""
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)

    def train_with_the_other(seed):
        torch.set_num_threads(1)
        trainer = make_trainer(tmp_path, tiny_llama(seed), callbacks=[At(0, start.wait)], **options)
        trainer.train()
        trainer.save_model()

    processes = [context.Process(target=train_with_the_other, args=(seed,)) for seed in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    check(tmp_path, options)
    assert not list(tmp_path.glob("_unfinished*"))


def test_checkpoint_at_sigterm_is_whole_or_not_there(tmp_path):
    """transformers' `enable_jit_checkpoint` marks the place of a checkpoint before it is written."""
    seen = []
    trainer = make_trainer(tmp_path, callbacks=[At(1, lambda: CheckpointManager(trainer).execute_jit_checkpoint())])
    save = trainer._save_optimizer_and_scheduler
    trainer._save_optimizer_and_scheduler = lambda folder: (
        seen.append((tmp_path / "checkpoint-1").exists()),
        save(folder),
    )
    trainer.train()
    assert seen == [False]
    check(tmp_path, {"save_total_limit": 1})
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").exists()
    assert not (tmp_path / "checkpoint-1" / "checkpoint-is-incomplete.txt").exists()


def test_checkpoint_of_a_former_run_is_replaced(tmp_path):
    for learning_rate in (1e-3, 1e-2):
        trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, learning_rate=learning_rate)
        trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(saved, trainer.model.model.norm.weight)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-2", "README.md"}


def test_finished_run_is_resumed(tmp_path):
    """Not a step more, whatever is left of its last epoch."""
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    finished = make_trainer(tmp_path, **options)
    finished.train()
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert_equal_weights(resumed.model, finished.model, 0.0)


def test_sharded_weights_are_no_model(tmp_path):
    """FSDP's sharded state: what was saved before stays, and the error says what to set."""
    trainer = make_trainer(tmp_path)
    trainer.save_model()
    before = {path.name for path in tmp_path.iterdir()}
    trainer.is_fsdp_enabled = True
    trainer.accelerator.state.fsdp_plugin = SimpleNamespace(state_dict_type="StateDictType.SHARDED_STATE_DICT")
    try:
        with pytest.raises(ValueError, match="set FULL_STATE_DICT"):
            trainer.save_model()
    finally:
        del trainer.accelerator.state.fsdp_plugin
    assert {path.name for path in tmp_path.iterdir()} == before
