"""Checkpoints of other families as plain Llamas and back: bit by bit what loading them gives, by transformers."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.hub_card.commands import main
from sorted_llama.hub_card.extract import extract
from tests.families import CASES, family_logits, tiny_family
from tests.tiny import prompts, save_tiny, tiny_llama, tiny_tokenizer


BACK = ["mistral", "mistral_nemo", "qwen2", "qwen2_untied", "qwen2_yarn"]


def save(folder, case, **kwargs):
    model = tiny_family(case)
    model.save_pretrained(folder, **kwargs)
    tiny_tokenizer().save_pretrained(folder)
    GenerationConfig(eos_token_id=[2, 5, 7], top_p=0.8, do_sample=True).save_pretrained(folder)
    return model


def assert_same_tensors(model, expected):
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_family_becomes_a_plain_llama(tmp_path, case, shards):
    """What `from_pretrained` makes of it, for whom the package is unknown: no code, nothing missing."""
    save(tmp_path / "family", case, **({"max_shard_size": "20KB"} if shards else {}))
    main(["convert", str(tmp_path / "family"), str(tmp_path / "out")])
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(plain) is LlamaForCausalLM and not any(info.values())
    loaded = SortedLlamaForCausalLM.from_pretrained(tmp_path / "family").extract_submodel(4)
    assert_same_tensors(plain, loaded)
    loaded.save_pretrained(tmp_path / "loaded")
    saved, expected = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("out", "loaded"))
    assert saved == expected and "auto_map" not in saved and not list((tmp_path / "out").glob("*.py"))
    again = SortedLlamaForCausalLM.from_pretrained(tmp_path / "out", exit_layers=[2, 4])
    assert torch.equal(again(**prompts()).logits, loaded(**prompts()).logits)


def test_what_is_beside_the_weights_comes_along(tmp_path):
    save(tmp_path / "family", "qwen2")
    extract(tmp_path / "family", None, tmp_path / "out")
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == [2, 5, 7] and generation.top_p == 0.8 and generation.do_sample
    tokenizer, expected = (AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("out", "family"))
    assert type(tokenizer) is type(expected) and tokenizer.chat_template == expected.chat_template
    chat = [{"role": "user", "content": "Grüße, 世界"}]
    assert tokenizer.apply_chat_template(chat)["input_ids"] == expected.apply_chat_template(chat)["input_ids"]
    page = (tmp_path / "out" / "README.md").read_text()
    assert "All 4 layers of family as a plain Llama, which runs wherever Llamas run." in page


@pytest.mark.parametrize("case", BACK)
def test_a_family_comes_back_as_it_was(tmp_path, case):
    family = save(tmp_path / "family", case)
    model_type = family.config.model_type
    extract(tmp_path / "family", None, tmp_path / "llama")
    main(["convert", str(tmp_path / "llama"), str(tmp_path / "back"), "--to", model_type])
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(back) is type(family) and not any(info.values())
    assert_same_tensors(back, family)
    saved, expected = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("back", "family"))
    assert {key: saved.get(key) for key in expected} == expected
    assert GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id == [2, 5, 7]


@pytest.mark.parametrize("exit_heads", ["shared", "separate", "layer"])
@pytest.mark.parametrize("case", ["mistral_nemo", "qwen2"])
def test_a_trained_exit_comes_back_as_a_model_of_its_family(tmp_path, case, exit_heads):
    family = save(tmp_path / "family", case)
    model = SortedLlamaForCausalLM.from_pretrained(tmp_path / "family", exit_layers=[2, 4], exit_heads=exit_heads)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()(**prompts(), labels=prompts()["input_ids"]).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "sorted")
    model_type = family.config.model_type
    main(["extract", str(tmp_path / "sorted"), str(tmp_path / "out"), "--exit", "2", "--as", model_type])
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(back) is type(family) and not any(info.values())
    attended = prompts()["attention_mask"].bool()
    actual, trained = family_logits(back, prompts()), model(**prompts(), exit_layer=2).logits
    assert torch.equal(actual[attended], trained[attended])
    assert not torch.equal(actual[attended], family_logits(family, prompts())[attended])
    assert (
        f"of sorted{' and one of the exit' if exit_heads == 'layer' else ''}"
        in (tmp_path / "out/README.md").read_text()
    )


def test_a_model_with_a_window_is_converted_for_texts_within_it(tmp_path):
    """By the option that its refusal names."""
    family = tiny_family("mistral", sliding_window=32)
    family.save_pretrained(tmp_path / "family")
    arguments = ["convert", str(tmp_path / "family"), str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="`sorted-llama convert` takes as `--max_position_embeddings 32`"):
        main(arguments)
    main([*arguments, "--max_position_embeddings", "32"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain) is LlamaForCausalLM and plain.config.max_position_embeddings == 32
    assert torch.equal(plain(**prompts((32, 20))).logits, family(**prompts((32, 20))).logits)


@pytest.mark.parametrize("case", ["qwen2", "qwen2_untied", "gemma"])
def test_a_model_without_its_head_is_refused(tmp_path, case):
    tiny_family(case).model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="`path` must hold a model with its head, .* it has no '"):
        extract(tmp_path / "base", None, tmp_path / "out")


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "case, name", [("mistral", "self_attn.q_proj"), ("phi3", "self_attn.qkv_proj"), ("internlm2", "attention.wqkv")]
)
def test_a_model_without_one_of_its_layers_is_refused(tmp_path, case, name):
    """transformers would make it up."""
    tiny_family(case).save_pretrained(tmp_path / "family")
    change_weights(tmp_path / "family", lambda weights: weights.pop(f"model.layers.2.{name}.weight"))
    with pytest.raises(ValueError, match=r"it has no 'model\.layers\.2\.self_attn\.q_proj'"):
        extract(tmp_path / "family", None, tmp_path / "out")
    extract(tmp_path / "family", 2, tmp_path / "out")


@pytest.mark.parametrize("case", ["mistral", "qwen2", "gemma"])
def test_a_head_that_is_not_the_embeddings_as_the_config_says_is_refused(tmp_path, case):
    tiny_family(case).save_pretrained(tmp_path / "family")
    change_weights(tmp_path / "family", lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    extract(tmp_path / "family", None, tmp_path / "same")
    assert_same_tensors(
        AutoModelForCausalLM.from_pretrained(tmp_path / "same"),
        SortedLlamaForCausalLM.from_pretrained(tmp_path / "family").extract_submodel(4),
    )
    change_weights(tmp_path / "family", lambda weights: weights["lm_head.weight"].mul_(2))
    with pytest.raises(ValueError, match=r"`tie_word_embeddings=True` .* lm_head\.weight has other values"):
        extract(tmp_path / "family", None, tmp_path / "out")


@pytest.mark.parametrize(
    "fields, model_type, message",
    [
        ({"attention_bias": True}, "mistral", "'mistral' has what a Llama has with `attention_bias=False`"),
        ({"mlp_bias": True}, "mistral", "`mlp_bias=False`: this one has `mlp_bias=True`"),
        ({}, "qwen2", "`attention_bias=True`: this one has `attention_bias=False`"),
        ({"attention_bias": True, "head_dim": 16}, "qwen2", "`head_dim=8`: this one has `head_dim=16`"),
        ({"attention_bias": True}, "qwen2", "has no model.layers.0.self_attn.o_proj.bias: in this one it is not zero"),
        ({}, "phi3", "`model_type` must be 'llama', 'mistral' or 'qwen2', got 'phi3'"),
    ],
)
def test_a_llama_that_the_family_cannot_hold_is_refused(tmp_path, fields, model_type, message):
    llama = tiny_llama(**fields)
    if fields.get("attention_bias"):
        llama.model.layers[0].self_attn.o_proj.bias.data[3] = 1e-3
    save_tiny(tmp_path / "llama", llama)
    with pytest.raises(ValueError, match=re.escape(message)):
        extract(tmp_path / "llama", 2, tmp_path / "out", model_type=model_type)
    assert not (tmp_path / "out").exists()
