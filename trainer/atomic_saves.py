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

# Folder, in the output folder, of what is being written; Trainer pushes nothing that begins with `_`
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
    _unfinished: Path | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self._unfinished is not None:  # part of a checkpoint
            super().save_model(output_dir, _internal_call=True)
            return
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            raise ValueError(
                "`fsdp_state_dict_type: SHARDED_STATE_DICT` keeps a model in shards, and it is saved whole: set "
                "FULL_STATE_DICT, or merge the last checkpoint with `accelerate merge-weights`."
            )
        folder = Path(output_dir or self.args.output_dir)
        unfinished = folder / UNFINISHED
        # Without a barrier: one process alone may call this
        with _one_at_a_time(folder, self.is_world_process_zero()):
            if self.args.should_save:
                _discard(unfinished)
            super().save_model(str(unfinished / "model"), _internal_call=True)
            if self.args.should_save:
                for config in CONFIGS:
                    (folder / config).unlink(missing_ok=True)
                for part in sorted((unfinished / "model").iterdir(), key=lambda part: part.name in CONFIGS):
                    target = folder / part.name
                    if target.name == "README.md" and target.exists():
                        continue  # PEFT makes one with every adapter
                    if target.is_dir():
                        shutil.rmtree(target)
                    part.replace(target)
                _discard(unfinished)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        checkpoint = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with _one_at_a_time(run_dir, self.is_world_process_zero()):
            self._write_checkpoint(model, trial, checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _write_checkpoint(self, model, trial: Any, checkpoint: Path) -> None:
        unfinished = checkpoint.with_name(UNFINISHED)
        written = unfinished / checkpoint.name
        if self.is_local_process_zero():
            _discard(unfinished)
            if not (checkpoint / STATE).is_file():  # transformers' `JITCheckpointCallback` marks the place at SIGTERM
                _discard(checkpoint)
        self.accelerator.wait_for_everyone()
        self._unfinished = unfinished
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._unfinished = None
        self.accelerator.wait_for_everyone()
        best = checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if best == checkpoint or best.exists():
            self.state.best_model_checkpoint = str(best)
        # The first process, and then those of other nodes, if their disks are their own
        for renames in (self.is_world_process_zero(), self.is_local_process_zero()):
            if renames and written.is_dir():
                if self.args.should_save:
                    self.state.save_to_json(str(written / STATE))
                if checkpoint.is_dir():  # of a former run, which is there until this one is
                    checkpoint.rename(unfinished / "former")
                written.rename(checkpoint)
                _discard(unfinished)
                self._discard_oldest(checkpoint.parent, newest=checkpoint)
            self.accelerator.wait_for_everyone()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # killed after its last checkpoint: there is nothing to do
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._unfinished or super()._get_output_dir(trial))

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
            if os.path.isdir(best):  # `Trainer` is about to delete all others where they stand
                run_dir = Path(super()._get_output_dir(trial))
                with _one_at_a_time(run_dir, self.is_world_process_zero()):
                    self._discard_oldest(run_dir)
            else:
                logger.warning(f"The best checkpoint, {best}, is not there any more: the model stays as it was last.")
                self.state.best_model_checkpoint = None
        return super()._finalize_training(trial, *args, **kwargs)

    def _discard_oldest(self, run_dir: Path, newest: Path | None = None) -> None:
        """Delete the checkpoints above `save_total_limit`, but for the newest and the best one."""
        found = [
            Path(path)
            for path in sort_checkpoints(str(run_dir), use_mtime=True)
            if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", os.path.basename(path))
        ]
        kept = {os.path.realpath(path) for path in (newest, self.state.best_model_checkpoint) if path is not None}
        others = [path for path in found if os.path.realpath(path) not in kept]
        surplus = len(found) - self.args.save_total_limit if (self.args.save_total_limit or 0) > 0 else 0
        for path in others[: max(surplus, 0)]:
            _discard(path)


@contextlib.contextmanager
def _one_at_a_time(folder: Path, locks: bool) -> Iterator[None]:
    """Wait while another run saves into `folder`, where the file system can tell."""
    if not locks or sys.platform == "win32":
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
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


def _discard(folder: Path) -> None:
    """Delete a folder, and what was left of others: renamed first, so that it is no checkpoint, and out of the way."""

    def leftovers():
        return folder.parent.glob(f"{UNFINISHED}.old-*")

    for left in leftovers():
        shutil.rmtree(left, ignore_errors=True)
    if folder.is_dir():
        with contextlib.suppress(OSError):  # a disk is full, or files of it are in use
            trash = tempfile.mkdtemp(prefix=f"{UNFINISHED}.old-", dir=folder.parent)
            folder.rename(Path(trash, folder.name))
            shutil.rmtree(trash, ignore_errors=True)
        if folder.name == UNFINISHED:  # no checkpoint: it may go piece by piece
            shutil.rmtree(folder, ignore_errors=True)
    for left in (*leftovers(), folder):
        if left.is_dir():
            logger.warning_once(f"{left} cannot be deleted now: it stays until the next save.")
