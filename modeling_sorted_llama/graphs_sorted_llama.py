"""
Stretches of decoder layers as graphs (`torch.compile`), for caches whose storage is allocated at once: one graph for a
token a row, one for blocks of several, however many rows, tokens and slots there are. The host decides which runs.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .block_sorted_llama import Block
from .cache_sorted_llama import SortedCache, SortedCacheLayer, is_sorted_cache
from .compat_sorted_llama import CACHE_NAME
from .layer_inputs_sorted_llama import layer_inputs, position_embeddings, takes_slots, up_to


MAX_WIDTH = 16  # tokens a row of the widest block: longer prompts run uncompiled, as in transformers
# Graphs of one stretch for other models, numbers of rows, storage, dtypes, adapters, ...; torch's 8 are soon used up
MAX_VARIANTS = 64


def _copy(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """An input of a graph, of plain strides."""
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    if width > 1:
        torch._dynamo.maybe_mark_dynamic(tensor, 1)
    return tensor


class FixedCells:
    """
    The cells of a block in storage of fixed size, as the cache that layers are given: what differs from step to step
    is in tensors, so that one graph does for all of them.
    """

    def __init__(self, cache: SortedCache, layers: list[SortedCacheLayer], block: Block, device: torch.device):
        self.keys = {layer.number: layer.storage[0] for layer in layers}
        self.values = {layer.number: layer.storage[1] for layer in layers}
        self.rows, slots = block.index(device)
        num_slots = layers[0].storage[0].shape[-2]
        position_ids, angles, attended = cache.read(block, num_slots)
        self.slots, self.position_ids = _copy(slots, block.width), _copy(position_ids, block.width)
        self.angles = None if angles is None else _copy(angles, block.width)
        if attended is None:
            attended = torch.ones(len(block.starts), num_slots, dtype=torch.bool, device=device)
        self.attended = nn.functional.pad(attended, (0, num_slots - attended.shape[1]))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[self.rows, :, self.slots] = key_states.transpose(1, 2)
        values[self.rows, :, self.slots] = value_states.transpose(1, 2)
        return keys, values


def _run_layers(layers: Iterable[nn.Module], hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
    for layer in layers:
        hidden_states = layer(hidden_states, **given)
    return hidden_states


def _run_cells(
    layers: Sequence[nn.Module],
    hidden_states: torch.Tensor,
    cells: FixedCells,
    rotary_emb: nn.Module,
    config: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """What is compiled: positions, mask and layers of a block, `(batch_size, width, hidden_size)`."""
    mask = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=cells.slots.shape[0],
        q_length=cells.slots.shape[1],
        kv_length=cells.attended.shape[1],
        mask_function=up_to(cells.slots),
        attention_mask=cells.attended,
        allow_is_causal_skip=False,
        dtype=hidden_states.dtype,
        config=config,
        device=hidden_states.device,
    )
    given = {
        "attention_mask": mask,
        "position_embeddings": position_embeddings(hidden_states, cells.position_ids, cells.angles, rotary_emb),
        "position_ids": cells.position_ids,
        "use_cache": True,
        CACHE_NAME: cells,
    }
    return _run_layers(layers, hidden_states, **given, **kwargs)


def check_compile_config(compile_config: Any, cache: Any, attention: str | None, returned: list[str]) -> None:
    """Refuse what no graph can do: other caches and attentions, and what is `returned` of every layer."""
    if not isinstance(compile_config, CompileConfig):
        raise ValueError(f"`compile_config` must be a `CompileConfig` of transformers, got {compile_config!r}.")
    needed = None
    if not is_sorted_cache(cache) or not cache.max_cache_len:
        needed = "a `SortedCache` that is allocated at once, `max_cache_len=n`"
    elif not takes_slots(attention):
        needed = f"`attn_implementation` 'sdpa' or 'eager', and not {attention!r}"
    elif returned:
        needed = f"an output without `{'`, `'.join(returned)}`"
    if needed is not None:
        raise ValueError(f"`compile_config` needs {needed}.")


_graphs: dict[Any, Callable] = {}


def graph_of(numbers: tuple[int, ...], of_several: bool, compile_config: CompileConfig) -> Callable:
    """The compiled function of a stretch: each has a store of its own, where torch need not search for it."""
    key = numbers, of_several, repr(compile_config)
    if key not in _graphs:
        options = {"isolate_recompiles": True, "recompile_limit": MAX_VARIANTS, **compile_config.to_dict()}
        # By default torch looks for hooks that have come or gone since in no module that had none
        guarding_hooks = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
        _graphs[key] = guarding_hooks(torch.compile(_run_cells, **options))
    return _graphs[key]


def run_block(
    model: Any,
    cache: SortedCache,
    layers: Iterable[nn.Module],
    cache_layers: list[SortedCacheLayer],
    hidden_states: torch.Tensor,
    block: Block,
    compile_config: CompileConfig | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """
    Run the states of a block, `(num_rows, width, hidden_size)`, through decoder layers of `model`, whose keys and
    values are in `cache_layers` of `cache`: as a graph, with a `compile_config`, where the block is narrow enough and
    storage for it is there.
    """
    if block.width == 0:
        return hidden_states
    has_graph = compile_config is not None and block.width <= MAX_WIDTH
    whole = block.of_all_rows(cache_layers[0].lengths) if has_graph else block
    if not has_graph or not all(layer.has_room(whole.end) for layer in cache_layers):
        given = layer_inputs(cache, cache_layers, block, model, hidden_states)
        return _run_layers(layers, hidden_states, **given, **kwargs)

    rows: Any = slice(None)
    states = hidden_states
    if whole is not block:  # of all rows, and the cells of the others hold no token
        rows = block.index(hidden_states.device)[0].squeeze(1)
        states = hidden_states.new_zeros(len(whole.starts), *hidden_states.shape[1:])
        states[rows] = hidden_states
    graph = graph_of(tuple(layer.number for layer in cache_layers), block.width > 1, compile_config)
    cells = FixedCells(cache, cache_layers, whole, states.device)
    states = graph(list(layers), _copy(states, whole.width), cells, model.rotary_emb, model.config, **kwargs)
    return states[rows].clone()  # a CUDA graph's next replay writes over its output
