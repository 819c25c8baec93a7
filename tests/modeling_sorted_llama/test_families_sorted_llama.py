"""Models of other families that are Llamas: as sorted models they compute what they did, or they are refused."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from sorted_llama import SortedLlamaConfig, SortedLlamaForCausalLM, SortedLlamaModel
from sorted_llama.modeling_sorted_llama.families_sorted_llama import FAMILIES, NO_LLAMAS
from tests import real_models
from tests.families import CASES, Published, family_logits, first_layers, tiny_family
from tests.tiny import prompts, save_gguf, tiny_fields, tiny_llama


EXITS = [1, 2, 4]
FUSED = ["phi3", "gemma", "internlm2", "baichuan"]
ROUNDED = {
    "internlm2",
    "internlm2_bias",
    "internlm2_ungrouped",
    "baichuan",
}  # of references that add up in their order


def assert_equal_logits(case, actual, expected):
    if case in ROUNDED:
        torch.testing.assert_close(actual, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    else:
        assert torch.equal(actual, expected)


def load(folder, case, **kwargs):
    tiny_family(case).save_pretrained(folder, **kwargs)
    return SortedLlamaForCausalLM.from_pretrained(folder, exit_layers=EXITS, output_loading_info=True)


@pytest.mark.parametrize("case", CASES)
def test_every_position_has_the_logits_of_the_family(tmp_path, case):
    """At every depth those of the family's own model of as many layers; of left-padded rows, and of long ones."""
    model, info = load(tmp_path, case)
    assert not any(info.values()) and type(model) is SortedLlamaForCausalLM and type(model.config) is SortedLlamaConfig
    for inputs in (prompts(), prompts((100, 70))):
        attended = inputs["attention_mask"].bool()
        for depth in EXITS:
            expected = family_logits(first_layers(case, depth), inputs)
            with torch.no_grad():
                logits = model(**inputs, exit_layer=depth).logits
            assert_equal_logits(case, logits[attended], expected[attended])


@pytest.mark.parametrize("case", CASES)
def test_softs_losses_are_those_of_the_family(tmp_path, case):
    """Of every exit, the cross-entropy of the family's own model of as many layers."""
    model, _ = load(tmp_path, case)
    inputs = prompts((20, 20))
    labels = inputs["input_ids"]
    losses = model(**inputs, labels=labels).exit_losses
    for depth, loss in zip(EXITS, losses, strict=True):
        logits = family_logits(first_layers(case, depth), inputs)
        torch.testing.assert_close(loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


@pytest.mark.parametrize("case", [case for case, (name, _) in CASES.items() if not name.islower()])
def test_greedy_decoding_gives_the_tokens_of_the_family(tmp_path, case):
    model, _ = load(tmp_path, case)
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for depth in EXITS:
        expected = first_layers(case, depth).generate(**prompts(), **greedy)
        assert torch.equal(model.generate(**prompts(), **greedy, exit_layer=depth), expected)
    assert torch.equal(model.generate(**prompts(), **greedy, assistant_early_exit=2), expected)


@pytest.mark.parametrize("case", ["internlm2", "internlm2_bias", "baichuan"])
def test_greedy_decoding_gives_the_tokens_of_published_code(tmp_path, case):
    """Token by token without a cache, as no class of transformers decodes them."""
    model, _ = load(tmp_path, case)
    reference, tokens = tiny_family(case), prompts((6, 6))["input_ids"]
    for _ in range(8):
        logits = family_logits(reference, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    generated = model.generate(tokens[:, :6], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, tokens)


@pytest.mark.parametrize("case", ["mistral_nemo", "qwen2", "seed_oss", *FUSED])
def test_tensors_of_many_files_are_read(tmp_path, case):
    model, info = load(tmp_path / "many", case, max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 4 and not any(info.values())
    one, _ = load(tmp_path / "one", case)
    assert all(torch.equal(tensor, one.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("case", ["mistral", "qwen2", *FUSED])
def test_only_the_first_layers_are_read(tmp_path, case):
    tiny_family(case).save_pretrained(tmp_path)
    model, info = SortedLlamaForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2, output_loading_info=True)
    assert len(model.model.layers) == 2 and not any(info.values())
    assert_equal_logits(case, model(**prompts((6, 6))).logits, family_logits(first_layers(case, 2), prompts((6, 6))))


def change_nothing(model):
    pass


def quantize(model):
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(259, 16, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize(
    "name, change",
    [
        ("Qwen3", change_nothing),
        ("Qwen2", quantize),
        ("Qwen2", lambda model: inject_adapter_in_model(LoraConfig(), model)),
        ("Qwen2", lambda model: model.model.layers[1].to("meta")),
    ],
    ids=["other", "quantized", "adapter", "offloaded"],
)
def test_a_model_in_memory_that_cannot_be_a_llama_is_refused(name, change):
    config = getattr(transformers, f"{name}Config")(**tiny_fields())
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    change(model)
    with pytest.raises(TypeError, match=f"`model` must be .* got {name}ForCausalLM: pass its id or path"):
        SortedLlamaForCausalLM.from_llama(model)


@pytest.mark.parametrize("case", ["mistral", "qwen2", "phi3", "gemma"])
def test_what_is_frozen_of_a_model_in_memory_stays_so(case):
    model = tiny_family(case)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[:3].requires_grad_(False)
    llama = SortedLlamaForCausalLM.from_llama(model)
    trained = {name for name, parameter in llama.named_parameters() if parameter.requires_grad}
    of_last = {name for name, _ in llama.named_parameters() if "layers.3" in name and "o_proj.bias" not in name}
    assert trained == {"model.norm.weight"} | of_last


@pytest.mark.parametrize(
    "case, fields, kind",
    [
        ("qwen2", {}, ""),
        ("phi3", {"tie_word_embeddings": False, "vocab_size": 32064}, " (converted to a Llama)"),
    ],
    ids=["qwen2", "phi3"],
)
def test_a_gguf_file_of_a_family_is_read(tmp_path, case, fields, kind):
    reference = tiny_family(case, **fields)
    save_gguf(reference, tmp_path / "tiny.gguf")
    model, info = SortedLlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32, exit_layers=EXITS, output_loading_info=True
    )
    assert not any(info.values()) and model.config.exit_layers == EXITS and model.config.base_model_type == case
    assert model.config.name_or_path == str(tmp_path) and model.name_or_path == f"{tmp_path}{kind}"
    assert torch.equal(model(**prompts((9, 9))).logits, reference(**prompts((9, 9))).logits)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith("o_proj.bias"))


@pytest.mark.parametrize("case", ["mistral", "qwen2", *FUSED])
def test_what_from_pretrained_takes_reaches_the_model(tmp_path, case):
    reference = tiny_family(case)
    reference.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[2, 5], temperature=0.7, do_sample=True).save_pretrained(tmp_path)
    model = SortedLlamaForCausalLM.from_pretrained(
        tmp_path, exit_layers="every:2", exit_heads="lens", dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert (
        model.config.exit_layers == [2, 4]
        and model.config.exit_heads == "lens"
        and set(model.model.exit_norms) == {"2"}
    )
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert model.generation_config.eos_token_id == [2, 5] and model.generation_config.temperature == 0.7
    assert model.config.name_or_path == str(tmp_path)
    assert model.config.base_model_type == json.loads((tmp_path / "config.json").read_text())["model_type"]


@pytest.mark.parametrize("case", ["mistral", "qwen2", "seed_oss", *FUSED])
def test_a_saved_model_is_a_llama(tmp_path, case):
    """Under Llama's names, for transformers' own class; sorted again, it is the same model."""
    model, _ = load(tmp_path / "family", case)
    tied = model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "sorted")
    names = load_file(tmp_path / "sorted" / "model.safetensors").keys()
    assert names == {name for name in model.state_dict() if name != "lm_head.weight" or not tied}
    again = SortedLlamaForCausalLM.from_pretrained(tmp_path / "sorted")
    model.extract_submodel(4).save_pretrained(tmp_path / "plain")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert type(plain) is LlamaForCausalLM and not any(info.values())
    expected = model(**prompts()).logits
    assert torch.equal(again(**prompts()).logits, expected) and torch.equal(plain(**prompts()).logits, expected)
    assert again.config.base_model_type == model.config.base_model_type == plain.config.base_model_type


# What the family has not


@pytest.mark.parametrize("exit_heads", ["shared", "layer"])
@pytest.mark.parametrize("case", ["qwen2", "seed_oss"])
def test_a_bias_that_the_family_has_not_is_zero_for_good(tmp_path, case, exit_heads):
    tiny_family(case).save_pretrained(tmp_path / "family")
    model = SortedLlamaForCausalLM.from_pretrained(tmp_path / "family", exit_layers=EXITS, exit_heads=exit_heads)
    for step in range(2):  # as loaded, and as saved and loaded again
        biases = [p for name, p in model.named_parameters() if name.endswith("o_proj.bias")]
        others = {name: p.detach().clone() for name, p in model.named_parameters() if "o_proj.bias" not in name}
        assert len(biases) == 4 + 2 * (exit_heads == "layer")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model.train()(**prompts(), labels=prompts()["input_ids"]).loss.backward()
        optimizer.step()
        assert not any(bias.any() or bias.requires_grad for bias in biases)
        changed = [name for name, p in model.named_parameters() if name in others and not torch.equal(p, others[name])]
        assert len(changed) > 0.9 * len(others)
        model.save_pretrained(tmp_path / str(step))
        model = SortedLlamaForCausalLM.from_pretrained(tmp_path / str(step))
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "0")
    assert not SortedLlamaForCausalLM.from_llama(plain).model.layers[0].self_attn.o_proj.bias.requires_grad


def test_the_base_model_does_not_train_it_either(tmp_path):
    tiny_family("qwen2").save_pretrained(tmp_path)
    model = SortedLlamaModel.from_pretrained(tmp_path, exit_layers=EXITS)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [f"layers.{i}.self_attn.o_proj.bias" for i in range(4)]


@pytest.mark.parametrize("case", ["mistral", "qwen2", "seed_oss", "phi3", "gemma"])
def test_layers_that_stay_on_disk_are_those_of_the_family(tmp_path, case):
    """Also those of the saved model, whose files have what the family's have not."""
    reference = tiny_family(case)
    reference.save_pretrained(tmp_path / "family")
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places |= {f"model.layers.{i}": "disk" if 0 < i < 3 else "cpu" for i in range(4)}
    for source, target in (("family", "sorted"), ("sorted", "again")):
        model = SortedLlamaForCausalLM.from_pretrained(
            tmp_path / source, device_map=places, offload_folder=tmp_path / "disk"
        )
        assert model.model.layers[1].self_attn.o_proj.weight.is_meta
        assert torch.equal(model(**prompts()).logits, reference(**prompts()).logits)
        model.save_pretrained(tmp_path / target)


def test_the_biases_of_a_llama_are_trained():
    model = SortedLlamaForCausalLM.from_llama(tiny_llama(attention_bias=True), exit_layers=EXITS)
    assert all(parameter.requires_grad for parameter in model.parameters())


# What is no Llama


REFUSED = {
    "window": ("Mistral", {"sliding_window": 32}, "`sliding_window=32`.*pass `max_position_embeddings=32`"),
    "no tokens": ("Mistral", {"sliding_window": 0}, "`sliding_window=0`, which is no number of tokens: .*null"),
    "less than none": ("Mistral", {"sliding_window": -1}, "`sliding_window=-1`, which is no number of tokens"),
    "mistral types": ("Mistral", {"sliding_window": 32, "layer_types": ["full_attention"] * 4}, "`sliding_window=32`"),
    "phi3 types": ("Phi3", {"sliding_window": 32, "layer_types": ["full_attention"] * 4}, "`sliding_window=32`"),
    "size": ("Gemma", {"hidden_size": 18, "head_dim": 8}, "`hidden_size=18` and `num_attention_heads=4`"),
    "qwen2 ahead": ("Qwen2", {"is_causal": False}, "looks ahead"),
    "gemma ahead": ("Gemma", {"use_bidirectional_attention": True, "head_dim": 8}, "looks ahead"),
    "default window": ("Mistral", {"max_position_embeddings": 8192}, "`sliding_window=4096`"),
    "alternating": ("Ministral", {"sliding_window": 32, "head_dim": 8}, "`sliding_window=32`"),
    "qwen2 window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2},
        "=32` tokens",
    ),
    "phi3 window": ("Phi3", {"sliding_window": 255}, "`sliding_window=255`"),
    "phi3 part": ("Phi3", {"partial_rotary_factor": 0.5}, "`partial_rotary_factor=0.5`"),
    "seed_oss": ("SeedOss", {"attention_out_bias": True}, "`attention_out_bias=True`"),
    "gemma untied": ("Gemma", {"tie_word_embeddings": False, "head_dim": 8}, "has a head of its own"),
    "longrope": (
        "Phi3",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
        "'longrope'",
    ),
}


@pytest.mark.parametrize("name, fields, message", REFUSED.values(), ids=REFUSED)
def test_a_model_of_a_known_family_that_no_llama_can_be_is_refused(tmp_path, name, fields, message):
    """By its configuration: there are no weights. There is no way past the table."""
    config = getattr(transformers, f"{name}Config")(**tiny_fields(**fields))
    config.save_pretrained(tmp_path)
    sorted_config = SortedLlamaConfig(**tiny_fields(max_position_embeddings=config.max_position_embeddings))
    for call in (
        lambda: SortedLlamaForCausalLM.from_pretrained(tmp_path),
        lambda: SortedLlamaForCausalLM(config),
        lambda: SortedLlamaModel(config),
        lambda: SortedLlamaConfig.from_llama(config),
        lambda: SortedLlamaConfig.from_dict(config.to_dict()),
        lambda: SortedLlamaForCausalLM.from_pretrained(tmp_path, config=config),
        lambda: SortedLlamaForCausalLM.from_pretrained(tmp_path, config=sorted_config),
    ):
        with pytest.raises(
            ValueError, match=f"^`({tmp_path}` holds|config` is of) a model of type '{config.model_type}' .*{message}"
        ):
            call()


@pytest.mark.parametrize("name", ["Qwen3", "Gemma2", "Olmo2"])
def test_the_config_of_another_model_is_refused(name):
    config = getattr(transformers, f"{name}Config")(**tiny_fields())
    with pytest.raises(ValueError, match=f"`config` is of a model of type '{config.model_type}', which is not a Lla"):
        SortedLlamaForCausalLM(config)


@pytest.mark.parametrize("case", ["qwen2", "gemma"])
def test_fields_of_a_family_are_none_of_a_sorted_config(case):
    fields = tiny_family(case).config.to_dict()
    with pytest.raises(ValueError, match=f"`model_type` must be 'llama' or 'sorted_llama', got '{case}'"):
        SortedLlamaConfig(**fields)
    assert SortedLlamaConfig.from_dict(fields).base_model_type == case


def test_a_window_that_the_text_does_not_reach_is_none(tmp_path):
    reference = tiny_family("mistral", sliding_window=32)
    reference.save_pretrained(tmp_path)
    model = SortedLlamaForCausalLM.from_pretrained(tmp_path, max_position_embeddings=32)
    assert model.config.max_position_embeddings == 32
    assert torch.equal(model(**prompts((32, 32))).logits, reference(**prompts((32, 32))).logits)
    for length in ("32", 0, 32.0):
        with pytest.raises(ValueError, match=f"`max_position_embeddings` must be an integer .* got {length!r}"):
            SortedLlamaForCausalLM.from_pretrained(tmp_path, max_position_embeddings=length)
    longer = prompts((40, 40))
    assert not torch.equal(model(**longer).logits, reference(**longer).logits)  # what is refused would be wrong


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "baichuan", "hidden_size": 5120, "vocab_size": 125696}, "13B has no rotary positions"),
        ({"model_type": "baichuan", "hidden_size": 4096, "vocab_size": 64000}, "`vocab_size=64000`.*only Baichuan 2"),
        (
            {"model_type": "phi3", "quantization_config": {"quant_method": "bitsandbytes"}},
            "fused tensors are quantized",
        ),
        ({"model_type": "a_new_one"}, "holds a model of type 'a_new_one': a sorted model is made from .*'qwen2'"),
    ],
    ids=["baichuan 13B", "baichuan 1", "quantized", "unknown"],
)
def test_a_config_that_no_llama_has_is_refused(tmp_path, fields, message):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        SortedLlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_type", NO_LLAMAS)
def test_a_family_that_is_no_llama_is_refused_with_the_reason(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=rf"'{model_type}', which is not a Llama \(.{{9,}}\): a sorted model is made"):
        SortedLlamaConfig.from_pretrained(tmp_path)
    assert model_type in CONFIG_MAPPING and model_type not in FAMILIES


@pytest.mark.parametrize("case", FUSED)
def test_who_does_not_split_tensors_says_who_does(tmp_path, case):
    tiny_family(case).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`SortedLlamaForCausalLM.from_pretrained` does it, or `sorted-llama c"):
        SortedLlamaModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("case", FUSED)
def test_a_config_that_is_passed_along_has_its_tensors_split(tmp_path, case):
    """What tells that they are fused is the checkpoint's that it was read from, and is not saved."""
    tiny_family(case).save_pretrained(tmp_path / "family")
    config = SortedLlamaConfig.from_pretrained(tmp_path / "family", exit_layers=EXITS)
    model, info = SortedLlamaForCausalLM.from_pretrained(tmp_path / "family", config=config, output_loading_info=True)
    assert not any(info.values()) and model.config.exit_layers == EXITS
    config.save_pretrained(tmp_path / "saved")
    assert SortedLlamaConfig.from_pretrained(tmp_path / "saved").fused_tensors_of is None
    assert model.config.fused_tensors_of is None is model.extract_submodel(2).config.to_dict().get("fused_tensors_of")


@pytest.mark.parametrize("case", ["mistral", "qwen2", "qwen2_yarn", "seed_oss", "phi3", "gemma"])
def test_a_config_of_the_family_that_is_passed_along_is_read_by_the_same_table(tmp_path, case):
    reference = tiny_family(case)
    reference.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    model, info = SortedLlamaForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not any(info.values()) and model.config.base_model_type == config.model_type
    assert torch.equal(model(**prompts()).logits, reference(**prompts()).logits)


@pytest.mark.parametrize("case", FUSED)
def test_a_config_that_is_used_again_tells_nothing_of_another_checkpoint(tmp_path, case):
    """Tensors of the family's are split, and a Llama's are not, whichever of the two configurations is passed."""
    model, _ = load(tmp_path / "family", case)
    model.save_pretrained(tmp_path / "sorted")
    configs = [SortedLlamaConfig.from_pretrained(tmp_path / name) for name in ("family", "sorted")]
    for name in ("family", "sorted"):
        for config in configs:
            again, info = SortedLlamaForCausalLM.from_pretrained(
                tmp_path / name, config=config, output_loading_info=True
            )
            assert not any(info.values())
            assert all(torch.equal(tensor, again.state_dict()[n]) for n, tensor in model.state_dict().items())


@pytest.mark.parametrize("case", ["qwen2", "phi3", "gemma"])
def test_a_model_saved_without_its_tied_head_is_read(tmp_path, case):
    """As a base class saves it, whose names have no prefix."""
    reference = tiny_family(case)
    reference.model.save_pretrained(tmp_path)
    model, info = SortedLlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and torch.equal(model(**prompts()).logits, reference(**prompts()).logits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", ["mistral", "qwen2", "phi3"])
def test_a_model_quantized_as_it_is_read_equals_that_of_the_family(tmp_path, case, bits):
    pytest.importorskip("bitsandbytes")
    tiny_family(case, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantized = {"quantization_config": BitsAndBytesConfig(**{f"load_in_{bits}bit": True}), "dtype": torch.float32}
    model = SortedLlamaForCausalLM.from_pretrained(tmp_path, exit_layers=EXITS, **quantized)
    assert type(model.model.layers[0].self_attn.v_proj).__name__ == f"Linear{bits}bit{'' if bits == 4 else 'Lt'}"
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, **quantized)
    assert torch.equal(model(**prompts((9, 9))).logits, expected(**prompts((9, 9))).logits)


SPELLINGS = [
    {"hidden_act": "gelu"},
    {"hidden_act": "gelu", "hidden_activation": None},
    {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
    {"hidden_activation": "gelu_pytorch_tanh"},
    {},
]


@pytest.mark.parametrize("fields", SPELLINGS)
def test_gelu_in_a_file_of_gemmas_is_its_tanh_form(tmp_path, fields):
    reference = tiny_family("gemma")
    reference.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.pop("hidden_act") == "gelu_pytorch_tanh"
    (tmp_path / "config.json").write_text(json.dumps(saved | fields))
    model = SortedLlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model(**prompts()).logits, reference(**prompts()).logits)


def test_reading_a_family_changes_nothing_for_llamas(tmp_path):
    """transformers reverses conversions where it saves: no Llama, plain or sorted, may get the family's names."""
    load(tmp_path / "family", "phi3")
    for model in (tiny_llama(), SortedLlamaForCausalLM.from_llama(tiny_llama())):
        model.save_pretrained(tmp_path / "saved")
        names = load_file(tmp_path / "saved" / "model.safetensors").keys()
        assert names == tiny_llama().state_dict().keys() - {"lm_head.weight"}


# Models that people use


def parameters_of_a_layer_and_of_the_rest(model):
    """Their numbers, in a model of one layer."""
    numbers = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layer = sum(number for name, number in numbers.items() if "layers" in name)
    return layer, sum(numbers.values()) - layer


@pytest.mark.parametrize("name", real_models.REAL)
def test_a_real_model_has_the_parameters_of_its_own_class_and_its_page(name, tmp_path):
    number, fields = real_models.REAL[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = SortedLlamaConfig.from_pretrained(tmp_path).to_llama()
    assert type(config) is LlamaConfig and config.num_hidden_layers == fields["num_hidden_layers"]
    for field in ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "head_dim"):
        assert getattr(config, field) == fields.get(field, getattr(config, field))
    theta, scaling = fields.get("rope_theta", 1e4), fields.get("rope_scaling") or {"type": "default"}
    assert config.rope_parameters["rope_theta"] == theta and config.rope_parameters["rope_type"] == scaling["type"]
    config.num_hidden_layers = 1
    model_type, one_layer = fields["model_type"], {**fields, "num_hidden_layers": 1}
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
        if model_type in CONFIG_MAPPING:
            own = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**one_layer))
            assert config.hidden_act == ("gelu_pytorch_tanh" if model_type == "gemma" else own.config.hidden_act)
        else:
            kv_heads = fields["num_key_value_heads"] or fields["num_attention_heads"]
            own = Published(model_type, {**one_layer, "num_key_value_heads": kv_heads})
    for module in llama.modules():
        if model_type in ("qwen2", "seed_oss") and hasattr(module, "o_proj"):
            module.o_proj.bias = None  # of zeros
    if model_type == "gemma":  # whose head differs by a factor, and is no longer the embeddings
        llama.lm_head.weight = llama.model.embed_tokens.weight
    layer, rest = parameters_of_a_layer_and_of_the_rest(llama)
    assert (layer, rest) == parameters_of_a_layer_and_of_the_rest(own)
    assert number in (None, fields["num_hidden_layers"] * layer + rest)


@pytest.mark.parametrize("name", real_models.REFUSED)
def test_a_real_model_that_is_no_llama_is_refused(name, tmp_path):
    reason, fields = real_models.REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"holds a model of type '{fields['model_type']}' that .*{reason}"):
        SortedLlamaForCausalLM.from_pretrained(tmp_path)
    if "window" in reason:  # where texts stay within it, there is none
        config = SortedLlamaConfig.from_pretrained(tmp_path, max_position_embeddings=fields["sliding_window"])
        assert config.to_llama().max_position_embeddings == fields["sliding_window"]
