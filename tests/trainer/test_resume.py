"""Resuming: what an optimizer's states belong to has to be what is trained now."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTTrainer

from tests.tiny import tiny_llama, tiny_sorted
from tests.trainer.runs import EXITS, assert_equal_weights, logged, make_trainer


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SAVES = {"save_strategy": "steps", "save_steps": 2}
LENSES = {"exit_heads": "lens", "exit_layers": [1, 4]}


def lora():
    return LoraConfig(r=2, target_modules=["q_proj"])


def weights_of(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    "then, now, different",
    [
        (LENSES, {**LENSES, "exit_layers": [2, 4]}, ["exit_layers=[1, 4]", "exit_layers=[2, 4]"]),
        (LENSES, {"exit_layers": [4]}, ["exit_layers=[1, 4]", "exit_layers=[4]", "exit_heads='lens'"]),
        ({"exit_layers": [4]}, LENSES, ["exit_layers=[4]", "exit_heads='shared'"]),
        ({"exit_layers": [1, 4], "save_only_model": True}, {"exit_layers": [2, 4]}, ["exit_layers=[1, 4]"]),
        ({}, {"trainable": "exits"}, ["trainable='all'", "trainable='exits'"]),
        (LENSES, {**LENSES, "exit_learning_rate": 0.1}, ["exit_learning_rate=None", "exit_learning_rate=0.1"]),
        (
            {"peft_config": True, "exit_layers": [1, 4]},
            {"peft_config": True, "exit_layers": [2, 4]},
            ["exit_layers=[1, 4]"],
        ),
    ],
    ids=str,
)
def test_other_exits_are_refused_before_anything_is_changed(tmp_path, then, now, different):
    then, now = ({**o, "peft_config": lora()} if "peft_config" in o else o for o in (then, now))
    make_trainer(tmp_path, **SAVES, **then).train()
    trainer = make_trainer(tmp_path, max_steps=3, **now)
    before = weights_of(trainer)
    for checkpoint in (True, str(tmp_path / "checkpoint-2"), tmp_path / "checkpoint-2"):
        with pytest.raises(ValueError, match="`resume_from_checkpoint`") as error:
            trainer.train(resume_from_checkpoint=checkpoint)
        assert all(part in str(error.value) for part in [*different, "checkpoint-2", "as `model`"])
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    "then, now",
    [
        ({"exit_layers": "every:2"}, {"exit_layers": [2, 4]}),
        ({"exit_layers": [2, 4]}, {"exit_layers": np.array([2, 4])}),
        (LENSES, LENSES),
        ({}, {"exit_loss_weights": "linear", "exit_schedule": "random", "self_distillation_weight": 1.0}),
        ({"peft_config": True}, {"peft_config": True}),
        ({}, {"restore_callback_states_from_checkpoint": True}),
    ],
    ids=str,
)
def test_the_same_exits_go_on(tmp_path, then, now):
    then, now = ({**o, "peft_config": lora()} if "peft_config" in o else o for o in (then, now))
    make_trainer(tmp_path, **SAVES, **then).train()
    trainer = make_trainer(tmp_path, **SAVES, max_steps=4, **now)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    third = make_trainer(tmp_path, **SAVES, max_steps=6, **now)
    third.train(resume_from_checkpoint=True)
    assert third.state.global_step == 6


def test_what_the_error_says_is_possible(tmp_path):
    """Other exits from the checkpoint's weights: they are loaded as the model."""
    make_trainer(tmp_path / "then", **SAVES, **LENSES).train()
    trainer = make_trainer(tmp_path / "now", str(tmp_path / "then" / "checkpoint-2"), exit_layers=[1, 2, 4])
    assert trainer.model.config.exit_heads == "lens"
    trainer.train()


def forget_exits(checkpoint: Path) -> None:
    """Make of a checkpoint one that was written before it noted what was trained."""
    file = checkpoint / "trainer_state.json"
    state = json.loads(file.read_text())
    assert state["stateful_callbacks"].pop("_TrainedAs")["args"]["exit_layers"] == EXITS
    file.write_text(json.dumps(state))


def test_older_checkpoint_is_known_by_its_config(tmp_path):
    finished = make_trainer(tmp_path / "whole", max_steps=4)
    finished.train()
    make_trainer(tmp_path / "out", **SAVES, max_steps=4).train()
    forget_exits(tmp_path / "out" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"exit_layers=\[1, 2, 4\]"):
        make_trainer(tmp_path / "out", exit_layers=[1, 4]).train(str(tmp_path / "out" / "checkpoint-2"))
    resumed = make_trainer(tmp_path / "out", **SAVES, max_steps=4)
    resumed.train(str(tmp_path / "out" / "checkpoint-2"))
    assert_equal_weights(resumed.model, finished.model, 1e-6)
    assert "_TrainedAs" in (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text()


def test_checkpoint_of_sft_is_no_checkpoint_of_soft(tmp_path):
    make_trainer(tmp_path, trainer_class=SFTTrainer, **SAVES).train()
    with pytest.raises(ValueError, match=r"exit_layers=None.*as `model`"):
        make_trainer(tmp_path, max_steps=3).train(resume_from_checkpoint=True)


def test_adapter_of_unknown_exits_goes_on_with_a_warning(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("sorted_llama.trainer.sorted_sft_trainer.logger.warning", said.append)
    make_trainer(tmp_path, trainer_class=SFTTrainer, peft_config=lora(), **SAVES).train()
    trainer = make_trainer(tmp_path, max_steps=3, peft_config=lora())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert len(said) == 1 and "does not say which exits" in said[0]


def test_no_checkpoint_is_said_by_transformers(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
    assert make_trainer(tmp_path, tiny_llama()).train(resume_from_checkpoint=False).global_step == 2


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_is_as_one_without_the_stop(tmp_path, lora):
    """Stopped after three of six steps and resumed: losses and weights as without the stop."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}

    def run(folder, callbacks=(), resume=None):
        peft_config = {"peft_config": LoraConfig(r=2)} if lora else {}
        trainer = make_trainer(folder, tiny_sorted(), callbacks=list(callbacks), **options, **peft_config)
        assert trainer.args.gradient_checkpointing
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    run(tmp_path / "stopped", [_StopAt(3)])
    resumed = run(tmp_path / "stopped", resume=True)
    for key in ("loss", *(f"exit_{k}_loss" for k in EXITS), "exit_1_mean_token_accuracy"):
        assert len(logged(resumed, key)) == 6
        assert logged(resumed, key) == pytest.approx(logged(whole, key), rel=1e-6), key
    assert_equal_weights(resumed.model, whole.model, 1e-6)


def test_a_resumed_random_schedule_goes_on(tmp_path):
    """Stopped after three of six steps and resumed: the exits that were to come, and the same weights."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "exit_schedule": "random"}
    whole = make_trainer(tmp_path / "whole", tiny_sorted(), **options)
    whole.train()
    resumed = make_trainer(tmp_path / "whole", tiny_sorted(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_equal_weights(resumed.model, whole.model, 1e-6)


def test_a_resumed_run_keeps_the_learning_rate_of_the_exits(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "exit_heads": "lens", "detach_exits": True}
    options |= {"exit_learning_rate": 0.02, "exit_schedule": "random"}
    whole = make_trainer(tmp_path, tiny_llama(), **options)
    whole.train()
    resumed = make_trainer(tmp_path, tiny_llama(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal_weights(resumed.model, whole.model, 1e-6)
    assert resumed.optimizer.param_groups[-1]["initial_lr"] == 0.02
