"""Llamas around the tensors of another one: sorted models as plain ones and the other way round, without a copy."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from .compat_sorted_llama import gathered
from .heads_sorted_llama import EXIT_HEADS
from .modes_sorted_llama import make_plain


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
    kind_of_source = getattr(source.config, "exit_heads", "shared")
    if kind_of_source not in ("shared", config.exit_heads):
        raise ValueError(
            f"`exit_heads={config.exit_heads!r}` would drop what the exits of this model own, which has "
            f"`exit_heads={kind_of_source!r}`: start from `extract_submodel({config.num_hidden_layers})`."
        )
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
    return target.train(source.training)


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
    for name in _QUANTIZATION:
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))
    return target, share
