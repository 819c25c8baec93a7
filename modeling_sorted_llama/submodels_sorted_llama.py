"""Sorted models of plain Llamas and the other way round: from checkpoints, or around the tensors of a model."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

from .compat_sorted_llama import gathered
from .configuration_sorted_llama import SORTED_FIELDS, SortedLlamaConfig, as_sorted_config, check_heads_are_kept
from .families_sorted_llama import (
    ABSENT_BIAS,
    FAMILIES,
    FusedTensorsError,
    absent_biases,
    check_adapters,
    converted_name,
    freeze_absent_biases,
    is_converted,
    lacks_output_bias,
    splitting_class,
)
from .heads_sorted_llama import EXIT_HEADS
from .modes_sorted_llama import make_plain


class LoadsLlamas(PreTrainedModel):
    """Base of models that load Llamas of every depth and family, whose checkpoints may have more tensors, or fewer."""

    def post_init(self) -> None:
        super().post_init()
        # Of a checkpoint that is loaded with fewer layers than it has, the others are left out on purpose
        there = "|".join(map(str, range(self.config.num_hidden_layers)))
        self._keys_to_ignore_on_load_unexpected |= {rf"(^|\.)layers\.(?!({there})\.)"}
        self._keys_to_ignore_on_load_missing |= {ABSENT_BIAS} if lacks_output_bias(self.config) else set()
        self.register_load_state_dict_pre_hook(_check_adapters_of_peft)

    def initialize_weights(self) -> None:
        super().initialize_weights()
        for name, bias in absent_biases(freeze_absent_biases(self)).items():
            init.zeros_(bias)  # transformers passes modules over that were quantized as they were read
            module = self.get_submodule(name.rpartition(".")[0])
            if any(parameter.is_meta for parameter in module.parameters()) and not bias.is_meta:
                # The module is left on disk, where no file has this: as a buffer it stays in memory
                del module.bias
                module.register_buffer("bias", bias.detach())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args: Any, config: Any = None, **kwargs: Any):
        """See [`~transformers.PreTrainedModel.from_pretrained`]."""
        if isinstance(config, PreTrainedConfig):
            config = _config_of(pretrained_model_name_or_path, as_sorted_config(config), **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.integrations.PeftAdapterMixin.load_adapter`]; also of checkpoints that are adapters."""
        info = super().load_adapter(*args, **kwargs)
        check_adapters(self, info.unexpected_keys)
        return info


def _config_of(path: Any, config: SortedLlamaConfig, **kwargs: Any) -> SortedLlamaConfig:
    """A configuration that is passed along for a checkpoint, which alone tells of which family its own tensors are."""
    if path is None:  # beside tensors that are passed along too
        return config
    kwargs |= {"max_position_embeddings": config.max_position_embeddings}
    try:
        own, _ = SortedLlamaConfig.get_config_dict(path, **kwargs)
    except OSError:  # weights without a configuration: there is but that which is passed
        return config
    config = copy.deepcopy(config)
    config.__dict__["fused_tensors_of"] = own.get("fused_tensors_of")
    return config


def _check_adapters_of_peft(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """PEFT loads what it finds a place for, and says nothing of the rest."""
    names = [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    check_adapters(model, [name for name in names if name not in own])


class LlamaOfFamily(LoadsLlamas, LlamaForCausalLM):
    """A plain Llama, to become a sorted one, of a model whose tensors are a Llama's under other names, or fused."""

    config_class = SortedLlamaConfig

    def __init__(self, config: SortedLlamaConfig):
        super().__init__(config)
        self.name_or_path = converted_name(config.name_or_path)

    @classmethod
    def of_model(cls, model: Any) -> Any:
        """A Llama itself; of another family's model, of transformers' own class, its tensors as a plain Llama."""
        if isinstance(model, LlamaForCausalLM):
            return model
        family = next((name for name in FAMILIES if type(model).__name__ == CAUSAL_LMS.get(name)), None)
        tensors = model.state_dict()
        are_plain = all(t.is_floating_point() and t.itemsize > 1 and not t.is_meta for t in tensors.values())
        if family is None or not are_plain or hasattr(model, "peft_config"):
            raise TypeError(
                "`model` must be a LlamaForCausalLM, or a model of a family that is one (Qwen2ForCausalLM, ...) "
                "without adapters, not quantized and not offloaded, "
                f"got {type(model).__name__}: pass its id or path instead."
            )
        config = copy.deepcopy(model.config)
        config.__dict__.pop("quantization_config", None)  # of a file that was dequantized as it was read
        config = cls.config_class.from_llama(config)
        splitting = splitting_class(family, cls)
        llama = splitting.from_pretrained(None, config=config, state_dict=tensors, dtype=model.dtype)
        for name, parameter in model.named_parameters():  # what was frozen stays so
            for of_llama in FAMILIES[family].llama_names(name):
                llama.get_parameter(of_llama).requires_grad_(parameter.requires_grad)
        llama.generation_config = model.generation_config
        llama.config.name_or_path = model.name_or_path  # which is "None" without a path
        llama.name_or_path = converted_name(model.name_or_path) if config.fused_tensors_of else model.name_or_path
        return llama.to(model.device).train(model.training)


def load(cls: Any, from_pretrained: Callable, *args: Any, **kwargs: Any) -> Any:
    """A sorted model, of class `cls`, of what its own `from_pretrained` reads, or that of another class."""
    if kwargs.get("gguf_file") is None:
        try:
            return from_pretrained(*args, **kwargs)
        except FusedTensorsError as error:
            model_type = error.model_type
        loaded = splitting_class(model_type, LlamaOfFamily).from_pretrained(*args, **kwargs)
        return _of_loaded(loaded, cls.from_llama)
    # transformers finds the tensors of a GGUF file by the model type, which is never a sorted one's
    fields = {name: kwargs.pop(name) for name in SORTED_FIELDS if name in kwargs}
    loaded = AutoModelForCausalLM.from_pretrained(*args, **kwargs)
    return _of_loaded(loaded, lambda model: cls.from_llama(model, **fields))


def _of_loaded(loaded: Any, finish: Callable[[Any], Any]) -> Any:
    """What `from_pretrained` returns, a model or with `output_loading_info=True` a pair, with the model finished."""
    return (finish(loaded[0]), loaded[1]) if isinstance(loaded, tuple) else finish(loaded)


# What transformers' loading and PEFT know a quantized model by
_QUANTIZATION = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


def plain_submodel(source: Any, exit_layer: int) -> LlamaForCausalLM:
    """The sub-model of an exit of a sorted model as a plain Llama around the same tensors."""
    # The modules tell what the exit owns; the list of exits in the config may have been changed since
    config, layers = source.config.to_llama(exit_layer), source.model.layers_of(exit_layer)
    config.num_hidden_layers = len(layers)
    target, share = _share_layers(source, LlamaForCausalLM, config, layers)
    k = str(exit_layer)
    own_head = k in source.exit_lm_heads
    head = source.exit_lm_heads[k] if own_head else source.lm_head
    kind = EXIT_HEADS[source.config.exit_heads if k in source.model.exit_norms else "shared"]
    norm, head = kind.to_plain(source.model.exit_norm(exit_layer), head)
    target.model.norm, target.lm_head = share(norm), share(head)
    make_plain(target.generation_config)
    return target.train(source.training)


def sorted_model(source: LlamaForCausalLM, cls: Any, config: Any) -> Any:
    """
    A sorted model, of class `cls`, around the tensors of a Llama, plain or sorted. What its exits own and those of
    `source` do not are copies of its next layers, the final norm and the LM head.
    """
    check_heads_are_kept(getattr(source.config, "exit_heads", "shared"), config.exit_heads, config.num_hidden_layers)
    target, share = _share_layers(source, cls, config, source.model.layers[: config.num_hidden_layers])
    model, kind = target.model, EXIT_HEADS[config.exit_heads]
    norm, head = model.norm, target.lm_head = share(source.model.norm), share(source.lm_head)

    def fill(own: nn.ModuleDict, of_source: Any, copy_of: Callable, shared: nn.Module | None = None) -> None:
        for k in own:
            original = model.layers[int(k)] if shared is None else shared
            own[k] = share(of_source[k]) if k in of_source else copy_of(original)

    with gathered([norm, head, *(model.layers[int(k)] for k in model.exit_decoders)]):
        fill(model.exit_decoders, getattr(source.model, "exit_decoders", {}), kind.copy_layer)
        fill(model.exit_norms, getattr(source.model, "exit_norms", {}), kind.copy_norm, norm)
        fill(target.exit_lm_heads, getattr(source, "exit_lm_heads", {}), kind.copy_head, head)
    for k, exit_norm in model.exit_norms.items():
        device = next(model.layers_of(int(k))[-1].parameters()).device
        if device.type != "meta":  # with the layer on `meta`, hooks bring it in
            exit_norm.to(device)
    if hasattr(source, "hf_device_map"):  # tells `Trainer` that the layers are on several devices
        target.hf_device_map = source.hf_device_map
    return freeze_absent_biases(target).train(source.training)


def _share_layers(
    source: LlamaForCausalLM, cls: type[LlamaForCausalLM], config: LlamaConfig, layers: Iterable[nn.Module]
) -> tuple[Any, Callable[[nn.Module], nn.Module]]:
    """A `cls` with embeddings of `source` and `layers`, and the function that copies modules around their tensors."""
    with torch.device("meta"):
        target = cls(config)
    # What `deepcopy` finds here it does not copy: tensors are shared, and the copies point to the new config
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*source.parameters(), *source.buffers())}
    memo[id(source.config)] = target.config

    def share(module: nn.Module) -> nn.Module:
        memo.update({id(parameter): parameter for parameter in module.parameters()})  # a folded head is a new one
        return copy.deepcopy(module, memo)

    target.model.embed_tokens = share(source.model.embed_tokens)
    target.model.layers = nn.ModuleList(map(share, layers))
    target.model.rotary_emb = share(source.model.rotary_emb)
    target.generation_config = copy.deepcopy(source.generation_config)
    if is_converted(source.name_or_path):
        target.name_or_path = source.name_or_path
    for name in _QUANTIZATION:
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))
    return target, share
