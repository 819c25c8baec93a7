"""Checkpoints that are there as a whole or not at all, wherever a run is killed."""

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, sort_checkpoints
from transformers.utils import logging


if sys.platform != "win32":
    import fcntl

logger = logging.get_logger(__name__)

# Folder, in the output folder, of what is being written or deleted; Trainer pushes nothing that begins with `_`
UNFINISHED = "_unfinished"
CONFIGS = ("config.json", "adapter_config.json")  # without one of them, a folder is no model
STATE = "trainer_state.json"  # the last file that is written into a checkpoint


class AtomicSaves(Trainer):
    """
    A base class for trainers, `class MyTrainer(AtomicSaves, SFTTrainer)`, whose every `checkpoint-*` is complete, also
    after a `kill -9`: a checkpoint is written into a folder beside, renamed once it is whole, and renamed before it is
    deleted. What cannot be deleted at once is told and left for the next save. Runs in one folder save one after the
    other.
    """

    # `Trainer` has no public hook for the folder of a checkpoint, for what is deleted when, or for a push from a
    # checkpoint: its private methods for these are overridden here, and nowhere else in this project
    _unfinished: str | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self._unfinished is not None:  # part of a checkpoint
            super().save_model(output_dir, _internal_call=True)
            return
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            raise ValueError(
                "A model is saved whole, and `fsdp_state_dict_type: SHARDED_STATE_DICT` keeps it in shards: set "
                "FULL_STATE_DICT, or merge the last checkpoint with `accelerate merge-weights`."
            )
        output_dir = output_dir or self.args.output_dir
        unfinished = os.path.join(output_dir, UNFINISHED)
        # Without a barrier: one process alone may call this
        with _one_at_a_time(output_dir, self.is_world_process_zero()):
            if self.args.should_save:
                _make_room(unfinished)
            whole = os.path.join(unfinished, "model")
            super().save_model(whole, _internal_call=True)
            if self.args.should_save:
                for config in CONFIGS:
                    if os.path.exists(os.path.join(output_dir, config)):
                        os.remove(os.path.join(output_dir, config))
                for name in sorted(os.listdir(whole), key=lambda name: name in CONFIGS):
                    if name == "README.md" and os.path.exists(os.path.join(output_dir, name)):
                        continue  # PEFT makes one with every adapter
                    if os.path.isdir(os.path.join(output_dir, name)):
                        shutil.rmtree(os.path.join(output_dir, name))
                    os.replace(os.path.join(whole, name), os.path.join(output_dir, name))
                _delete(unfinished)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model, trial: Any) -> None:
        run_dir = super()._get_output_dir(trial)
        checkpoint = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with _one_at_a_time(run_dir, self.is_world_process_zero()):
            self._write_checkpoint(model, trial, checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(checkpoint)

    def _write_checkpoint(self, model, trial: Any, checkpoint: str) -> None:
        run_dir, name = os.path.split(checkpoint)
        unfinished = os.path.join(run_dir, UNFINISHED)
        if self.is_local_process_zero():
            _make_room(unfinished)
            # transformers' `JITCheckpointCallback`, at SIGTERM, marks the place before it lets us write
            if os.path.isdir(checkpoint) and not os.path.isfile(os.path.join(checkpoint, STATE)):
                shutil.rmtree(checkpoint, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._unfinished = unfinished
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._unfinished = None
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step:
            best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best == checkpoint or os.path.exists(best):
                self.state.best_model_checkpoint = best
        # The first process, and then those of other nodes, if their disks are their own
        for renames in (self.is_world_process_zero(), self.is_local_process_zero()):
            if renames and os.path.isdir(os.path.join(unfinished, name)):
                if self.args.should_save:
                    self.state.save_to_json(os.path.join(unfinished, name, STATE))
                if os.path.isdir(checkpoint):  # of a former run
                    os.rename(checkpoint, os.path.join(unfinished, "former"))
                os.rename(os.path.join(unfinished, name), checkpoint)
                self._discard_oldest(run_dir, newest=checkpoint)
            self.accelerator.wait_for_everyone()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # killed after its last checkpoint: there is nothing to do
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return self._unfinished or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is not None:  # once it is whole
            return
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            # Trainer takes along the files that it knows, and remote code is none of them
            for code in Path(checkpoint_folder).glob("*.py"):
                shutil.copy(code, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        best = self.state.best_model_checkpoint
        if best is not None and self.args.should_save and self.args.save_total_limit == 1:
            # `Trainer` is about to delete all others where they stand
            if os.path.isdir(best):
                run_dir = super()._get_output_dir(trial)
                with _one_at_a_time(run_dir, self.is_world_process_zero()):
                    self._discard_oldest(run_dir)
            else:
                logger.warning(f"The best checkpoint, {best}, is not there any more: the model stays as it was last.")
                self.state.best_model_checkpoint = None
        return super()._finalize_training(trial, *args, **kwargs)

    def _discard_oldest(self, run_dir: str, newest: str | None = None) -> None:
        """Take away what is above `save_total_limit`: first by name, so that it is no checkpoint any more."""
        unfinished, limit = os.path.join(run_dir, UNFINISHED), self.args.save_total_limit or 0
        kept = {os.path.realpath(path) for path in (newest, self.state.best_model_checkpoint) if path is not None}
        found = [
            path
            for path in sort_checkpoints(run_dir, use_mtime=True)
            if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", os.path.basename(path))
        ]
        others = [path for path in found if os.path.realpath(path) not in kept]
        surplus = len(found) - max(limit, len(found) - len(others)) if limit > 0 else 0
        for path in others[: max(surplus, 0)]:
            os.makedirs(unfinished, exist_ok=True)
            try:
                os.rename(path, os.path.join(unfinished, os.path.basename(path)))
            except OSError as error:
                logger.warning_once(f"An old checkpoint stays: {error}.")
        _delete(unfinished)


@contextlib.contextmanager
def _one_at_a_time(folder: str, locks: bool) -> Iterator[None]:
    """Wait while another run saves into `folder`, where the file system can tell."""
    if not locks or sys.platform == "win32":
        yield
        return
    os.makedirs(folder, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning_once(f"Another run saves into {folder}: waiting for it.")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile holds it too
        os.close(descriptor)


def _make_room(folder: str) -> None:
    """Take away what a killed run, or files that were in use, have left of `folder`."""
    parent, name = os.path.split(folder)
    for left in (Path(folder), *Path(parent).glob(f"{name}.old-*")):
        shutil.rmtree(left, ignore_errors=True)
    if os.path.isdir(folder):  # files are still in use
        with contextlib.suppress(OSError):
            os.rename(folder, os.path.join(tempfile.mkdtemp(prefix=f"{name}.old-", dir=parent), name))


def _delete(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.isdir(folder):
        logger.warning_once(f"{folder} cannot be deleted now: it stays until the next save.")
