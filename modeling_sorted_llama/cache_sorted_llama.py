"""SortedCache: a key-value cache that knows how deep each token has been run."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask, eager_mask, sdpa_mask

from .block_sorted_llama import Block, index_tensor, reserve
from .compat_sorted_llama import CACHE_NAME
from .configuration_sorted_llama import as_int


STORAGE_BLOCK = 256  # tokens by which the keys and values of a layer grow: no copy per token, little unused memory
PENDING_BLOCK = 32


class _SizesOfBlock(Cache):
    """What transformers asks of a cache when it makes the mask of a block whose rows are of one length."""

    def __init__(self, block: Block):
        super().__init__(layers=[])
        self.block = block

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.block.starts[0]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.block.end, 0


class SortedCacheLayer(DynamicLayer):
    """
    Keys and values of one decoder layer, each of shape `(batch_size, num_heads, max(lengths), head_dim)`, in storage
    that grows by blocks of 256 tokens. Row `r` holds `lengths[r]` tokens.
    """

    def __init__(self, max_cache_len: int = 0):
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        super().__init__()
        self.max_cache_len = max_cache_len
        self.lengths: tuple[int, ...] = ()
        self.block: Block | None = None

    # What transformers sees (and reorders, repeats) is the storage in use
    @property
    def keys(self) -> torch.Tensor | None:
        return None if self._keys is None else self._keys[..., : self.get_seq_length(), :]

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._keys = keys

    @property
    def values(self) -> torch.Tensor | None:
        return None if self._values is None else self._values[..., : self.get_seq_length(), :]

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._values = values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @torch.compiler.disable
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.prefetch()  # where the pass before ended at an exit, this layer was not the next one
        block, appended = self.block, self.block is None
        if block is None:  # a model that is not ours: the rows grow alike
            block = _block_of_all_rows(self.lengths, key_states)
        batch_size = len(self.lengths) or key_states.shape[0]
        self._keys = reserve(self._keys, key_states, batch_size, block.end, STORAGE_BLOCK, self.max_cache_len)
        self._values = reserve(self._values, value_states, batch_size, block.end, STORAGE_BLOCK, self.max_cache_len)
        block.write(self._keys, key_states)
        block.write(self._values, value_states)
        if appended:
            self.lengths = (block.end,) * batch_size
        return block.select(self._keys[..., : block.end, :]), block.select(self._values[..., : block.end, :])

    def get_seq_length(self) -> int:
        return max(self.lengths, default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    # The whole storage moves: tokens on their way up are in it before `lengths` counts them
    def offload(self) -> None:
        if self._keys is not None and self._values is not None:
            self._keys = self._keys.to("cpu", non_blocking=True)
            self._values = self._values.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        if self._keys is not None and self._values is not None and self._keys.device != self.device:
            self._keys = self._keys.to(self.device, non_blocking=True)
            self._values = self._values.to(self.device, non_blocking=True)

    def crop(self, tokens_to_remove: int) -> None:
        self.lengths = tuple(max(length - abs(tokens_to_remove), 0) for length in self.lengths)

    def reset(self) -> None:
        self.lengths = ()
        self._keys = self._values = None
        self.is_initialized = False


class SortedCache(Cache):
    """
    A key-value cache in which every token may have been run to its own depth. `generate` makes one wherever depth
    moves; passed back in, it continues in any mode.

    Exits cut the decoder into segments. Each layer knows how many tokens passed it, and the hidden states of tokens
    that stopped at an exit are kept there, *pending*: the next forward pass that goes deeper takes them along, as one
    block with their own positions. So keys and values are exact in every layer, and no layer runs a token twice.
    Rows of the batch may hold different numbers of tokens.

    It holds the keys and values of an ordinary cache, the pending states (freed when they are taken along), and two
    numbers a token. Storage grows by blocks of 256 tokens, or is allocated at once with `max_cache_len`. It is for
    inference: storage is written in place.

    Args:
        max_cache_len (`int`, *optional*, defaults to 0):
            Number of tokens to allocate at once; more still fit.
        offloading (`bool`, *optional*, defaults to `False`):
            Whether to keep keys and values in CPU memory, as [`~transformers.DynamicCache`] does.

    Attributes:
        lengths (`tuple[int, ...]`): Number of tokens of each row.
        pending (`dict[int, torch.Tensor]`): By exit layer, states of shape `(batch_size, slots, hidden_size)`; row
            `r`'s tokens from the first that its next layer has not seen.
        layer_token_passes (`int`): Number of times that any layer was run for any token.

    Example:

    ```python
    >>> from sorted_llama import SortedLlamaForCausalLM
    >>> from transformers import AutoTokenizer

    >>> model = SortedLlamaForCausalLM.from_pretrained("user/sorted-llama")
    >>> tokenizer = AutoTokenizer.from_pretrained("user/sorted-llama")
    >>> messages = [{"role": "user", "content": "What is the capital of Peru?"}]
    >>> inputs = tokenizer.apply_chat_template(
    ...     messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ... )
    >>> turn = model.generate(**inputs, assistant_early_exit=10, max_new_tokens=8, return_dict_in_generate=True)
    >>> next_turn = model.generate(turn.sequences, cache=turn.cache, exit_threshold=0.9, max_new_tokens=8)
    >>> print(tokenizer.decode(next_turn[0], skip_special_tokens=True))
    ```
    """

    def __init__(self, max_cache_len: int = 0, offloading: bool = False):
        new_layer: Any = partial(SortedCacheLayer, max_cache_len)
        super().__init__(layer_class_to_replicate=new_layer, offloading=offloading)
        self.lengths: tuple[int, ...] = ()
        self.pending: dict[int, torch.Tensor] = {}
        self.layer_token_passes = 0
        self._positions: torch.Tensor | None = None  # (batch_size, slots)
        self._mask: torch.Tensor | None = None  # (batch_size, slots); `None` where every token is attended to
        self._angles: torch.Tensor | None = None  # (batch_size, slots, 2 * head_dim); see `_write_angles`
        self._positions_ahead = 0  # of the slots, in the row where they are most; padding makes it negative
        self._block: Block | None = None
        self._plain_lengths: tuple[int, ...] = ()

    # What transformers asks of a cache

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        self._add_layers(layer_idx + 1)
        if self._block is None:
            self._begin_plain_update(key_states, layer_idx)
        self.layers[layer_idx].block = self._block
        self.layers[layer_idx].lengths = self.lengths_in(layer_idx)  # zeros before the first
        keys_and_values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._block is None and layer_idx == 0:
            self.lengths = self.layers[0].lengths
        return keys_and_values

    def prefetch(self, layer_idx: int, *args: Any, **kwargs: Any) -> None:
        if len(self.layers) > 1:  # a lone layer would be its own successor, fetched while it is in use
            super().prefetch(layer_idx, *args, **kwargs)

    def _begin_plain_update(self, key_states: torch.Tensor, layer_idx: int) -> None:
        """A plain Llama goes on with this cache: all rows alike, and nothing may be pending in its layers."""
        if layer_idx == 0:
            self._plain_lengths = self.lengths
            self.pending = {}  # the new tokens will not be among them
            if self._positions is not None:
                block = _block_of_all_rows(self.lengths, key_states)
                self._write_positions(self._next_positions(block, self._positions.device), block)
                self._append_to_mask(None, block, self._positions.device)
        passed = self.lengths_in(layer_idx)
        if self._plain_lengths and passed != self._plain_lengths:
            raise ValueError(
                f"The cache holds {max(self._plain_lengths)} tokens in layer {layer_idx} but {max(passed)} in layer "
                f"{layer_idx + 1}, and a plain Llama cannot take along what is pending: run a sorted model to this "
                "depth first, or start from an empty cache."
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens of the longest row; of layer `layer_idx`, those that passed it."""
        return max(self.lengths, default=0) if layer_idx == 0 else max(self.lengths_in(layer_idx), default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0

    @property
    def batch_size(self) -> int:
        return len(self.lengths) or -1

    @property
    def is_croppable(self) -> bool:
        return True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens of every row (transformers counts them negative)."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"`tokens_to_remove` must be 0 or negative, got {tokens_to_remove}: `crop(-2)` forgets the two newest "
                "tokens of every row, and `rollback(lengths)` keeps a number of tokens of each."
            )
        self.rollback([max(length + tokens_to_remove, 0) for length in self.lengths])

    def reset(self) -> None:
        super().reset()
        self.lengths, self.pending = (), {}
        self._positions = self._mask = self._angles = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `r` becomes a copy of row `beam_idx[r]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order. A cache without tokens has no rows yet, and stays as it is."""
        if not self.lengths:
            return
        rows = torch.arange(len(self.lengths), device="cpu")[torch.as_tensor(indices).cpu()]
        self._apply_to_rows(lambda tensor: tensor.index_select(0, rows.to(tensor.device)), rows.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        rows = [row for row in range(len(self.lengths)) for _ in range(repeats)]
        self._apply_to_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0), rows)

    def _apply_to_rows(self, function: Any, rows: list[int]) -> None:
        if self.offloading and torch.accelerator.is_available():
            torch.accelerator.synchronize()  # a layer may be on its way
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = function(layer.keys), function(layer.values)
                layer.lengths = tuple(layer.lengths[row] for row in rows)
        self.lengths = tuple(self.lengths[row] for row in rows)
        self.pending = {depth: function(states) for depth, states in self.pending.items()}
        self._positions = None if self._positions is None else function(self._positions)
        self._mask = None if self._mask is None else function(self._mask)
        self._angles = None if self._angles is None else function(self._angles)
        self._free_pending()

    # What the sorted model asks of it

    def lengths_in(self, layer_idx: int) -> tuple[int, ...]:
        """Number of tokens of each row that passed layer `layer_idx` (from 0)."""
        lengths = self.layers[layer_idx].lengths if layer_idx < len(self.layers) else ()
        return lengths or (0,) * len(self.lengths)

    def rollback(self, lengths: Sequence[int]) -> None:
        """
        Keep the first `lengths[r]` tokens of row `r`, in every layer and among the pending states alike.

        Args:
            lengths (`Sequence[int]`):
                One number of tokens a row; a row that holds fewer is left as it is.

        Raises:
            ValueError: If there is not one for each row, or if one is no integer of at least 0.
        """
        lengths = [as_int(length) for length in lengths]  # type: ignore[misc]
        if len(lengths) != len(self.lengths) or any(length is None or length < 0 for length in lengths):
            raise ValueError(
                f"`lengths` must hold {len(self.lengths)} integers of at least 0, one a row, got {list(lengths)}."
            )
        self.lengths = tuple(map(min, self.lengths, lengths))
        cropped: dict[tuple[int, ...], tuple[int, ...]] = {}  # the layers of a segment have the same lengths
        for layer in self.layers:
            if layer.lengths not in cropped:
                cropped[layer.lengths] = tuple(map(min, layer.lengths, lengths))
            layer.lengths = cropped[layer.lengths]
        self._free_pending()

    def append(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rows: list[int] | None = None,
        counts: Sequence[int] | None = None,
        rotary_emb: Any = None,
        one_by_one: bool = False,
    ) -> Block:
        """
        Give new tokens their slots and positions, before any layer runs.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(num_rows, num_tokens, hidden_size)`):
                The new tokens.
            position_ids (`torch.LongTensor` of shape `(num_rows, num_tokens)`, *optional*):
                Their positions. Default to those after the row's newest token.
            attention_mask (`torch.Tensor` of shape `(num_rows, num_tokens)`, *optional*):
                0 where a token is never attended to; may hold the cached tokens before. Defaults to 1 for the
                new tokens, and to what it was for the others.
            rows (`list[int]`, *optional*):
                The rows that grow. Default to all.
            counts (`Sequence[int]`, *optional*):
                Number of tokens of each row, left-aligned. Default to `num_tokens`.
            rotary_emb (`torch.nn.Module`, *optional*):
                The model's rotary embedding, where the angles of a token depend on how it arrives (RoPE of kind
                `dynamic` and `longrope`).
            one_by_one (`bool`, *optional*, defaults to `False`):
                Whether the tokens are decoded ones, which come one after the other, and not together as a prompt's do.

        Returns:
            `Block`: Their cells.

        Raises:
            ValueError: If the number of rows or the mask's shape is not that of the cache.
        """
        num_rows, num_tokens = inputs_embeds.shape[:2]
        known = self.lengths or (0,) * num_rows
        expected = len(known) if rows is None else len(rows)
        if num_rows != expected:
            raise ValueError(f"The cache holds {expected} rows, but the input has {num_rows}.")
        starts = known if rows is None else [known[row] for row in rows]
        block = Block(rows, starts, [num_tokens] * num_rows if counts is None else counts)
        self._check_mask(attention_mask, block)
        self.lengths = known
        if num_tokens == 0:
            return block

        batch_size, device = len(self.lengths), inputs_embeds.device
        if position_ids is None:
            position_ids = self._next_positions(block, device)
        self._write_positions(position_ids, block)
        self._append_to_mask(attention_mask, block, device)
        if rotary_emb is not None and (rotary_emb.rope_type == "longrope" or "dynamic" in rotary_emb.rope_type):
            self._write_angles(rotary_emb, position_ids, block, inputs_embeds, one_by_one)

        grown = list(self.lengths)
        for row, start, count in zip(range(batch_size) if rows is None else rows, starts, block.counts, strict=True):
            grown[row] = start + count
        self.lengths = tuple(grown)
        return block

    def _write_positions(self, position_ids: torch.Tensor, block: Block) -> None:
        values = position_ids.expand(len(block.starts), block.width).unsqueeze(-1)
        if self._positions is None and max(self.lengths) > 0:  # a plain Llama has filled the cache
            self._positions = torch.arange(max(self.lengths), device=values.device).repeat(len(self.lengths), 1)
        positions = None if self._positions is None else self._positions.unsqueeze(-1)
        positions = reserve(positions, values, len(self.lengths), block.end, STORAGE_BLOCK)
        block.write(positions, values)
        self._positions = positions.squeeze(-1)

    def _write_angles(
        self, rotary_emb: Any, position_ids: torch.Tensor, block: Block, states: torch.Tensor, one_by_one: bool
    ) -> None:
        """
        RoPE of kind `dynamic` and `longrope` turns all tokens of a call by angles that depend on the greatest position
        in it, and remembers the greatest of all. A block of drafts, or of tokens that were pending, is no call of
        plain decoding: each of its tokens gets, once, the angles that it has there.
        """
        position_ids = position_ids.expand(len(block.starts), block.width)
        if block.rows is None and block.even:
            self._positions_ahead = int(position_ids.max()) - (block.end - 1)
        values: Any = None
        parts = [slice(i, i + 1) for i in range(block.width)] if one_by_one else [slice(0, block.width)]
        for start in set(block.starts):
            rows = index_tensor([i for i, s in enumerate(block.starts) if s == start], states.device)
            for part in parts:
                newest = position_ids.new_full((len(rows), 1), start + part.stop - 1 + self._positions_ahead)
                rotary_emb(states, position_ids=torch.zeros_like(newest))  # forgets the greatest
                positions = torch.cat([position_ids[rows, part], newest], dim=1)
                angles = torch.cat(rotary_emb(states, position_ids=positions), dim=-1)[:, :-1]
                if values is None:
                    values = angles.new_zeros(len(block.starts), block.width, angles.shape[-1])
                values[rows, part] = angles
        self._angles = reserve(self._angles, values, len(self.lengths), block.end, STORAGE_BLOCK)
        block.write(self._angles, values)

    def _next_positions(self, block: Block, device: torch.device) -> torch.Tensor:
        new = torch.arange(block.width, device=device)
        if self._positions is None:
            return new + index_tensor(block.starts, device)[:, None]
        if block.even and block.rows is None:
            start = block.starts[0]
            return new + (self._positions[:, start - 1 : start] + 1 if start > 0 else 0)
        rows, slots = block.index(device)
        newest = self._positions[rows, slots[:, :1].clamp(min=1) - 1]
        return new + torch.where(slots[:, :1] > 0, newest + 1, 0)

    def _check_mask(self, attention_mask: torch.Tensor | None, block: Block) -> None:
        num_rows, widths = len(block.starts), {block.width, block.end if block.even else block.width}
        if attention_mask is not None and (
            attention_mask.dim() != 2 or len(attention_mask) != num_rows or attention_mask.shape[1] not in widths
        ):
            raise ValueError(
                f"`attention_mask` must be of shape ({num_rows}, {block.end}), the cached tokens and the new ones "
                f"where rows are of one length, or ({num_rows}, {block.width}), got {tuple(attention_mask.shape)}."
            )

    def _append_to_mask(self, attention_mask: torch.Tensor | None, block: Block, device: torch.device) -> None:
        if attention_mask is None and self._mask is None:
            return
        new = torch.ones(len(block.starts), block.width, dtype=torch.bool, device=device)
        if attention_mask is not None:
            new = attention_mask[:, -block.width :].to(device, torch.bool)
        if self._mask is None:
            self._mask = torch.ones(len(self.lengths), max(self.lengths), dtype=torch.bool, device=device)
        mask = reserve(self._mask.unsqueeze(-1), new.unsqueeze(-1), len(self.lengths), block.end, STORAGE_BLOCK)
        block.write(mask, new.unsqueeze(-1))
        self._mask = mask.squeeze(-1)
        if attention_mask is not None and attention_mask.shape[1] > block.width and block.rows is None:
            self._mask[:, : block.starts[0]] = attention_mask[:, : -block.width]

    def segments(self, depth: int, rows: list[int] | None = None) -> list[tuple[int, int]]:
        """
        The stretches of layers, `(first, last)`, that a pass to `depth` runs: cut where rows have pending states.

        Raises:
            ValueError: If upper layers have seen fewer tokens than lower ones and nothing is pending there.
        """
        cuts = [0]
        for cut in range(1, depth):
            below, above = self.lengths_in(cut - 1), self.lengths_in(cut)
            if below is above:
                continue
            short = [row for row in (range(len(below)) if rows is None else rows) if above[row] < below[row]]
            if short and cut not in self.pending:
                raise ValueError(
                    f"The cache holds {below[short[0]]} tokens in layer {cut} but {above[short[0]]} in layer "
                    f"{cut + 1}, and not the hidden states to go on from: it was filled by a model of {cut} layers "
                    f"and cannot be continued at `exit_layer={depth}`. Go on at `exit_layer={cut}`, or start from an "
                    "empty cache."
                )
            if below != above:  # of other rows, too: the layers of a segment hold the same tokens
                cuts.append(cut)
        return list(zip(cuts, [*cuts[1:], depth], strict=True))

    def enter(self, first: int, hidden_states: torch.Tensor, block: Block) -> tuple[torch.Tensor, Block]:
        """Join what is pending before layer `first` with the states that arrive there."""
        passed = self.lengths_in(first)
        starts = passed if block.rows is None else [passed[row] for row in block.rows]
        if list(starts) != block.starts:
            if block.width > 0:
                self.suspend(first, hidden_states, block)
            counts = [a + n - b for a, n, b in zip(block.starts, block.counts, starts, strict=True)]
            relative = Block(block.rows, [0] * len(starts), counts)
            pending = self.pending[first]
            self.pending[first] = pending = reserve(pending, pending, len(passed), relative.end, PENDING_BLOCK)
            hidden_states = relative.read(pending)
            block = Block(block.rows, starts, counts)
        self._block = block
        return hidden_states, block

    def leave(self, first: int, last: int, block: Block) -> None:
        """Layers `first` to `last` have run the block."""
        self._block = None
        if block.width == 0:
            return
        passed = list(self.lengths_in(first))
        rows = range(len(passed)) if block.rows is None else block.rows
        for row, start, count in zip(rows, block.starts, block.counts, strict=True):
            passed[row] = start + count
        lengths = tuple(passed)
        self._add_layers(last)
        for layer in self.layers[first:last]:
            layer.lengths = lengths
        self.layer_token_passes += sum(block.counts) * (last - first)
        self._free_pending()

    def abandon(self, block: Block) -> None:
        """A pass has failed, and the states on their way up are lost: keep what every layer of them holds."""
        self._block = None
        self.rollback([min(block.starts)] * len(self.lengths))

    def suspend(self, depth: int, hidden_states: torch.Tensor, block: Block) -> None:
        """Keep states that layer `depth` (from 0) has not run: pending, until a pass goes deeper."""
        passed = self.lengths_in(depth)
        rows = range(len(passed)) if block.rows is None else block.rows
        offsets = [start - passed[row] for start, row in zip(block.starts, rows, strict=True)]
        relative = Block(block.rows, offsets, block.counts)
        self.pending[depth] = reserve(self.pending.get(depth), hidden_states, len(passed), relative.end, PENDING_BLOCK)
        relative.write(self.pending[depth], hidden_states)

    def position_ids(self, block: Block) -> torch.Tensor:
        """Positions of a block's tokens, `(num_rows, width)`."""
        # Cells without a token may lie behind the newest token of all
        self._positions = _reserve_tokens(self._positions, block.end)
        return block.read(self._positions)

    def position_embeddings(
        self, block: Block, rotary_emb: nn.Module, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the angles of a block's tokens, each `(num_rows, width, head_dim)`."""
        if self._angles is None:
            return rotary_emb(hidden_states, position_ids=self.position_ids(block))
        self._angles = reserve(self._angles, self._angles, len(self.lengths), block.end, STORAGE_BLOCK)
        cos, sin = block.read(self._angles).to(hidden_states.device).chunk(2, dim=-1)
        return cos, sin

    def attention_mask(self, block: Block, config: PreTrainedConfig, hidden_states: torch.Tensor):
        """
        The mask of a block against all cached tokens, for the attention implementation of `config`.

        Raises:
            ValueError: If the implementation cannot attend to rows of different lengths.
        """
        implementation = config._attn_implementation
        make_mask = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)  # a user's own may share sdpa's
        mask = None
        if self._mask is not None:
            self._mask = _reserve_tokens(self._mask, block.end)
            mask = block.select(self._mask[:, : block.end]).to(hidden_states.device)
        if make_mask not in (sdpa_mask, eager_mask):
            if not block.even:
                raise ValueError(
                    f"`attn_implementation={implementation!r}` cannot attend to rows of different lengths: load the "
                    "model with `attn_implementation='sdpa'`, or generate one row at a time."
                )
            if make_mask is None and 1 < block.width < block.end:
                raise ValueError(
                    f"`attn_implementation={implementation!r}` has no mask for several tokens behind others: register "
                    "one under its name with transformers' `AttentionMaskInterface`, `sdpa_mask` for example."
                )
            return create_causal_mask(config, hidden_states, mask, **{CACHE_NAME: _SizesOfBlock(block)})
        if mask is None and block.even and (block.width == 1 or (block.starts[0] == 0 and make_mask is sdpa_mask)):
            return None
        device = hidden_states.device
        slots = torch.arange(block.width, device=device)
        slots = (slots + block.starts[0])[None] if len(set(block.starts)) == 1 else block.index(device)[1]
        keys = torch.arange(block.end, device=device)
        attended = keys <= slots[..., None]
        if mask is not None:
            attended = attended & mask[:, None]
            # A token with nothing to attend to attends to itself: no NaN
            attended = attended | ~attended.any(-1, keepdim=True) & (keys == slots[..., None])
        attended = attended[:, None]
        if make_mask is sdpa_mask:
            return attended
        zero = torch.zeros((), dtype=hidden_states.dtype, device=device)
        return torch.where(attended, zero, torch.finfo(hidden_states.dtype).min)

    def _add_layers(self, number: int) -> None:
        while len(self.layers) < number:
            self.layers.append(self.layer_class_to_replicate())  # type: ignore[misc]

    def _free_pending(self) -> None:
        for depth in list(self.pending):
            below = self.lengths if depth == 0 else self.lengths_in(depth - 1)
            if below == self.lengths_in(depth):
                del self.pending[depth]


def is_sorted_cache(cache: Any) -> bool:
    # By name: remote code and an installed package have a class each
    return type(cache).__name__ == "SortedCache"


def _block_of_all_rows(lengths: tuple[int, ...], states: torch.Tensor) -> Block:
    batch_size, num_tokens = states.shape[0], states.shape[-2]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"The rows of this cache hold different numbers of tokens, {list(lengths)}: only a sorted model can go on."
        )
    return Block(None, lengths or (0,) * batch_size, (num_tokens,) * batch_size)


def _reserve_tokens(storage: Any, slots: int) -> torch.Tensor:
    """`storage`, `(batch_size, slots)`, with room for `slots`."""
    storage = storage.unsqueeze(-1)
    return reserve(storage, storage, storage.shape[0], slots, STORAGE_BLOCK).squeeze(-1)


def as_sorted_cache(cache: Any) -> Any:
    """`cache`, if it is a [`SortedCache`]; an error that says how to get one otherwise."""
    if not is_sorted_cache(cache):
        kind = "an empty DynamicCache" if isinstance(cache, DynamicCache) and not len(cache) else type(cache).__name__
        raise ValueError(
            f"Decoding at moving depth continues from a `SortedCache`, got {kind}: pass `SortedCache()` (it works "
            "with every mode of `generate`), or the cache that a call with `return_dict_in_generate=True` returned."
        )
    return cache


def check_cache_depth(cache: Cache, depth: int, synchronize: bool = False) -> None:
    """
    Refuse a cache whose upper layers have seen fewer tokens than its first: their keys and values are missing.

    Args:
        cache ([`~transformers.Cache`]):
            The cache to continue from.
        depth (`int`):
            Number of layers about to run.
        synchronize (`bool`, *optional*, defaults to `False`):
            Whether to read lengths that live on a device (static caches), which waits for it. Without it only layers
            that were never run are found there.

    Raises:
        ValueError: If the cache is shallower than `depth`.
    """
    if is_sorted_cache(cache):
        cache.segments(depth)
        return
    first, last = cache.get_seq_length(0), cache.get_seq_length(depth - 1)
    if isinstance(first, torch.Tensor) or isinstance(last, torch.Tensor):
        if not synchronize and isinstance(last, torch.Tensor):
            return
        first, last = int(first), int(last)
    if last < first:
        raise ValueError(
            f"The cache holds {first} tokens in its first layer but {last} in layer {depth}: it was filled at a "
            f"smaller `exit_layer` and cannot be continued at `exit_layer={depth}`. Go on at the exit that filled it, "
            "or start from an empty cache."
        )
