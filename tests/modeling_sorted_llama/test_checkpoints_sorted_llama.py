"""Save and load: every Llama as a sorted model, every sorted model as a Llama, and with the code in the folder."""

import ast
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaModel,
)

import sorted_llama
from sorted_llama.modeling_sorted_llama import SortedLlamaConfig, SortedLlamaForCausalLM, SortedLlamaModel
from sorted_llama.modeling_sorted_llama.heads_sorted_llama import EXIT_HEADS
from tests.modeling_sorted_llama.models import TOKENS, assert_is_whole, assert_same_weights, logits
from tests.tiny import reference_llama, run_as_stranger, save_gguf, save_tiny, tiny_llama, tiny_sorted


PACKAGE = Path(sorted_llama.modeling_sorted_llama.__file__).parent
STAYS_HERE = sorted(path.name for path in PACKAGE.glob("vllm_*.py"))  # for the installed package only
REMOTE_CODE = sorted(path.name for path in PACKAGE.glob("[!_]*.py") if path.name not in STAYS_HERE)
AUTO_MAP = {
    "AutoConfig": "configuration_sorted_llama.SortedLlamaConfig",
    "AutoModel": "modeling_sorted_llama.SortedLlamaModel",
    "AutoModelForCausalLM": "modeling_sorted_llama.SortedLlamaForCausalLM",
}


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
def test_the_dtype_of_loading_is_llamas(tmp_path, dtype):
    plain = tiny_llama().to(torch.bfloat16)
    plain.save_pretrained(tmp_path)
    model = SortedLlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert model.dtype == expected.dtype
    assert_same_weights(model, expected)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_implementation_is_taken_at_loading(tmp_path, attention):
    tiny_llama().save_pretrained(tmp_path)
    model = SortedLlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert_is_whole(model)


@pytest.mark.parametrize("place", ["auto", "disk"])
def test_a_device_map_with_offloading_changes_nothing(tmp_path, place):
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
def test_a_model_quantized_by_bitsandbytes_equals_the_quantized_llama(tmp_path, bits):
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


def test_a_gguf_file_loads_as_a_sorted_model(tmp_path):
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
@pytest.mark.parametrize("depth, exits", [(1, [1]), (2, [1, 2]), (3, None), (4, [1, 2, 4])])
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


def test_an_old_checkpoint_without_the_fields_loads(tmp_path):
    model = tiny_sorted()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in fields.items() if "exit" not in k and k != "auto_map"}))
    loaded = SortedLlamaForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    assert_is_whole(loaded)


def test_the_auto_classes_know_a_sorted_checkpoint(tmp_path):
    model = tiny_sorted()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is SortedLlamaConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is SortedLlamaModel
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, exit_layer=2)
    assert type(loaded) is SortedLlamaForCausalLM
    assert torch.equal(logits(loaded), logits(reference_llama(model, 2)))
    assert type(AutoModelForCausalLM.from_config(model.config)) is SortedLlamaForCausalLM


@pytest.mark.parametrize("fields", [{"exit_layer": 5}, {"exit_layers": [1, 2]}, {"exit_layers": [2, 4, 4]}], ids=repr)
def test_a_wrong_depth_in_from_pretrained_is_refused(tmp_path, fields):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`{next(iter(fields))}`.*4"):
        SortedLlamaForCausalLM.from_pretrained(tmp_path, **fields)


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
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

out, tokens, *folders = sys.argv[1:]
tokens = torch.tensor(json.loads(tokens))
results = {}
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    inner = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    shallow = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, exit_layer=1)
    assert all(type(m).__module__.startswith("transformers_modules") for m in (config, inner, model)), type(model)
    generated = {k: model.generate(tokens, do_sample=False, exit_layer=k, max_new_tokens=6) for k in (1, 2, 4)}
    assert torch.equal(generated[1], shallow.generate(tokens, do_sample=False, max_new_tokens=6))
    pipe = pipeline("text-generation", model=folder, trust_remote_code=True)
    results[folder] = {
        "names": [type(m).__name__ for m in (model, inner, config, model.extract_submodel(1))],
        "exit_layers": model.config.exit_layers,
        "generated": [tokens.tolist() for tokens in generated.values()],
        "last_hidden_state": inner(tokens, exit_layer=2).last_hidden_state.tolist(),
        "loss": model(tokens, labels=tokens).exit_losses.tolist(),
        "text": tokenizer.decode(tokens[0]),
        "piped": pipe("hello", exit_layer=1, max_new_tokens=4, do_sample=False)[0]["generated_text"],
    }
    if model.config.exit_heads == "shared":
        cut = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, num_hidden_layers=2)
        assert cut.config.exit_layers == [1, 2]
    if Path(folder).name == "shared":  # saved again, and loaded in turn
        again = Path(folder).with_name("again")
        model.save_pretrained(again)
        tokenizer.save_pretrained(again)
        folders.append(str(again))

import peft

adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
assert sorted(adapted.peft_config["default"].target_modules) == ["q_proj", "v_proj"]
with open(out, "w") as file:
    json.dump(results, file)
"""


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """What one process without the project finds in the folders of models with all kinds of exit heads."""
    folder = tmp_path_factory.mktemp("strangers")
    models = {
        kind: SortedLlamaForCausalLM.from_llama(tiny_llama(), exit_layers=[1, 2, 4], exit_heads=kind)
        for kind in EXIT_HEADS
    }
    generator = torch.Generator().manual_seed(1)
    for kind, model in models.items():
        for name, parameter in model.named_parameters():
            if "exit_" in name:  # no longer what full depth has
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        save_tiny(folder / kind, model)
    out = folder / "out.json"
    run_as_stranger(
        LOAD_AND_SAVE, out, json.dumps(TOKENS.tolist()), *(folder / kind for kind in models), folder=folder
    )
    return folder, models, json.loads(out.read_text())


@pytest.mark.parametrize("kind", [*EXIT_HEADS, "again"])
def test_a_process_without_the_package_loads_generates_and_saves(strangers, kind):
    """The folder alone is enough, also the one that such a process has saved."""
    folder, models, results = strangers
    model, result = models["shared" if kind == "again" else kind], results[str(folder / kind)]
    tokenizer = AutoTokenizer.from_pretrained(folder / kind)
    submodels = [model.extract_submodel(k) for k in (1, 2, 4)]
    with torch.no_grad():
        inner = submodels[1].model(TOKENS).last_hidden_state
        losses = [submodel(TOKENS, labels=TOKENS).loss.item() for submodel in submodels]
        generated = [submodel.generate(TOKENS, do_sample=False, max_new_tokens=6) for submodel in submodels]
        piped = submodels[0].generate(**tokenizer("hello", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert result["names"] == ["SortedLlamaForCausalLM", "SortedLlamaModel", "SortedLlamaConfig", "LlamaForCausalLM"]
    assert result["exit_layers"] == [1, 2, 4]
    assert result["generated"] == [tokens.tolist() for tokens in generated]
    if kind != "lens":  # whose sub-model has a plain norm, and the matrix in its head
        torch.testing.assert_close(torch.tensor(result["last_hidden_state"]), inner)
    assert result["loss"] == pytest.approx(losses, rel=1e-4)
    assert result["text"] == tokenizer.decode(TOKENS[0])
    assert result["piped"] == tokenizer.decode(piped[0], skip_special_tokens=True)
    for name in REMOTE_CODE:
        assert (folder / kind / name).read_text() == (PACKAGE / name).read_text()
    assert json.loads((folder / kind / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert_same_weights(SortedLlamaForCausalLM.from_pretrained(folder / kind), model)


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
