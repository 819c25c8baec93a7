"""Sub-models as plain Llamas, and Llamas as sorted models, around the same tensors."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sorted_llama.modeling_sorted_llama import SortedLlamaForCausalLM
from tests.modeling_sorted_llama.models import TOKENS, assert_is_whole, assert_same_weights, logits
from tests.tiny import reference_llama, tiny_llama, tiny_sorted


def storages(model) -> dict[str, int]:
    return {name: tensor.untyped_storage().data_ptr() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("exit_heads", ["shared", "separate", "lens", "layer"])
def test_every_module_is_in_the_mode_of_its_source(exit_heads):
    for training in (False, True):
        model = SortedLlamaForCausalLM.from_llama(
            tiny_llama().train(training), exit_layers=[2, 4], exit_heads=exit_heads
        )
        for made in (model, model.extract_submodel(2), model.extract_submodel(4)):
            assert {module.training for module in made.modules()} == {training}


@pytest.mark.parametrize("exit_heads", ["separate", "lens", "layer"])
def test_a_submodel_is_plain_whatever_the_config_says_of_exits_since(exit_heads):
    model = SortedLlamaForCausalLM.from_llama(tiny_llama(), exit_layers=[2, 4], exit_heads=exit_heads)
    model.config.exit_layers = [4]
    submodel = model.extract_submodel(2)
    assert type(submodel.lm_head) is torch.nn.Linear and type(submodel.model.norm) is LlamaRMSNorm
    torch.testing.assert_close(logits(submodel), logits(model, exit_layer=2))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_an_extracted_submodel_shares_its_tensors_and_is_saved_as_a_plain_llama(tmp_path, depth, tied):
    model = tiny_sorted(tie_word_embeddings=tied, attention_bias=True)
    before = model.config.to_dict()
    submodel = model.extract_submodel(depth)
    assert type(submodel) is LlamaForCausalLM and type(submodel.config) is LlamaConfig
    assert not submodel.training and model.config.to_dict() == before
    assert storages(submodel) == {name: storages(model)[name] for name in submodel.state_dict()}
    assert_same_weights(submodel, reference_llama(model, depth))
    assert torch.equal(logits(submodel), logits(model, exit_layer=depth))
    generated = submodel.generate(TOKENS, max_new_tokens=6)
    assert torch.equal(generated, model.generate(TOKENS, max_new_tokens=6, exit_layer=depth))

    assert all(module.config is submodel.config for module in submodel.modules() if hasattr(module, "config"))
    submodel.set_attn_implementation("eager")
    assert len(submodel(TOKENS, output_attentions=True).attentions) == depth
    assert model.config._attn_implementation == "sdpa"
    submodel.set_attn_implementation("sdpa")

    submodel.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == "llama" and fields["architectures"] == ["LlamaForCausalLM"]
    assert fields["num_hidden_layers"] == depth
    assert not {"auto_map", "exit_layers", "exit_layer", "exit_loss_weights"} & set(fields)
    names = set()
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    assert {int(name.split(".")[2]) for name in names if ".layers." in name} == set(range(depth))
    vanilla = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(vanilla) is LlamaForCausalLM
    assert torch.equal(logits(vanilla), logits(submodel))

    # One set of weights: what trains the sub-model trains the model
    with torch.no_grad():
        submodel.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        submodel.lm_head.weight.mul_(0.5)
    assert torch.equal(logits(submodel), logits(model, exit_layer=depth))


@pytest.mark.parametrize("depth", [0, -1, 5, True, 2.0, "2", None], ids=repr)
def test_a_submodel_of_a_wrong_depth_is_refused(depth):
    with pytest.raises(ValueError, match=f"`exit_layer`.*1 to 4.*{depth!r}"):
        tiny_sorted().extract_submodel(depth)


def test_a_submodel_does_not_depend_on_the_models_depth_fields():
    model = tiny_sorted(exit_layer=2)
    model.generation_config.exit_layer = 1
    submodel = model.extract_submodel(4)
    assert torch.equal(logits(submodel), logits(model, exit_layer=4))
    assert not hasattr(submodel.generation_config, "exit_layer")
    submodel.generate(TOKENS, max_new_tokens=2)


@pytest.mark.parametrize("tied", [True, False])
def test_a_sorted_model_shares_the_tensors_of_its_llama(tmp_path, tied):
    plain = tiny_llama(tie_word_embeddings=tied)
    before = plain.config.to_dict()
    model = SortedLlamaForCausalLM.from_llama(plain, exit_layers=[1, 2, 4])
    assert type(model) is SortedLlamaForCausalLM and not model.training
    assert storages(model) == storages(plain)
    assert [id(p) for p in model.parameters()] == [id(p) for p in plain.parameters()]
    assert plain.config.to_dict() == before and plain.config.model_type == "llama"
    assert_is_whole(model, [1, 2, 4])
    model.save_pretrained(tmp_path)
    assert_is_whole(SortedLlamaForCausalLM.from_pretrained(tmp_path), [1, 2, 4])
    assert SortedLlamaForCausalLM.from_llama(plain.train()).training


def test_wrong_exits_and_models_that_are_no_llama_are_refused():
    with pytest.raises(ValueError, match="`exit_layers`"):
        SortedLlamaForCausalLM.from_llama(tiny_llama(), exit_layers=[1, 2])
    with pytest.raises(TypeError, match="LlamaModel"):
        SortedLlamaForCausalLM.from_llama(tiny_llama().model)
