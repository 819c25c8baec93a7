"""The page that a training leaves: its blocks, its recipe, its calls."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from tests.tiny import save_tiny, tiny_sorted
from tests.trainer.runs import EXITS, make_data, make_trainer
from trainer.model_card import has_blocks, set_block


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@given(st.text(), st.text(), st.text(), st.text())
def test_only_the_block_changes(before, old, after, new):
    page = "{}<!-- sorted-llama: use -->\n{}\n<!-- /sorted-llama: use -->{}"
    found = set_block(page.format(before, old.strip(), after), "use", new)
    assert found == page.format(before, new.strip(), after)
    assert set_block(found, "exits", "x") == found and has_blocks(found) and not has_blocks("<!-- use -->")


def page_of(trainer, tmp_path):
    trainer.create_model_card()
    return (tmp_path / "README.md").read_text()


def test_recipe_and_evaluation(tmp_path):
    options = {"exit_loss_weights": "linear", "exit_schedule": "random", "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(tmp_path, eval_dataset=make_data(), exit_heads="lens", **options)
    trainer.train()
    page = page_of(trainer, tmp_path)
    assert f"# {tmp_path.name}" in page
    assert "| exits | 1, 2, 4 |" in page
    assert "| weights of their losses | 0.25, 0.5, 1; sum |" in page
    assert "| exits a step | random, 1 beside full depth |" in page
    assert "| exit heads | lens |" in page
    assert "2 steps of 2 rows" in page and "learning rate 0.001 (linear), seed 42" in page
    assert "self-distillation" not in page.split("## Training")[1]
    metrics = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    for k in EXITS:
        values = [metrics[f"eval_exit_{k}_{name}"] for name in ("loss", "mean_token_accuracy", "agreement")]
        assert f"| {k} | {values[0]:.3f} | {100 * values[1]:.1f} % | {100 * values[2]:.1f} % |" in page
    assert "Not evaluated yet" in page and "tags:" in page and "sorted-llama" in page


@pytest.mark.parametrize("lora", [False, True])
def test_calls_run_as_they_stand(tmp_path, lora):
    base = save_tiny(tmp_path / "base", tiny_sorted(exit_layers=EXITS))
    options = {}
    if lora:  # whose exits own weights, which the base that the page loads has to have a place for
        saved = [f"exit_norms.{k}" for k in EXITS[:-1]]
        options = {"peft_config": LoraConfig(r=2, modules_to_save=saved), "exit_heads": "lens", "detach_exits": True}
        options["exit_learning_rate"] = 0.1
    trainer = make_trainer(tmp_path / "out", str(base), save_strategy="steps", save_steps=2, **options)
    trainer.train()
    trainer.save_model()
    page = page_of(trainer, tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert ("PeftModel" in code) == lora
    names: dict = {}
    exec(code.split("model.generate")[0], names)
    for call in re.findall(r"^model\.generate.*$", code, re.MULTILINE):
        assert eval(call, names).shape[1] > names["inputs"]["input_ids"].shape[1]
    inputs = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        for k in EXITS:
            expected = trainer.model.eval()(inputs, exit_layer=k).logits
            torch.testing.assert_close(names["model"].eval()(inputs, exit_layer=k).logits, expected)
