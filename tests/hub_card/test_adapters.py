"""LoRA adapters of the families: on the sorted model they do what they did, or are refused."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.hub_card.commands import main
from sorted_llama.hub_card.extract import extract
from tests.families import CASES, tiny_family
from tests.tiny import prompts


TRANSFORMERS_OWN = [case for case, (name, _) in CASES.items() if not name.islower()]
FUSED = [case for case in TRANSFORMERS_OWN if case.startswith("phi3")]
INPUTS = prompts((9, 9))
CONVERTED = " (converted to a Llama)"


def lora(model, **fields):
    torch.manual_seed(1)
    settings = {"target_modules": "all-linear", "r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", **fields}
    model = get_peft_model(model, LoraConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:  # copies at first, which hide where they are not loaded
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def save_adapter(folder, case, **fields):
    """The logits of a family's model with an adapter, which is in `adapter`, its base in `base`."""
    tiny_family(case).save_pretrained(folder / "base")
    model = lora(AutoModelForCausalLM.from_pretrained(folder / "base"), **fields)
    model.save_pretrained(folder / "adapter")
    return model(**INPUTS).logits


def sorted_base(folder):
    return SortedLlamaForCausalLM.from_pretrained(folder / "base", exit_layers=[2, 4])


def of_sorted(folder, adapter):
    return PeftModel.from_pretrained(sorted_base(folder), folder / adapter).eval()(**INPUTS).logits


def base_of(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]


# Three ways in which people load an adapter: of PEFT, and of transformers by its folder or beside a model
LOADS = {
    "peft": lambda folder: PeftModel.from_pretrained(sorted_base(folder), folder / "adapter"),
    "folder": lambda folder: SortedLlamaForCausalLM.from_pretrained(folder / "adapter", exit_layers=[2, 4]),
    "transformers": lambda folder: sorted_base(folder).load_adapter(str(folder / "adapter")),
}


@pytest.mark.parametrize(
    "case, fields",
    [(case, {}) for case in TRANSFORMERS_OWN if case not in FUSED]
    + [("phi3", {"target_modules": ["o_proj", "down_proj"]}), ("gemma", {"modules_to_save": ["lm_head"]})]
    + [("qwen2", {"use_dora": True}), ("qwen2", {"modules_to_save": ["embed_tokens", "norm"]})],
)
def test_an_adapter_of_layers_that_are_a_llamas_is_one_of_the_sorted_model(tmp_path, case, fields):
    expected = save_adapter(tmp_path, case, **fields)
    assert torch.equal(of_sorted(tmp_path, "adapter"), expected)
    if "use_dora" not in fields:  # whose magnitudes transformers does not load, for any model
        assert torch.equal(LOADS["folder"](tmp_path)(**INPUTS).logits, expected)
    with pytest.raises(ValueError, match="whose layers are a Llama's: use it as it is"):
        extract(tmp_path / "adapter", None, tmp_path / "out")


@pytest.mark.parametrize("case", ["mistral", "qwen2"])
def test_an_adapter_of_the_sorted_model_names_the_base_and_is_one_of_the_family(tmp_path, case):
    tiny_family(case).save_pretrained(tmp_path / "base")
    model = lora(sorted_base(tmp_path))
    model.save_pretrained(tmp_path / "adapter")
    family = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(family.get_base_model()) is type(tiny_family(case))
    assert torch.equal(family.eval()(**INPUTS).logits, model(**INPUTS).logits)


@pytest.mark.parametrize("case, saved", [("phi3", None), ("gemma", ["embed_tokens", "norm"])])
def test_an_adapter_of_a_converted_model_says_so_and_is_none_of_the_familys_class(tmp_path, case, saved):
    tiny_family(case).save_pretrained(tmp_path / "base")
    model = lora(sorted_base(tmp_path), modules_to_save=saved)
    model.save_pretrained(tmp_path / "adapter")
    assert base_of(tmp_path / "adapter") == f"{tmp_path / 'base'}{CONVERTED}"
    assert torch.equal(of_sorted(tmp_path, "adapter"), model(**INPUTS).logits)
    assert sorted_base(tmp_path).extract_submodel(2).name_or_path == base_of(tmp_path / "adapter")
    for load in (AutoPeftModelForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(OSError, match=r"base \(converted to a Llama\)"):
            load(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"base \(converted to a Llama\)`: load that with `SortedLlamaForCausalLM"):
        LOADS["folder"](tmp_path)
    with pytest.raises(ValueError, match="whose layers are a Llama's: use it as it is"):
        extract(tmp_path / "adapter", None, tmp_path / "out")


def test_an_adapter_of_a_converted_model_that_was_saved_names_the_new_folder(tmp_path):
    tiny_family("phi3").save_pretrained(tmp_path / "base")
    sorted_base(tmp_path).save_pretrained(tmp_path / "saved")
    model = lora(SortedLlamaForCausalLM.from_pretrained(tmp_path / "saved"))
    model.save_pretrained(tmp_path / "adapter")
    assert base_of(tmp_path / "adapter") == str(tmp_path / "saved")
    assert torch.equal(of_sorted(tmp_path, "adapter"), model(**INPUTS).logits)
    by_folder = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(by_folder(**INPUTS).logits, model(**INPUTS).logits)


@pytest.mark.parametrize(
    "targets", ["all-linear", ["qkv_proj", "down_proj"], r".*\.(gate_up_proj|o_proj)"], ids=["all", "names", "regex"]
)
@pytest.mark.parametrize("case", FUSED)
def test_an_adapter_of_fused_layers_is_refused_and_split(tmp_path, case, targets):
    """From rows of the product: equal up to the order of sums."""
    expected = save_adapter(tmp_path, case, target_modules=targets, exclude_modules=["k_proj"], use_rslora=True)
    for load in LOADS.values():
        with pytest.raises(ValueError, match="type 'phi3', whose layer '.*(qkv|gate_up)_proj.*`sorted-llama convert"):
            load(tmp_path)
    main(["convert", str(tmp_path / "adapter"), str(tmp_path / "converted")])
    assert base_of(tmp_path / "converted") == f"{tmp_path / 'base'}{CONVERTED}"
    actual = of_sorted(tmp_path, "converted")
    torch.testing.assert_close(actual, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    main(["convert", str(tmp_path / "base"), str(tmp_path / "llama")])
    llama = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "llama"), tmp_path / "converted")
    assert torch.equal(llama.eval()(**INPUTS).logits, actual)


def test_an_adapter_of_fused_layers_is_refused_by_a_converted_model_that_was_saved(tmp_path):
    save_adapter(tmp_path, "phi3")
    sorted_base(tmp_path).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="type 'phi3', whose layer '.*_proj.*`sorted-llama convert"):
        PeftModel.from_pretrained(SortedLlamaForCausalLM.from_pretrained(tmp_path / "saved"), tmp_path / "adapter")


@pytest.mark.parametrize(
    "fields",
    [{"target_modules": ["q_proj", "embed_tokens"]}]
    + [{"modules_to_save": [name]} for name in ("embed_tokens", "norm", "post_attention_layernorm")]
    + [{"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}],
    ids=["lora", "embeddings", "norms", "layer_norms", "tokens"],
)
@pytest.mark.parametrize("load", LOADS)
def test_an_adapter_of_layers_with_other_values_is_refused(tmp_path, load, fields):
    """Of Gemma's embeddings and norms, which have Llama's names."""
    save_adapter(tmp_path, "gemma", **fields)
    with pytest.raises(ValueError, match="type 'gemma', whose layer '.*(embed_tokens|norm).*`sorted-llama convert"):
        LOADS[load](tmp_path)
    with pytest.raises(ValueError, match="cannot be converted"):
        extract(tmp_path / "adapter", None, tmp_path / "out")


@pytest.mark.parametrize(
    "fields",
    [{"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"o_proj": 2}}, {"modules_to_save": ["lm_head"]}]
    + [{"init_lora_weights": "pissa"}, {"trainable_token_indices": [1]}],
    ids=lambda fields: next(iter(fields)),
)
def test_an_adapter_that_cannot_be_split_is_refused(tmp_path, fields):
    save_adapter(tmp_path, "phi3_one_key_value_head", **fields)
    with pytest.raises(ValueError, match=f"an adapter with `{next(iter(fields))}=.*which cannot be converted"):
        extract(tmp_path / "adapter", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def save_published_adapter(folder, case, layers):
    """Matrices for layers of a model that transformers has not, in `adapter`; with their product it is in `merged`."""
    torch.manual_seed(2)
    model, tensors = tiny_family(case), {}
    model.save_pretrained(folder / "base")
    for name in layers:
        weight = model.weight(f"{name}.weight")
        a, b = 0.3 * torch.randn(2, weight.shape[1]), 0.3 * torch.randn(weight.shape[0], 2)
        weight.data += 2.0 * b @ a
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    model.save_pretrained(folder / "merged")
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=layers, task_type="CAUSAL_LM").to_dict()
    settings |= {"base_model_name_or_path": str(folder / "base"), "target_modules": layers}
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter/adapter_model.safetensors")


@pytest.mark.parametrize(
    "case, layers, names",
    [
        (
            "internlm2_bias",
            ["model.layers.1.attention.wqkv", "model.layers.1.attention.wo", "output"],
            {f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"} | {"lm_head"},
        ),
        ("internlm2", ["model.layers.3.feed_forward.w1"], {"model.layers.3.mlp.gate_proj"}),
    ],
)
def test_an_adapter_of_renamed_layers_is_renamed(tmp_path, case, layers, names):
    save_published_adapter(tmp_path, case, layers)
    expected = SortedLlamaForCausalLM.from_pretrained(tmp_path / "merged", exit_layers=[2, 4])(**INPUTS).logits
    extract(tmp_path / "adapter", None, tmp_path / "converted")
    actual = of_sorted(tmp_path, "converted")
    torch.testing.assert_close(actual, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    tensors = load_file(tmp_path / "converted/adapter_model.safetensors")
    assert {name.split(".lora_")[0] for name in tensors} == {f"base_model.model.{name}" for name in names}


def test_an_adapter_of_a_normalised_head_is_refused(tmp_path):
    save_published_adapter(tmp_path, "baichuan", ["model.layers.0.self_attn.W_pack", "lm_head"])
    with pytest.raises(ValueError, match="with 'lm_head.*whose values are others in a Llama: it cannot be converted"):
        extract(tmp_path / "adapter", None, tmp_path / "out")


def test_an_adapter_that_names_no_base_is_not_converted(tmp_path):
    lora(tiny_family("phi3")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="names no base"):
        extract(tmp_path / "adapter", None, tmp_path / "out")
