"""LoRA adapters of the families: on the sorted model they do what they did."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.hub_card.commands import main
from sorted_llama.hub_card.extract import extract
from tests.families import CASES, tiny_family
from tests.tiny import prompts


TRANSFORMERS_OWN = [case for case, (name, _) in CASES.items() if not name.islower()]
FUSED = [case for case in TRANSFORMERS_OWN if case.startswith("phi3")]
INPUTS = prompts((9, 9))


def lora(model, **fields):
    torch.manual_seed(1)
    settings = {"target_modules": "all-linear", "r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", **fields}
    return get_peft_model(model, LoraConfig(**settings)).eval()


def save_adapter(folder, case, **fields):
    """The logits of a family's model with an adapter, which is in `adapter`, its base in `base`."""
    tiny_family(case).save_pretrained(folder / "base")
    model = lora(AutoModelForCausalLM.from_pretrained(folder / "base"), **fields)
    model.save_pretrained(folder / "adapter")
    return model(**INPUTS).logits


def of_sorted(folder, adapter):
    base = SortedLlamaForCausalLM.from_pretrained(folder / "base", exit_layers=[2, 4])
    return PeftModel.from_pretrained(base, folder / adapter).eval()(**INPUTS).logits


@pytest.mark.parametrize("case", [case for case in TRANSFORMERS_OWN if case not in FUSED])
def test_an_adapter_of_the_family_is_one_of_the_sorted_model(tmp_path, case):
    expected = save_adapter(tmp_path, case)
    assert torch.equal(of_sorted(tmp_path, "adapter"), expected)
    by_folder = SortedLlamaForCausalLM.from_pretrained(tmp_path / "adapter", exit_layers=[2, 4])
    assert torch.equal(by_folder(**INPUTS).logits, expected)
    with pytest.raises(ValueError, match="whose layers have a Llama's names: use it as it is"):
        extract(tmp_path / "adapter", None, tmp_path / "out")


@pytest.mark.parametrize("case", ["mistral", "qwen2"])
def test_an_adapter_of_the_sorted_model_names_the_base_and_is_one_of_the_family(tmp_path, case):
    tiny_family(case).save_pretrained(tmp_path / "base")
    model = lora(SortedLlamaForCausalLM.from_pretrained(tmp_path / "base", exit_layers=[2, 4]))
    model.save_pretrained(tmp_path / "adapter")
    family = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(family.get_base_model()) is type(tiny_family(case))
    assert torch.equal(family.eval()(**INPUTS).logits, model(**INPUTS).logits)


@pytest.mark.parametrize("targets", ["all-linear", ["qkv_proj", "down_proj"]])
@pytest.mark.parametrize("case", FUSED)
def test_an_adapter_of_fused_layers_is_split(tmp_path, case, targets):
    """From rows of the product: equal up to the order of sums."""
    expected = save_adapter(tmp_path, case, target_modules=targets)
    with pytest.raises(ValueError, match="for layers '.*(qkv|gate_up)_proj' of a model of type 'phi3'.*convert"):
        SortedLlamaForCausalLM.from_pretrained(tmp_path / "adapter", exit_layers=[2, 4])
    main(["convert", str(tmp_path / "adapter"), str(tmp_path / "converted")])
    settings = json.loads((tmp_path / "converted/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    actual = of_sorted(tmp_path, "converted")
    torch.testing.assert_close(actual, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    by_folder = SortedLlamaForCausalLM.from_pretrained(tmp_path / "converted", exit_layers=[2, 4])
    assert torch.equal(by_folder(**INPUTS).logits, actual)


@pytest.mark.parametrize(
    "fields", [{"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"o_proj": 2}}, {"modules_to_save": ["lm_head"]}]
)
def test_an_adapter_that_cannot_be_split_is_refused(tmp_path, fields):
    save_adapter(tmp_path, "phi3_one_key_value_head", **fields)
    with pytest.raises(ValueError, match=f"an adapter with `{next(iter(fields))}=.*which cannot be split"):
        extract(tmp_path / "adapter", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
