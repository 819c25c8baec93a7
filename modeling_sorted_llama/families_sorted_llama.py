"""Families of models that are Llamas under other names: their configuration and their tensors as a Llama's."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _model_at(path: Any, model_type: str) -> str:
    """How an error begins that says what is wrong with a model, of a path that may be empty."""
    return f"{f'`{path}` holds' if path else '`config` is of'} a model of type {model_type!r}"


class FusedTensorsError(ValueError):
    """The tensors of a checkpoint are a Llama's once they are split, which the class that is to read them does not."""

    def __init__(self, config: Any):
        self.model_type = config.fused_tensors_of
        super().__init__(
            f"{_model_at(config.name_or_path, self.model_type)}, of tensors that are a Llama's once they are "
            "converted: `SortedLlamaForCausalLM.from_pretrained` does it, or `sorted-llama convert` first."
        )


@dataclass(frozen=True)
class SplitHeads:
    """
    The rows of queries, keys and values out of one fused matrix (or bias), as an operation of transformers'
    `WeightConverter`: all queries, then all keys, then all values, or so for each key-value head with `grouped`.
    """

    grouped: bool = False

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], config: Any, **_: Any
    ) -> dict[str, torch.Tensor]:
        ((fused,),) = input_dict.values()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        groups = kv_heads if self.grouped else 1
        sizes = [heads // groups, kv_heads // groups, kv_heads // groups]
        parts = fused.unflatten(0, (groups, sum(sizes), config.head_dim)).split(sizes, dim=1)
        return {name: part.flatten(0, 2) for name, part in zip(target_patterns, parts, strict=True)}


@dataclass(frozen=True)
class SplitHalves:
    """As [`SplitHeads`], for the gate and what it multiplies."""

    def convert(self, input_dict: dict[str, Any], source_patterns, target_patterns: list[str], **_: Any):
        ((fused,),) = input_dict.values()
        return dict(zip(target_patterns, fused.chunk(2), strict=True))


@dataclass(frozen=True)
class NormalizeRows:
    """As [`SplitHeads`], for a head whose rows have length 1 wherever they are used."""

    def convert(self, input_dict: dict[str, Any], source_patterns, target_patterns: list[str], **_: Any):
        ((weight,),) = input_dict.values()
        return {target_patterns[0]: nn.functional.normalize(weight)}


@dataclass(frozen=True)
class AddOne:
    """As [`SplitHeads`], for the weight of a norm that multiplies by one more."""

    def convert(self, input_dict: dict[str, Any], source_patterns, target_patterns: list[str], **_: Any):
        ((weight,),) = input_dict.values()
        return {target_patterns[0]: weight + 1}


@dataclass(frozen=True)
class ScaleEmbeddings:
    """As [`SplitHeads`], for embeddings that are scaled where they are looked up, and not where they are the head."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns, target_patterns: list[str], config: Any, **_: Any
    ) -> dict[str, torch.Tensor]:
        ((weight,),) = input_dict.values()
        scale = torch.tensor(config.hidden_size**0.5).to(weight)
        return dict(zip(target_patterns, [weight * scale, weight], strict=True))


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Family:
    """
    How checkpoints of one `model_type` are Llamas.

    Args:
        fields (`Callable`, *optional*): From the family's configuration, the fields of Llama's that it has under
            another name, or not at all. A `ValueError` says what of it no Llama can do.
        renamed (`Mapping[str, str]`, *optional*): Names of tensors, as patterns, and their names in a Llama.
        fused (`Mapping[str, tuple]`, *optional*): The same for tensors that become several, or others, and how.
        lacks_output_bias (`bool`, *optional*, defaults to `False`): Whether queries, keys and values have biases and
            the output of attention has none. In a Llama it has one too: zeros, which no training may change.
    """

    fields: Callable[[Any], dict[str, Any]] = lambda config: {}
    renamed: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[tuple[str, ...], Any]] = field(default_factory=dict)
    lacks_output_bias: bool = False

    def llama_names(self, name: str) -> list[str]:
        """The names in a Llama of what a tensor of the family's holds."""
        for pattern, in_llama in self.renamed.items():
            name = re.sub(pattern, in_llama, name)
        for pattern, (parts, _) in self.fused.items():
            if re.search(pattern, name):
                return [re.sub(pattern, part, name) for part in parts]
        return [name]

    def differs(self, name: str) -> bool:
        """Whether a layer, or a tensor of it, has other names or other values in a Llama."""
        return any(re.search(pattern, name) for pattern in (*self.renamed, *self.fused))

    def split(self, name: str, tensor: torch.Tensor, config: Any) -> list[torch.Tensor]:
        """What a tensor of the family's holds, for each of [`llama_names`]."""
        for pattern, (parts, operation) in self.fused.items():
            if re.search(pattern, name):
                return list(operation.convert({pattern: [tensor]}, [pattern], list(parts), config=config).values())
        return [tensor]


def _qwen2(config: Any) -> dict[str, Any]:
    return {"attention_bias": True}


def _seed_oss(config: Any) -> dict[str, Any]:
    if config.attention_out_bias:
        raise ValueError("has `attention_out_bias=True`, which a Llama has only as one with the other biases")
    return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def _phi3(config: Any) -> dict[str, Any]:
    if config.rope_parameters["rope_type"] == "longrope":
        raise ValueError("has positions of kind 'longrope', which it counts from another length than a Llama")
    return {}


def _internlm2(config: Any) -> dict[str, Any]:
    return {"attention_bias": getattr(config, "bias", True)}


def _baichuan(config: Any) -> dict[str, Any]:
    if config.hidden_size > 4096:  # the file of the 13B does not say it
        raise ValueError(f"has `hidden_size={config.hidden_size}`: the 13B has no rotary positions, but ALiBi")
    if config.vocab_size != 125696:
        raise ValueError(f"has `vocab_size={config.vocab_size}`: only Baichuan 2 (125696) has a normalised head")
    return {}


def _gemma(config: Any) -> dict[str, Any]:
    if not config.tie_word_embeddings:
        raise ValueError("has a head of its own, `tie_word_embeddings=False`, as no Gemma 1 has")
    # What its files call "gelu" is the tanh form, also where a version of transformers (5.16) computes the other
    hidden_act = {"gelu": "gelu_pytorch_tanh"}.get(config.hidden_act, config.hidden_act)
    return {"attention_bias": config.attention_bias, "tie_word_embeddings": False, "hidden_act": hidden_act}


FAMILIES = {
    "mistral": Family(),
    "ministral": Family(),
    "qwen2": Family(_qwen2, lacks_output_bias=True),
    "seed_oss": Family(_seed_oss, lacks_output_bias=True),
    "phi3": Family(
        _phi3,
        fused={
            r"self_attn\.qkv_proj": (_QKV, SplitHeads()),
            r"mlp\.gate_up_proj": (("mlp.gate_proj", "mlp.up_proj"), SplitHalves()),
        },
    ),
    "internlm2": Family(
        _internlm2,
        renamed={
            r"tok_embeddings\.": "embed_tokens.",
            r"attention\.wo\.": "self_attn.o_proj.",
            r"attention_norm\.": "input_layernorm.",
            r"ffn_norm\.": "post_attention_layernorm.",
            r"feed_forward\.w1\.": "mlp.gate_proj.",
            r"feed_forward\.w2\.": "mlp.down_proj.",
            r"feed_forward\.w3\.": "mlp.up_proj.",
            r"^output\.": "lm_head.",
        },
        fused={r"attention\.wqkv": (_QKV, SplitHeads(grouped=True))},
    ),
    "baichuan": Family(
        _baichuan,
        fused={
            r"self_attn\.W_pack": (_QKV, SplitHeads()),
            r"lm_head": (("lm_head",), NormalizeRows()),
        },
    ),
    "gemma": Family(
        _gemma,
        fused={
            r"(?:^|model\.)embed_tokens": (("model.embed_tokens", "lm_head"), ScaleEmbeddings()),
            r"input_layernorm": (("input_layernorm",), AddOne()),
            r"post_attention_layernorm": (("post_attention_layernorm",), AddOne()),
            r"(?:^|model\.)norm": (("model.norm",), AddOne()),
        },
    ),
}

_EXPERTS = "its layers have experts, of which a router chooses"
_QK_NORMS = "its queries and keys are normed"
_POST_NORMS = "it has norms behind attention and MLP"
# Why not, for those that are asked for most
NO_LLAMAS = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "olmoe", "gpt_oss", "llama4"), _EXPERTS),
    **dict.fromkeys(("qwen3", "gemma3", "gemma3_text", "olmo2", "olmo3"), _QK_NORMS),
    **dict.fromkeys(("gemma2", "glm4"), _POST_NORMS),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), "its keys and values are compressed, and its layers have experts"),
    **dict.fromkeys(
        ("mistral3", "qwen2_vl", "qwen2_5_vl", "llava"), "it reads images; its text part alone may be one"
    ),
    "ministral3": "it scales queries by their position",
    "smollm3": "some of its layers have no positions",
    "glm": "it turns half of each head by position, in pairs of neighbours",
    **dict.fromkeys(("helium", "ernie4_5"), "it turns pairs of neighbours in a head, a Llama its halves"),
    "granite": "it scales embeddings, attention, residuals and logits",
    "cohere": "its attention and MLP run beside each other",
}


def llama_fields(fields: dict[str, Any], path: Any, max_position_embeddings: int | None = None) -> dict[str, Any]:
    """
    The fields of a Llama's configuration that is the same model as a configuration of another family.

    Args:
        fields (`dict`): What is in the family's `config.json`; a Llama's is returned as it is.
        path (`str`): Where it is from, for errors; empty where that is not known.
        max_position_embeddings (`int`, *optional*): Length of text to allow, where it is another than the file says.

    Returns:
        `dict`: The fields; `base_model_type`, which tells the family on; and where the tensors of a checkpoint with
        that configuration are to be converted, `fused_tensors_of`, the same.

    Raises:
        ValueError: If the model is not a Llama.
    """
    model_type = fields.get("model_type", "llama")
    if model_type in ("llama", "sorted_llama"):
        return fields
    what = _model_at(path, model_type)
    if model_type not in FAMILIES:
        why = f", which is not a Llama ({NO_LLAMAS[model_type]})" if model_type in NO_LLAMAS else ""
        known = ", ".join(["'llama'", "'sorted_llama'", *map(repr, FAMILIES)])
        raise ValueError(f"{what}{why}: a sorted model is made from a checkpoint of type {known}.")
    family = FAMILIES[model_type]
    # Fields that are not in the file have the family's defaults, where transformers knows them
    in_transformers = model_type in CONFIG_MAPPING
    config_class = CONFIG_MAPPING[model_type] if in_transformers else LlamaConfig
    try:
        config = config_class(**{name: value for name, value in fields.items() if name != "model_type"})
        _check_attention(config, max_position_embeddings or config.max_position_embeddings)
        own = family.fields(config)
    except KeyError as error:  # what transformers raises about `rope_scaling`
        raise ValueError(f"{what} that its own class in transformers refuses: {error.args[0]}") from error
    except ValueError as error:
        raise ValueError(f"{what} that {error}.") from error
    if family.fused and fields.get("quantization_config") is not None:
        raise ValueError(f"{what} whose fused tensors are quantized: load one that is not, and quantize it then.")
    names = {*LlamaConfig().to_dict(), "dtype", "quantization_config"} - {"architectures", "transformers_version"}
    same = {name: value for name, value in config.to_dict().items() if name in names}
    same["rope_parameters"] = {k: v for k, v in same["rope_parameters"].items() if k != "partial_rotary_factor"}
    biases = {"attention_bias": False, "mlp_bias": False}
    told = {"base_model_type": model_type, **({"fused_tensors_of": model_type} if family.fused else {})}
    return {**same, **biases, **own, **told}


_CONVERTED = " (converted to a Llama)"


def converted_name(path: str) -> str:
    """
    The name of a model whose tensors were converted as they were read, which PEFT notes in its adapters as their base.
    It is no path: at the path is the family's own model, which would silently leave out what it has no layers for.
    """
    return f"{path}{_CONVERTED}"


def is_converted(name: Any) -> bool:
    """Whether a name of a model, a path or `None`, is from [`converted_name`]."""
    return str(name).endswith(_CONVERTED)


def check_adapters(model: Any, unexpected: Iterable[str]) -> None:
    """
    Refuse adapters that were trained on a family's own model, for layers that differ in a Llama.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, with the adapters in place.
        unexpected (`Iterable[str]`): Names of tensors of the adapters that the model has no place for.

    Raises:
        ValueError: If one of them is of a layer of the family's, or if a layer with an adapter has other values there.
    """
    family = FAMILIES.get(getattr(model.config, "base_model_type", "llama"), Family())
    layers = list(unexpected)
    adapters = getattr(model, "peft_config", {}).values()
    if is_converted(model.name_or_path) and not all(is_converted(one.base_model_name_or_path) for one in adapters):
        layers += [name for name, _ in model.named_modules() if name.endswith((".base_layer", ".original_module"))]
    for layer in filter(family.differs, layers):
        raise ValueError(
            f"The adapter is for a model of type {model.config.base_model_type!r}, whose layer {layer!r} is another "
            "in a Llama: `sorted-llama convert ADAPTER FOLDER` converts the adapter, or says why that cannot be."
        )


# In a Llama with `attention_bias`, of a family that lacks it; also where PEFT has wrapped the layer
ABSENT_BIAS = r"o_proj\.(base_layer\.|modules_to_save\.\w+\.)?bias$"
# Families that a Llama can become again
WAYS_BACK = ("mistral", "qwen2")


def family_config(config: LlamaConfig, model_type: str) -> PreTrainedConfig:
    """
    The configuration of a family's model that is the same as a Llama: the way back, for families whose tensors have a
    Llama's names.

    Args:
        config ([`~transformers.LlamaConfig`]): The Llama's.
        model_type (`str`): `"mistral"` or `"qwen2"`.

    Raises:
        ValueError: If models of that type do not have the Llama's biases, or its heads.
    """
    has = {"attention_bias": FAMILIES[model_type].lacks_output_bias, "mlp_bias": False}
    if model_type == "qwen2":  # in transformers more, but not in every engine
        has["head_dim"] = config.hidden_size // config.num_attention_heads
    for name, value in has.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"A model of type {model_type!r} has what a Llama has with `{name}={value}`: this one has "
                f"`{name}={getattr(config, name)}`. Types to try: {', '.join(map(repr, WAYS_BACK))}."
            )
    left_out = {"model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp", "base_model_type"}
    fields = {name: value for name, value in config.to_dict().items() if name not in left_out}
    new = CONFIG_MAPPING[model_type](**fields, sliding_window=None)
    new.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    return new


def _check_attention(config: PreTrainedConfig, max_position_embeddings: int) -> None:
    """Refuse attention that does not reach back over the whole text, or ahead, and heads that no Llama has."""
    if config.hidden_size % config.num_attention_heads:
        heads = f"`hidden_size={config.hidden_size}` and `num_attention_heads={config.num_attention_heads}`"
        raise ValueError(f"has {heads}: of a Llama's class in transformers the first is a multiple of the second")
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        raise ValueError("looks ahead, `is_causal=False` or `use_bidirectional_attention=True`, as no Llama does")
    window = getattr(config, "sliding_window", None)
    # A class that does not have the field (Mistral's, Phi-3's) slides in all layers, whatever is in the file
    layer_types = config.layer_types if hasattr(type(config), "layer_types") else None
    slides = layer_types is None or "sliding_attention" in layer_types
    if window is not None and slides and window < 1:
        raise ValueError(f"has `sliding_window={window}`, which is no number of tokens: for none it is null")
    if window is not None and slides and window < max_position_embeddings:
        raise ValueError(
            f"sees no further back than `sliding_window={window}` tokens, a Llama all {max_position_embeddings}: for "
            f"texts of that length pass `max_position_embeddings={window}`, which `sorted-llama convert` takes as "
            f"`--max_position_embeddings {window}`"
        )
    turned = config.rope_parameters.get("partial_rotary_factor") or 1.0
    if turned != 1.0:
        raise ValueError(f"turns a part of each head by position, `partial_rotary_factor={turned}`, a Llama the whole")


def conversions(model_type: str) -> list[Any]:
    """What transformers does with the tensors of a family's checkpoint to make them a Llama's."""
    # Here, not above: what only other families need may be missing from a later transformers
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    family = FAMILIES[model_type]
    split = [WeightConverter(name, list(parts), [split]) for name, (parts, split) in family.fused.items()]
    return [*(WeightRenaming(name, in_llama) for name, in_llama in family.renamed.items()), *split]


def splitting_class(model_type: str, base: type[LlamaForCausalLM]) -> type[LlamaForCausalLM]:
    """A subclass of a plain Llama's class whose `from_pretrained` splits the fused tensors of a family."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping

    # transformers looks conversions up by the name of the class, and has them reversed when its models are saved:
    # a class of its own, whose models only lend their tensors, leaves those of Llamas as they are
    name = f"{base.__name__}_{model_type}"
    register_checkpoint_conversion_mapping(name, conversions(model_type), overwrite=True)
    return type(name, (base,), {})


def lacks_output_bias(config: Any) -> bool:
    """Whether a Llama has biases, `o_proj.bias`, that the family which it is from has not: they are zero."""
    family = FAMILIES.get(getattr(config, "base_model_type", "llama"), Family())
    return family.lacks_output_bias and config.attention_bias


def absent_biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those biases of a model, by name."""
    parameters = model.named_parameters() if lacks_output_bias(model.config) else ()
    return {name: parameter for name, parameter in parameters if re.search(ABSENT_BIAS, name)}


def freeze_absent_biases(model: Any) -> Any:
    """The model, without training of those zeros: what is trained of it fits into the family again."""
    for bias in absent_biases(model).values():
        if bias.requires_grad:
            bias.register_hook(torch.zeros_like)  # PEFT thaws it again with `bias="all"`: its gradient is zero
        bias.requires_grad_(False)
    return model
