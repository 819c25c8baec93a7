"""The table of the exits: what it shows, and names that are no markup."""

import pytest
from datasets import Dataset
from transformers import TrainerState, TrainingArguments

from sorted_llama import ExitTableCallback
from tests.tiny import tiny_sorted
from tests.trainer.runs import EXITS, logged, make_data, make_trainer


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

NAMES = ["a[/b]", "[red]x", "set_exit_3_loss", "exit_1", "x_exit_3", "two\nlines", "up\x1b[2J", "straße", "\\["]


def printed(capsys, metrics):
    ExitTableCallback().on_evaluate(TrainingArguments("unused"), TrainerState(global_step=7), None, metrics=metrics)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_of_evaluation_sets_are_shown_as_they_are(tmp_path, capsys, name):
    """A training with a set of that name comes to its end, and its table has a row an exit."""
    data = {name: Dataset.from_list([{"text": "a tiny model"}])}
    trainer = make_trainer(
        tmp_path, eval_dataset=data, eval_strategy="steps", eval_steps=2, disable_tqdm=False, save_steps=2,
        save_strategy="steps",
    )  # fmt: skip
    trainer.train()
    out = capsys.readouterr().out
    shown = {"two\nlines": "two lines", "up\x1b[2J": "up [2J"}.get(name, name)
    assert f"eval_{shown}, step 2" in out
    assert out.count(", step 2") == 1
    for k in EXITS:
        (loss,) = logged(trainer, f"eval_{name}_exit_{k}_loss")
        assert f"{loss:.4g}" in out.split(f"eval_{shown}, step 2")[1]
    trainer.create_model_card()


def test_several_sets_have_a_table_each(capsys):
    rows = {f"eval_{s}_exit_{k}_{m}": 0.5 for s in ("a", "a_exit_2") for k in (2, 4) for m in ("loss", "agreement")}
    out = printed(capsys, {**rows, "eval_a_loss": 0.5, "eval_a_exit_2_loss": 0.25, "eval_a_exit_2_exit_2_loss": 0.125})
    assert "eval_a, step 7" in out and "eval_a_exit_2, step 7" in out and out.count("step 7") == 2


@pytest.mark.parametrize("metrics", [None, {}, {"eval_loss": 1.0}, {"eval_exit_3_loss": 1.0}], ids=str)
def test_nothing_of_exits_is_no_table(capsys, metrics):
    assert printed(capsys, metrics) == ""


def test_one_evaluation_set_has_a_table(tmp_path, capsys):
    trainer = make_trainer(tmp_path, eval_dataset=make_data(), disable_tqdm=False)
    trainer.evaluate()
    out = capsys.readouterr().out
    assert "eval, step 0" in out and all(word in out for word in ("exit", "loss", "mean token accuracy", "agreement"))


def test_the_trainer_prints_a_table_a_set_until_the_callback_is_removed(tmp_path, capsys):
    trainer = make_trainer(
        tmp_path, tiny_sorted(), eval_dataset={"a": make_data(), "b": make_data()}, disable_tqdm=False,
        eval_strategy="steps", eval_steps=1, max_steps=1,
    )  # fmt: skip
    trainer.train()
    printed = capsys.readouterr().out
    for dataset in ("a", "b"):
        assert f"eval_{dataset}, step 1" in printed
        for k in EXITS:
            (loss,) = logged(trainer, f"eval_{dataset}_exit_{k}_loss")
            assert any(f" {k} " in line and f"{loss:.4g}" in line for line in printed.splitlines())
    trainer.remove_callback(ExitTableCallback)
    trainer.evaluate()
    assert "step 1" not in capsys.readouterr().out
