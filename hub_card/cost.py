"""What a token costs at an exit, from the shapes alone: the same on every machine."""

from dataclasses import dataclass

import torch

from sorted_llama.modeling_sorted_llama import SortedLlamaForCausalLM


@dataclass
class Cost:
    """Cost of one generated token."""

    parameters: int  # of the sub-model: embeddings, layers (the exit's own, too), norm, LM head (if tied, once)
    flops: int  # two for each weight of a matrix product, and those of attention
    kv_bytes: int  # keys and values that are kept


def cost_of_exit(model: SortedLlamaForCausalLM, exit_layer: int, context: int = 0) -> Cost:
    """Cost of a token at an exit, in the model's dtype, behind `context` tokens whose keys and values are read."""
    config = model.config
    head, norm = model.exit_head(exit_layer), model.model.exit_norm(exit_layer)
    layers = model.model.layers_of(exit_layer)
    read = {id(p): p for module in (*layers, norm, head) for p in module.parameters()}
    owned = read | {id(p): p for p in model.model.embed_tokens.parameters()}
    multiplied = sum(p.numel() for p in read.values() if p.dim() == 2)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * len(layers) * config.num_attention_heads * head_dim * context
    kv_size = torch.finfo(model.dtype).bits // 8
    return Cost(
        parameters=sum(p.numel() for p in owned.values()),
        flops=2 * multiplied + attention,
        kv_bytes=2 * len(layers) * config.num_key_value_heads * head_dim * kv_size,
    )


def weights_read(model: SortedLlamaForCausalLM, exit_layers: list[int]) -> dict[int, int]:
    """
    Of each of `exit_layers`, ascending, the weights that a token reads which leaves there, when it is looked at on the
    way at those before it: layers once, and a head at every stop. On most machines that is what a token's time is.
    """
    read, layer, found = 0, 0, {}
    for k in exit_layers:
        modules = (*model.model.layers_of(k)[layer:], model.model.exit_norm(k), model.exit_head(k))
        read += sum(p.numel() for module in modules for p in module.parameters())
        layer, found[k] = k, read
    return found
