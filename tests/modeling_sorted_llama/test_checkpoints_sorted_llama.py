"""Save and load: every Llama as a sorted model, every sorted model as a Llama, and with the code in the folder."""

import ast
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

import sorted_llama
from sorted_llama.modeling_sorted_llama import SortedLlamaConfig, SortedLlamaForCausalLM, SortedLlamaModel
from tests.tiny import reference_llama, run_as_stranger, save_gguf, save_tiny, tiny_llama, tiny_sorted


TOKENS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(0))
PACKAGE = Path(sorted_llama.modeling_sorted_llama.__file__).parent
STAYS_HERE = ["vllm_plugin.py", "vllm_sorted_llama.py"]  # for the installed package only
REMOTE_CODE = sorted(path.name for path in PACKAGE.glob("[!_]*.py") if path.name not in STAYS_HERE)
AUTO_MAP = {
    "AutoConfig": "configuration_sorted_llama.SortedLlamaConfig",
    "AutoModel": "modeling_sorted_llama.SortedLlamaModel",
    "AutoModelForCausalLM": "modeling_sorted_llama.SortedLlamaForCausalLM",
}


@torch.no_grad()
def logits(model, **arguments) -> torch.Tensor:
    return model(TOKENS.to(model.device), **arguments).logits


def assert_same_weights(model, expected):
    mine, theirs = model.state_dict(), expected.state_dict()
    assert list(mine) == list(theirs)
    for name in mine:
        assert torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype


def assert_is_whole(model, expected_exits=None):
    """Sorted in memory as on disk, and each exit the sub-model."""
    assert model.config.model_type == "sorted_llama" and type(model.config) is SortedLlamaConfig
    assert model.config.exit_layers == expected_exits
    assert model.model.config is model.config
    for depth in (1, 2, 4):
        assert torch.equal(logits(model, exit_layer=depth), logits(reference_llama(model, depth)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["single", "sharded", "bin"])
def test_plain_llama_loads_as_sorted(tmp_path, form, tied, caplog):
    plain = tiny_llama(tie_word_embeddings=tied)
    if form == "bin":
        torch.save(plain.state_dict(), tmp_path / "pytorch_model.bin")
        plain.config.save_pretrained(tmp_path)
    else:
        plain.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if form == "sharded" else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (form == "sharded")

    model, info = SortedLlamaForCausalLM.from_pretrained(tmp_path, exit_layers=[1, 2, 4], output_loading_info=True)
    assert not any(info.values())
    assert type(model) is SortedLlamaForCausalLM and type(model.model) is SortedLlamaModel
    assert_same_weights(model, plain)
    assert_is_whole(model, [1, 2, 4])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with caplog.at_level(logging.WARNING):
        assert_is_whole(SortedLlamaForCausalLM.from_pretrained(tmp_path))
    assert "model of type" not in caplog.text  # "... is not supported for all configurations"


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float16, "auto"], ids=str)
def test_dtype(tmp_path, dtype):
    plain = tiny_llama().to(torch.bfloat16)
    plain.save_pretrained(tmp_path)
    model = SortedLlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert model.dtype == expected.dtype
    assert_same_weights(model, expected)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementation(tmp_path, attention):
    tiny_llama().save_pretrained(tmp_path)
    model = SortedLlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert_is_whole(model)


@pytest.mark.parametrize("place", ["auto", "disk"])
def test_device_map(tmp_path, place):
    """`device_map`, also with layers and head offloaded: accelerate's hooks bring in the layers that run."""
    pytest.importorskip("accelerate")
    plain = tiny_llama(tie_word_embeddings=False)
    plain.save_pretrained(tmp_path)
    device_map = place
    if place == "disk":
        device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"}
        device_map |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    model = SortedLlamaForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload", exit_layers=[2, 4]
    )
    if place == "disk":
        assert model.model.layers[3].mlp.up_proj.weight.device.type == "meta"
    expected = SortedLlamaForCausalLM.from_llama(plain, exit_layers=[2, 4]).to(model.device)
    for depth in (2, 4):
        assert torch.equal(logits(model, exit_layer=depth), logits(reference_llama(expected, depth)))
    tokens = TOKENS.to(model.device)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, labels=tokens).loss, expected(tokens, labels=tokens).loss)
    assert torch.equal(
        model.generate(tokens, max_new_tokens=4, exit_layer=2),
        expected.generate(tokens, max_new_tokens=4, exit_layer=2),
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_llama(hidden_size=64, intermediate_size=128, tie_word_embeddings=False).save_pretrained(tmp_path)
    options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {"load_in_8bit": True}
    arguments = {"quantization_config": BitsAndBytesConfig(**options), "dtype": torch.float32}
    model = SortedLlamaForCausalLM.from_pretrained(tmp_path, exit_layers=[2, 4], **arguments)
    for depth in (2, 4):
        expected = LlamaForCausalLM.from_pretrained(tmp_path, num_hidden_layers=depth, **arguments)
        assert type(model.model.layers[0].mlp.up_proj) is type(expected.model.layers[0].mlp.up_proj)
        assert type(expected.model.layers[0].mlp.up_proj) is not torch.nn.Linear
        assert torch.equal(logits(model, exit_layer=depth), logits(expected))
    # the sub-model shares quantized weights too
    assert torch.equal(logits(model.extract_submodel(2)), logits(model, exit_layer=2))


def test_gguf(tmp_path):
    """A GGUF file of a Llama, which transformers reads itself, becomes a sorted model."""
    plain = tiny_llama(num_key_value_heads=4, tie_word_embeddings=False)
    save_gguf(plain, tmp_path / "tiny.gguf")
    expected = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    assert torch.equal(logits(expected), logits(plain))
    model = SortedLlamaForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", exit_layers=[1, 2, 4])
    assert model.config.model_type == "sorted_llama" and model.config.exit_layers == [1, 2, 4]
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model, exit_layer=2), logits(reference_llama(model, 2)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["single", "sharded"])
def test_sorted_loads_as_plain_llama(tmp_path, tied, shards):
    model = tiny_sorted(tie_word_embeddings=tied, exit_loss_weights=[1, 2, 3])
    model.save_pretrained(tmp_path, **shards)
    plain, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(plain) is LlamaForCausalLM and type(plain.model) is LlamaModel
    assert_same_weights(plain, model)
    assert torch.equal(logits(plain), logits(model))
    shallow = LlamaForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    assert torch.equal(logits(shallow), logits(model, exit_layer=2))


@pytest.mark.parametrize("source", ["plain", "sorted"])
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["single", "sharded"])
@pytest.mark.parametrize(("depth", "exits"), [(1, [1]), (2, [1, 2]), (3, None), (4, [1, 2, 4])])
def test_num_hidden_layers_reads_only_those(tmp_path, source, shards, depth, exits):
    whole = tiny_sorted() if source == "sorted" else tiny_llama()
    whole.save_pretrained(tmp_path, **shards)
    exits = exits if source == "sorted" else None
    model, info = SortedLlamaForCausalLM.from_pretrained(tmp_path, num_hidden_layers=depth, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert len(model.model.layers) == model.config.num_hidden_layers == depth
    assert model.config.exit_layers == exits
    assert torch.equal(logits(model), logits(reference_llama(SortedLlamaForCausalLM.from_llama(whole), depth)))
    assert model.num_parameters() == reference_llama(model, depth).num_parameters()


def test_depth_fields_survive_a_round_trip(tmp_path):
    model = tiny_sorted(exit_layers=[1, 3, 4], exit_loss_weights=[0.5, 0.0, 2.0], exit_layer=3)
    model.save_pretrained(tmp_path)
    loaded = SortedLlamaForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.exit_layers, loaded.config.exit_loss_weights) == ([1, 3, 4], [0.5, 0.0, 2.0])
    assert loaded.config.exit_layer == 3
    assert_same_weights(loaded, model)


def test_old_checkpoint_without_the_fields(tmp_path):
    model = tiny_sorted()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in fields.items() if "exit" not in k and k != "auto_map"}))
    loaded = SortedLlamaForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    assert_is_whole(loaded)


def test_auto_classes_know_it(tmp_path):
    model = tiny_sorted()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is SortedLlamaConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is SortedLlamaModel
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, exit_layer=2)
    assert type(loaded) is SortedLlamaForCausalLM
    assert torch.equal(logits(loaded), logits(reference_llama(model, 2)))
    assert type(AutoModelForCausalLM.from_config(model.config)) is SortedLlamaForCausalLM


@pytest.mark.parametrize("fields", [{"exit_layer": 5}, {"exit_layers": [1, 2]}, {"exit_layers": [2, 4, 4]}], ids=repr)
def test_wrong_depth_in_from_pretrained(tmp_path, fields):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`{next(iter(fields))}`.*4"):
        SortedLlamaForCausalLM.from_pretrained(tmp_path, **fields)


# Shared tensors


def storages(model) -> dict[str, int]:
    return {name: tensor.untyped_storage().data_ptr() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_extract_submodel(tmp_path, depth, tied):
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
def test_extract_submodel_refuses(depth):
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
def test_from_llama(tmp_path, tied):
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


def test_from_llama_refuses():
    with pytest.raises(ValueError, match="`exit_layers`"):
        SortedLlamaForCausalLM.from_llama(tiny_llama(), exit_layers=[1, 2])
    with pytest.raises(TypeError, match="LlamaModel"):
        SortedLlamaForCausalLM.from_llama(tiny_llama().model)


# The code in the folder


def test_a_model_under_fsdp2_is_saved_as_the_model_that_it_is(tmp_path, one_process):
    model = tiny_sorted()
    expected = logits(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert type(model) is not SortedLlamaForCausalLM and isinstance(model, FSDPModule)
    state_dict = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state_dict)
    assert sorted(path.name for path in tmp_path.glob("*.py")) == REMOTE_CODE
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["SortedLlamaForCausalLM"] and config["auto_map"] == AUTO_MAP
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def make_sorted(kind, folder):
    if kind == "built":
        return tiny_sorted()
    if kind == "from_llama":
        return SortedLlamaForCausalLM.from_llama(tiny_llama(), exit_layers=[1, 2, 4])
    tiny_llama().save_pretrained(folder)
    if kind == "inner_model":
        return SortedLlamaModel.from_pretrained(folder, exit_layers=[1, 2, 4])
    return SortedLlamaForCausalLM.from_pretrained(folder, exit_layers=[1, 2, 4])


@pytest.mark.parametrize("kind", ["built", "from_llama", "from_vanilla_folder", "inner_model"])
def test_save_writes_code_and_auto_map(tmp_path, kind):
    model = make_sorted(kind, tmp_path / "vanilla")
    folder = tmp_path / "sorted"
    model.save_pretrained(folder)
    for name in REMOTE_CODE:
        assert (folder / name).read_text() == (PACKAGE / name).read_text()
    fields = json.loads((folder / "config.json").read_text())
    assert fields["auto_map"] == AUTO_MAP
    assert fields["model_type"] == "sorted_llama"
    assert fields["exit_layers"] == [1, 2, 4]
    assert fields["architectures"] == [type(model).__name__]
    model.save_pretrained(folder)  # over an older save
    assert json.loads((folder / "config.json").read_text()) == fields


@pytest.mark.parametrize(
    "auto_map",
    [None, {"AutoConfig": AUTO_MAP["AutoConfig"]}, {k: f"user/repo--{v}" for k, v in AUTO_MAP.items()}],
    ids=["none", "incomplete", "of_a_hub_repository"],
)
def test_a_saved_folder_points_to_its_own_code(tmp_path, auto_map):
    """Also where the model came from a repository whose name is in its `auto_map`."""
    model = tiny_sorted()
    model.config.auto_map = auto_map
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_remote_code_is_one_flat_folder_of_known_imports():
    """Only `from .module import name` travels; any other package would have to be installed by who loads it."""
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    files = {path.name for path in PACKAGE.glob("*.py")}
    assert {*REMOTE_CODE, *STAYS_HERE, "__init__.py"} == files, "update REMOTE_CODE in this test"
    assert not [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    for name in {*REMOTE_CODE, "__init__.py"}:
        for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in allowed for alias in node.names), f"{name}: {ast.unparse(node)}"
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, f"{name}: {ast.unparse(node)}"
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and node.module and "." not in node.module, f"{name}: {ast.unparse(node)}"
                assert f"{node.module}.py" in REMOTE_CODE


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
def test_layers_that_are_left_out_are_no_surprise(tmp_path, auto):
    tiny_sorted().save_pretrained(tmp_path)
    model, info = auto.from_pretrained(tmp_path, num_hidden_layers=2, output_loading_info=True)
    assert len(model.base_model.layers) == 2
    assert auto is AutoModel or not any(info.values())
    assert not [name for name in info["unexpected_keys"] if "layers" in name]


LOAD_AND_SAVE = """
import json

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

first, second, tokens, out = sys.argv[1:]
tokens = torch.tensor(json.loads(tokens))
results = {}
for number, folder in enumerate((first, second)):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    inner = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    shallow = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, exit_layer=1)
    cut = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, num_hidden_layers=2)
    assert all(type(m).__module__.startswith("transformers_modules") for m in (config, inner, model)), type(model)
    assert inner.norm.weight.shape == model.model.norm.weight.shape
    generated = model.generate(tokens, exit_layer=1, max_new_tokens=6)
    assert torch.equal(generated, shallow.generate(tokens, max_new_tokens=6))
    pipe = pipeline("text-generation", model=folder, trust_remote_code=True)
    results[number] = {
        "model": type(model).__name__,
        "inner": type(inner).__name__,
        "config": type(config).__name__,
        "exit_layers": model.config.exit_layers,
        "cut_exits": cut.config.exit_layers,
        "generated": generated.tolist(),
        "last_hidden_state": inner(tokens, exit_layer=2).last_hidden_state.tolist(),
        "loss": model(tokens, labels=tokens).exit_losses.tolist(),
        "text": tokenizer.decode(tokens[0]),
        "piped": pipe("hello", exit_layer=1, max_new_tokens=4, do_sample=False)[0]["generated_text"],
        "submodel": type(model.extract_submodel(1)).__name__,
    }
    if number == 0:
        model.save_pretrained(second)
        tokenizer.save_pretrained(second)
with open(out, "w") as file:
    json.dump(results, file)
"""


@pytest.mark.slow
@pytest.mark.parametrize("vanilla", [False, True], ids=["built_sorted", "from_vanilla_folder"])
def test_a_process_without_the_package(tmp_path, vanilla):
    """The folder alone is enough: load, generate, save again, and load what was saved, in a stranger's process."""
    model = tiny_sorted()
    if vanilla:
        plain = save_tiny(tmp_path / "vanilla")
        model = SortedLlamaForCausalLM.from_pretrained(plain, exit_layers=[1, 2, 4])
    first, second, out = save_tiny(tmp_path / "first", model), tmp_path / "second", tmp_path / "out.json"
    run_as_stranger(LOAD_AND_SAVE, first, second, json.dumps(TOKENS.tolist()), out, folder=tmp_path)
    results = json.loads(out.read_text())
    tokenizer = AutoTokenizer.from_pretrained(first)
    prompt = tokenizer("hello", return_tensors="pt")
    reference = reference_llama(model, 1)
    with torch.no_grad():
        inner = reference_llama(model, 2).model(TOKENS).last_hidden_state
        losses = [reference_llama(model, depth)(TOKENS, labels=TOKENS).loss.item() for depth in (1, 2, 4)]
        piped = reference.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert set(results) == {"0", "1"}
    for result in results.values():
        assert result["model"] == "SortedLlamaForCausalLM" and result["inner"] == "SortedLlamaModel"
        assert result["config"] == "SortedLlamaConfig" and result["submodel"] == "LlamaForCausalLM"
        assert result["exit_layers"] == [1, 2, 4] and result["cut_exits"] == [1, 2]
        assert result["generated"] == reference.generate(TOKENS, max_new_tokens=6).tolist()
        torch.testing.assert_close(torch.tensor(result["last_hidden_state"]), inner)
        assert result["loss"] == pytest.approx(losses, rel=1e-5)
        assert result["text"] == tokenizer.decode(TOKENS[0])
        assert result["piped"] == tokenizer.decode(piped[0], skip_special_tokens=True)
    for name in REMOTE_CODE:
        assert (second / name).read_text() == (PACKAGE / name).read_text()
    assert json.loads((second / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert_same_weights(SortedLlamaForCausalLM.from_pretrained(second), model)


@pytest.mark.slow
def test_remote_code_beside_the_installed_package(tmp_path):
    """`trust_remote_code=True` where the package is imported: the model works, saves its code again, and shares."""
    model = tiny_sorted()
    folder, again = save_tiny(tmp_path / "first", model), tmp_path / "second"
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(logits(loaded, exit_layer=2), logits(reference_llama(model, 2)))
    loaded.save_pretrained(again)
    assert json.loads((again / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert all((again / name).exists() for name in REMOTE_CODE)
    assert_same_weights(SortedLlamaForCausalLM.from_pretrained(again), model)


@pytest.mark.slow
def test_a_checkpoints_folder_that_hides_the_package_says_so(tmp_path):
    """There `import modeling_sorted_llama` finds the checkpoint's file; with `-P`, as elsewhere, the package."""
    save_tiny(tmp_path, tiny_sorted())
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "HF_HUB_OFFLINE": "1"}
    code = "import modeling_sorted_llama; print(modeling_sorted_llama.__file__)"
    hidden, found = (
        subprocess.run(
            [sys.executable, *flags, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        for flags in ([], ["-P"])
    )
    assert hidden.returncode and "attempted relative import" not in hidden.stderr
    last = hidden.stderr.splitlines()[-1]
    assert last.startswith("ImportError:") and str(tmp_path / "modeling_sorted_llama.py") in last and "`-P`" in last
    assert found.stdout.strip() == str(PACKAGE / "__init__.py"), found.stderr
