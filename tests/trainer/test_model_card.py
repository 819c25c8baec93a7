"""The page that a training leaves: its blocks, its recipe, its calls."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoTokenizer

from sorted_llama.trainer.model_card import has_blocks, new_page, set_block
from tests.tiny import run_as_stranger, save_tiny, tiny_sorted
from tests.trainer.runs import EXITS, make_data, make_trainer


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@given(st.text(), st.text(), st.text(), st.text())
def test_only_the_block_changes(before, old, after, new):
    page = "{}\n<!-- sorted-llama: use -->\n{}\n<!-- /sorted-llama: use -->\n{}"
    found = set_block(page.format(before, old.strip(), after), "use", new)
    assert found == page.format(before, new.strip(), after)
    assert set_block(found, "exits", "x") == found and has_blocks(found) and not has_blocks("<!-- use -->")


@pytest.mark.parametrize("mark", ["<!-- /sorted-llama: use -->", "<!-- sorted-llama: exits -->"])
@pytest.mark.parametrize("content", ["x{}y", "x\n{}\ny", "{}"])
def test_a_mark_in_the_content_ends_nothing(mark, content):
    page = "<!-- sorted-llama: use -->\n<!-- /sorted-llama: use -->\n\nThe end.\n"
    once = set_block(page, "use", content.format(mark))
    assert set_block(once, "use", content.format(mark)) == once
    assert set_block(once, "use", "") == set_block(page, "use", "") and set_block(once, "exits", "x") == once


def test_a_mark_in_the_metadata_begins_nothing():
    page = "---\nname: <!-- sorted-llama: use -->\n---\n<!-- sorted-llama: use -->\n<!-- /sorted-llama: use -->\n"
    assert set_block(page, "use", "new").startswith("---\nname: <!-- sorted-llama: use -->\n---\n")


def test_names_in_the_template_are_text():
    data = ModelCardData(base_model=["base/llama", "a](b)"], tags=["x"])
    page = new_page(data, "a\n# b <!-- /sorted-llama: about -->", "a|b")
    assert "# a \\# b &lt;!-- /sorted-llama: about --" in page and page.count("\n# ") == 1
    assert "Made from [base/llama](https://huggingface.co/base/llama), [a\\](b)](https://huggingface.co/a%5D" in page
    assert "on [a\\|b](https://huggingface.co/datasets/a%7Cb)." in page
    assert "title     = {{Sorted LLaMA: Unlocking" in page and "{{ " not in page and "{%" not in page


def page_of(trainer, tmp_path):
    trainer.create_model_card()
    return (tmp_path / "README.md").read_text()


def test_the_page_has_the_recipe_and_the_evaluation(tmp_path):
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


def edited(page):
    """What a user and `hub_card card` write into a page."""
    page = page.replace("Not evaluated yet", "81 % at exit 1. Not evaluated yet").replace(
        "<!-- /sorted-llama: limits -->\n", "<!-- /sorted-llama: limits -->\n\nOur own words.\n"
    )
    page = page.replace("<!-- sorted-llama: about -->\n", "").replace("<!-- /sorted-llama: about -->\n", "")
    page = page.replace("One Llama checkpoint that", "Our Llama that")
    return page.replace("---\n", "---\nlicense: apache-2.0\nlanguage: de\nmy_field: [1, 2]\n", 1).replace(
        "tags:\n", "tags:\n- ours\n"
    )


@pytest.mark.parametrize("lora", [False, True])
def test_what_others_wrote_stays_at_every_save(tmp_path, lora):
    """Text outside of blocks, the evaluation's block, blocks without marks, metadata; PEFT writes pages of its own."""
    options = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if lora else {}
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1, **options)
    file = tmp_path / "README.md"
    file.write_text(edited(page_of(trainer, tmp_path)))
    before = file.read_text()
    trainer.train()
    trainer.save_model()
    trainer.save_model(_internal_call=True)  # as `push_to_hub` does
    page = page_of(trainer, tmp_path)
    for kept in ("81 % at exit 1", "Our own words.", "Our Llama that"):
        assert page.count(kept) == 1
    assert "| optimization | 2 steps of 2 rows" in page
    old, data = ModelCard(before).data, ModelCard(page).data
    assert data.to_dict() == {**old.to_dict(), "tags": data.tags}
    assert (data.license, data.language, data.my_field) == ("apache-2.0", "de", [1, 2])
    assert set(data.tags) == {"ours", *old.tags} and len(data.tags) == len(set(data.tags))
    mask = r"(<!-- sorted-llama: (?:use|training) -->\n).*?(<!-- /)"
    same, then = (re.sub(mask, r"\1\2", ModelCard(p).text, flags=re.DOTALL) for p in (page, before))
    assert same == then


def test_the_page_of_somebody_else_stays_below(tmp_path):
    theirs = "---\nlicense: mit\ntags: [theirs]\n---\n# Mine\n\nAll about it.\n"
    (tmp_path / "README.md").write_text(theirs)
    trainer = make_trainer(tmp_path)
    page = page_of(trainer, tmp_path)
    assert page_of(trainer, tmp_path) == page
    data = ModelCard(page).data
    assert data.license == "mit" and {"theirs", "sorted-llama"} <= set(data.tags)
    assert has_blocks(page) and page.endswith("# Mine\n\nAll about it.\n")


def test_the_empty_form_of_peft_is_no_page(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.save_model()
    assert "More Information Needed" in (tmp_path / "README.md").read_text()
    assert "More Information Needed" not in page_of(trainer, tmp_path)


@pytest.mark.parametrize("content", [b"caf\xe9", b"---\na: [\n---\nx", b"---\n- a\n---\nx"], ids=str)
def test_a_page_that_cannot_be_read_stays_and_is_told(tmp_path, monkeypatch, content):
    said = []
    monkeypatch.setattr("sorted_llama.trainer.model_card.logger.warning", said.append)
    (tmp_path / "README.md").write_bytes(content)
    make_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    assert (tmp_path / "README.md").read_bytes() == content
    assert len(said) == 1 and "README.md" in said[0] and "stays as it is" in said[0]


def test_an_evaluation_in_the_metadata_stays(tmp_path):
    trainer = make_trainer(tmp_path)
    card = ModelCard(page_of(trainer, tmp_path))
    card.data.eval_results = [EvalResult("text-generation", "qa", "qa", "f1", 0.5)]
    card.save(tmp_path / "README.md")
    (result,) = ModelCard(page_of(trainer, tmp_path)).data.eval_results
    assert (result.metric_type, result.metric_value) == ("f1", 0.5)


def printed_by(code, tmp_path, installed):
    """What a block of code prints, in a process without this project, or with it."""
    if not installed:
        return run_as_stranger(code, folder=tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def page_and_answers(tmp_path, lora, chat):
    """The code on the page of a training, and what it is to print."""
    base = save_tiny(tmp_path / "base", tiny_sorted(exit_layers=EXITS))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = tokenizer.chat_template if chat else None
    options = {"processing_class": tokenizer}
    if lora:  # whose exits own weights, which the base that the page loads has to have a place for
        saved = [f"exit_norms.{k}" for k in EXITS[:-1]]
        options |= {"peft_config": LoraConfig(r=2, modules_to_save=saved), "exit_heads": "lens", "detach_exits": True}
        options["exit_learning_rate"] = 0.1
    out = tmp_path / f'an "odd" $name {chat}'
    trainer = make_trainer(out, base, **options)
    trainer.train()
    trainer.save_model()
    page = page_of(trainer, out)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert ("PeftModel" in code) == lora == ("No other package" not in page)
    assert ("apply_chat_template" in code) == chat and "auto" not in code
    if chat:
        asked = [{"role": "user", "content": "What is the capital of France?"}]
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    else:
        inputs = tokenizer("The capital of France is", return_tensors="pt")
    model = trainer.model.merge_and_unload() if lora else trainer.model
    full = model.extract_submodel(EXITS[-1])
    decoding = [(model.extract_submodel(1), {}), (model, {"exit_threshold": 0.9}), (full, {})]
    tokens = [llama.eval().generate(**inputs, max_new_tokens=32, **mode)[0] for llama, mode in decoding]
    expected = "".join(tokenizer.decode(row, skip_special_tokens=True) + "\n" for row in tokens)
    return code, expected.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("lora", [False, True])
def test_the_code_on_the_page_runs_as_it_stands(tmp_path, lora):
    """Every call prints its answer, of the chat template where there is one; without a GPU."""
    pages = [page_and_answers(tmp_path, lora, chat) for chat in ([True] if lora else [False, True])]
    code, expected = ("".join(parts) for parts in zip(*pages, strict=True))
    assert printed_by(code, tmp_path, installed=lora) == expected


def test_an_adapter_whose_base_has_no_name_gets_no_code(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=2, target_modules="all-linear"))
    assert "```python" not in page_of(trainer, tmp_path)
