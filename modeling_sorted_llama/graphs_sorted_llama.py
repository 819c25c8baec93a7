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

from .block_sorted_llama import Block, index_tensor
from .cache_sorted_llama import SortedCache, SortedCacheLayer, is_sorted_cache
from .compat_sorted_llama import CACHE_NAME
from .layer_inputs_sorted_llama import layer_inputs, position_embeddings, takes_slots, up_to


MAX_WIDTH = 16  # tokens a row of the widest block: longer prompts run uncompiled, as in transformers
# Graphs of one stretch for other models, numbers of rows, storage, dtypes, adapters, ...; torch's 8 are soon used up
MAX_VARIANTS = 64


class FixedCells:
    """
    The cells of a block in storage of fixed size, as the cache that layers are given: which they are is in tensors, so
    that one graph does for all of them.
    """

    def __init__(self, storage: dict[int, tuple[torch.Tensor, torch.Tensor]], starts: torch.Tensor, width: int):
        self.storage = storage
        self.rows = torch.arange(starts.shape[0], device=starts.device)[:, None]
        self.slots = starts[:, None] + torch.arange(width, device=starts.device)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        for storage, states in zip(self.storage[layer_idx], (key_states, value_states), strict=True):
            storage[self.rows, :, self.slots] = states.transpose(1, 2)
        return self.storage[layer_idx]

    def read(self, storage: torch.Tensor) -> torch.Tensor:
        """As [`Block.read`]."""
        return storage[self.rows, self.slots.clamp(max=storage.shape[1] - 1)]


def _run_layers(layers: Iterable[nn.Module], hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
    for layer in layers:
        hidden_states = layer(hidden_states, **given)
    return hidden_states


def _run_cells(
    layers: Sequence[nn.Module],
    norm: nn.Module,
    hidden_states: torch.Tensor,
    starts: torch.Tensor,
    storage: dict[int, tuple[torch.Tensor, torch.Tensor]],
    positions: torch.Tensor,
    angles: torch.Tensor | None,
    attended: torch.Tensor,
    rotary_emb: nn.Module,
    config: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What is compiled: cells, mask, layers and the exit's norm of a block, `(batch_size, width, hidden_size)`, that
    begins at `starts`; `positions`, `angles` and `attended` are of all slots.
    """
    cells = FixedCells(storage, starts, hidden_states.shape[1])
    mask = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=cells.slots.shape[0],
        q_length=cells.slots.shape[1],
        kv_length=attended.shape[1],
        mask_function=up_to(cells.slots),
        attention_mask=attended,
        allow_is_causal_skip=False,
        dtype=hidden_states.dtype,
        config=config,
        device=hidden_states.device,
    )
    position_ids = cells.read(positions).squeeze(-1)
    angles = None if angles is None else cells.read(angles)
    given = {
        "attention_mask": mask,
        "position_embeddings": position_embeddings(hidden_states, position_ids, angles, rotary_emb),
        "position_ids": position_ids,
        "use_cache": True,
        CACHE_NAME: cells,
    }
    hidden_states = _run_layers(layers, hidden_states, **given, **kwargs)
    return hidden_states, norm(hidden_states)


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
    norm: nn.Module,
    cache_layers: list[SortedCacheLayer],
    hidden_states: torch.Tensor,
    block: Block,
    compile_config: CompileConfig | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Run the states of a block, `(num_rows, width, hidden_size)`, through decoder layers of `model`, whose keys and
    values are in `cache_layers` of `cache`: as a graph, with a `compile_config`, where the block is narrow enough and
    storage for it is there. A graph has also the `norm` of the exit behind them, which is returned beside the states.
    """
    if block.width == 0:
        return hidden_states, None
    has_graph = compile_config is not None and block.width <= MAX_WIDTH
    whole = block.of_all_rows(cache_layers[0].lengths) if has_graph else block
    if not has_graph or not all(layer.has_room(whole.end) for layer in cache_layers):
        given = layer_inputs(cache, cache_layers, block, model, hidden_states)
        return _run_layers(layers, hidden_states, **given, **kwargs), None

    rows: Any = slice(None)
    states = hidden_states
    if whole is not block:  # of all rows, and the cells of the others hold no token
        rows = block.index(hidden_states.device)[0].squeeze(1)
        states = hidden_states.new_zeros(len(whole.starts), *hidden_states.shape[1:])
        states[rows] = hidden_states
    graph = graph_of(tuple(layer.number for layer in cache_layers), block.width > 1, compile_config)
    states = states.clone(memory_format=torch.contiguous_format)  # of plain strides
    if whole.width > 1:
        torch._dynamo.maybe_mark_dynamic(states, 1)
    storage = {layer.number: layer.storage for layer in cache_layers}
    starts = index_tensor(whole.starts, states.device)
    slots = cache.read_all(cache_layers[0].storage[0].shape[-2])
    outputs = graph(list(layers), norm, states, starts, storage, *slots, model.rotary_emb, model.config, **kwargs)
    states, normed = (output[rows].clone() for output in outputs)  # a CUDA graph's next replay writes over them
    return states, normed
