"""Checkpoints that are there as a whole or not at all, wherever a run is killed."""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, sort_checkpoints


# Folder, in the output folder, of what is being written or deleted; Trainer pushes nothing that begins with `_`
UNFINISHED = "_unfinished"
CONFIGS = ("config.json", "adapter_config.json")  # without one of them, a folder is no model


class AtomicSaves(Trainer):
    """
    A [`~transformers.Trainer`] writes a checkpoint straight into the folder that the next run resumes from. This one
    writes it into a folder beside, renamed once it is whole, and renames a checkpoint that is to be deleted before. So
    every `checkpoint-*` is complete, also after a `kill -9`, and `resume_from_checkpoint=True` works. A base class of
    other trainers: `class MyTrainer(AtomicSaves, SFTTrainer)`.
    """

    _unfinished: str | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:  # part of a checkpoint, or about to be pushed
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
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        super().save_model(unfinished, _internal_call=True)
        if self.args.should_save:
            for config in CONFIGS:
                if os.path.exists(os.path.join(output_dir, config)):
                    os.remove(os.path.join(output_dir, config))
            for name in sorted(os.listdir(unfinished), key=lambda name: name in CONFIGS):
                if os.path.isdir(os.path.join(output_dir, name)):
                    shutil.rmtree(os.path.join(output_dir, name))
                os.replace(os.path.join(unfinished, name), os.path.join(output_dir, name))
            os.rmdir(unfinished)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model, trial: Any) -> None:
        run_dir = super()._get_output_dir(trial)
        unfinished = os.path.join(run_dir, UNFINISHED)
        if self.is_local_process_zero():  # what a killed run may have left
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._unfinished = unfinished
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._unfinished = None
        self.accelerator.wait_for_everyone()
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        checkpoint = os.path.join(run_dir, name)
        if self.state.best_global_step:
            best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best == checkpoint or os.path.exists(best):
                self.state.best_model_checkpoint = best
        # The first process, and then those of other nodes, if their disks are their own
        for renames in (self.is_world_process_zero(), self.is_local_process_zero()):
            if renames and os.path.isdir(os.path.join(unfinished, name)):
                if self.args.should_save:
                    self.state.save_to_json(os.path.join(unfinished, name, "trainer_state.json"))
                if os.path.isdir(checkpoint):  # of a former run
                    os.rename(checkpoint, os.path.join(unfinished, "former"))
                os.rename(os.path.join(unfinished, name), checkpoint)
                self._delete_oldest(run_dir, unfinished)
                shutil.rmtree(unfinished)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(checkpoint)

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

    def _delete_oldest(self, run_dir: str, unfinished: str) -> None:
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        best = self.state.best_model_checkpoint
        checkpoints = sort_checkpoints(run_dir, use_mtime=True, best_model_checkpoint=best)
        for folder in checkpoints[: -max(limit, 1)]:
            if folder != best:
                os.rename(folder, os.path.join(unfinished, os.path.basename(folder)))
