"""What the decoder layers are given beside the states of a block: positions, a mask, and a cache for its cells."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, eager_mask, sdpa_mask

from .block_sorted_llama import Block
from .cache_sorted_llama import SortedCache, SortedCacheLayer
from .compat_sorted_llama import CACHE_NAME


class BlockCache(Cache):
    """The cache that layers are given, by their number: it puts the keys and values of a block in their cells."""

    def __init__(self, layers: Any, block: Block):
        super().__init__(layers=layers)
        self.block = block

    @torch.compiler.disable
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        layer: Any = self.layers[layer_idx]
        return layer.write(self.block, key_states, value_states)


def layer_inputs(
    cache: SortedCache, layers: list[SortedCacheLayer], block: Block, model: Any, hidden_states: torch.Tensor
) -> dict[str, Any]:
    """What decoder layers of `model` are given beside the states of a block; `layers` are theirs in the cache."""
    if block.inputs is None:
        position_ids, angles, attended = cache.read(block)
        block.inputs = {
            "attention_mask": attention_mask(attended, block, model.config, hidden_states),
            "position_embeddings": position_embeddings(hidden_states, position_ids, angles, model.rotary_emb),
            "position_ids": position_ids,
            "use_cache": True,
        }
    return block.inputs | {CACHE_NAME: BlockCache({layer.number: layer for layer in layers}, block)}


def position_embeddings(
    hidden_states: torch.Tensor, position_ids: torch.Tensor, angles: torch.Tensor | None, rotary_emb: nn.Module
) -> Sequence[torch.Tensor]:
    """Cosines and sines of positions: `angles` where the cache stores them, or what `rotary_emb` makes of them."""
    if angles is None:
        return rotary_emb(hidden_states, position_ids=position_ids)
    return angles.to(hidden_states.device).chunk(2, dim=-1)


def up_to(slots: torch.Tensor) -> Callable:
    """The mask function of tokens that attend to the slots up to their own, `(num_rows, width)`."""
    return lambda row, head, query, key: key <= slots[row, query]


def takes_slots(implementation: str | None) -> bool:
    """Whether an attention implementation can be told, token by token, how many slots it attends to."""
    return ALL_MASK_ATTENTION_FUNCTIONS.get(implementation) in (sdpa_mask, eager_mask)  # a user's may share sdpa's


def attention_mask(
    attended: torch.Tensor | None, block: Block, config: PreTrainedConfig, hidden_states: torch.Tensor
) -> Any:
    """
    The mask of a block against all cached tokens, for the attention implementation of `config`; `attended`,
    `(num_rows, block.end)`, are those that are no padding.

    The implementation's own function makes it: through `create_causal_mask` it would be given rows of different
    lengths as an `and_mask_function`, which takes a millisecond (`torch.vmap`), and wait to read the padding.
    """
    implementation, device = config._attn_implementation, hidden_states.device
    if takes_slots(implementation) and attended is None and block.even and block.width == 1:
        return None  # the newest token attends to all
    if not takes_slots(implementation) and not block.even:
        raise ValueError(
            f"`attn_implementation={implementation!r}` cannot attend to rows of different lengths: load the "
            "model with `attn_implementation='sdpa'`, or generate one row at a time."
        )
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
    if make_mask is None and 1 < block.width < block.end:
        raise ValueError(
            f"`attn_implementation={implementation!r}` has no mask for several tokens behind others: register "
            "one under its name with transformers' `AttentionMaskInterface`, `sdpa_mask` for example."
        )
    if make_mask is None:
        return None
    offset, mask_function = block.starts[0], causal_mask_function
    if len(set(block.starts)) > 1:
        offset, mask_function = 0, up_to(block.index(device)[1])
    return make_mask(
        batch_size=len(block.starts),
        q_length=block.width,
        kv_length=block.end,
        q_offset=offset,
        kv_offset=0,
        mask_function=mask_function,
        attention_mask=None if attended is None else attended.to(device),
        allow_is_causal_skip=attended is None and block.even,
        dtype=hidden_states.dtype,
        config=config,
        use_vmap=False,
        device=device,
    )
