"""SortedCache: a key-value cache that knows how deep each token has been run."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from .block_sorted_llama import Block, index_tensor, is_left_from_inference
from .configuration_sorted_llama import as_int, check_int


STORAGE_STEP = 256  # tokens by which the keys and values of a layer grow: no copy per token, little unused memory
PENDING_STEP = 32


def _in_use(name: str) -> Any:
    """The part of a layer's storage that holds tokens, read and set under a public name."""

    def get(layer: Any) -> torch.Tensor | None:
        storage = getattr(layer, name)
        return None if storage is None else storage[..., : layer.get_seq_length(), :]

    return property(get, lambda layer, storage: setattr(layer, name, storage))


class SortedCacheLayer(DynamicLayer):
    """
    Keys and values of one decoder layer, `(batch_size, num_heads, max(lengths), head_dim)`, in growing storage, and
    the states of tokens that wait for it, *pending*, behind those that passed it.
    """

    _keys: torch.Tensor | None
    _values: torch.Tensor | None
    keys, values = _in_use("_keys"), _in_use("_values")

    def __init__(self, number: int, batch_size: int, max_cache_len: int = 0):
        super().__init__()
        self.number = number  # of the decoder layers before it
        self.max_cache_len = max_cache_len
        self.lengths = self._arrived = (0,) * batch_size
        self.pending: Any = None  # `None`, or states of shape (batch_size, slots, hidden_size)

    @property
    def arrived(self) -> tuple[int, ...]:
        """Number of tokens of each row that passed this layer or are pending before it."""
        return self.lengths if self.pending is None else self._arrived

    def write(self, block: Block, key_states: torch.Tensor, value_states: torch.Tensor):
        """Store the keys and values of a block, and return those that its rows attend to."""
        self.is_initialized = True
        sizes = len(self.lengths), STORAGE_STEP, self.max_cache_len
        before = self._keys
        self._keys = block.store(self._keys, key_states, *sizes)
        self._values = block.store(self._values, value_states, *sizes)
        if self.max_cache_len and self._keys is not before:  # without it, a graph that writes them is none of CUDA
            torch._dynamo.mark_static_address(self._keys, guard=False)
            torch._dynamo.mark_static_address(self._values, guard=False)
        return block.select(self._keys[..., : block.end, :]), block.select(self._values[..., : block.end, :])

    @property
    def storage(self) -> tuple[Any, Any]:
        """All slots of keys and values, in use or not."""
        return self._keys, self._values

    def has_room(self, num_slots: int) -> bool:
        """Whether `num_slots` tokens a row can be written without any storage made anew."""
        keys = self._keys
        return keys is not None and not is_left_from_inference(keys) and keys.shape[-2] >= num_slots

    def get_seq_length(self) -> int:
        return max(self.lengths, default=0)

    def suspend(self, hidden_states: torch.Tensor, block: Block) -> None:
        """Keep states that this layer has not run: pending, until a pass runs it."""
        arrived = self.arrived
        if block.width == 0 or any(arrived[row] < n for row, n in zip(block.row_numbers, block.starts, strict=True)):
            return  # without those before them they are of no use: a hole, which a pass that needs them tells of
        offsets = [start - self.lengths[row] for start, row in zip(block.starts, block.row_numbers, strict=True)]
        cells = Block(block.rows, offsets, block.counts)
        self.pending = cells.store(self.pending, hidden_states, len(arrived), PENDING_STEP)
        self._arrived = block.count_in(arrived)

    def take_along(self, hidden_states: torch.Tensor, block: Block) -> tuple[torch.Tensor, Block]:
        """What is pending, and the states that arrive behind it."""
        starts = [self.lengths[row] for row in block.row_numbers]
        if starts == block.starts:
            return hidden_states, block
        self.suspend(hidden_states, block)
        counts = [start + count - new for start, count, new in zip(block.starts, block.counts, starts, strict=True)]
        return Block(block.rows, [0] * len(starts), counts).read(self.pending), Block(block.rows, starts, counts)

    def count(self, block: Block) -> None:
        """Note that the tokens of a block have passed."""
        self._arrived, self.lengths = block.count_in(self.arrived), block.count_in(self.lengths)
        self._free_pending()

    def rollback(self, lengths: Sequence[int]) -> None:
        """Keep the first `lengths[r]` tokens of row `r`, if it holds more."""
        if self.pending is not None:
            self._arrived = tuple(map(min, self._arrived, lengths))
        self.lengths = tuple(map(min, self.lengths, lengths))
        self._free_pending()

    def select_rows(self, rows: list[int]) -> None:
        """Keep these rows, in their order."""
        self.keys, self.values, self.pending = (_select(of, rows) for of in (self.keys, self.values, self.pending))
        self._arrived, self.lengths = (tuple(n[row] for row in rows) for n in (self._arrived, self.lengths))
        self._free_pending()

    def _free_pending(self) -> None:
        if self._arrived == self.lengths:
            self.pending = None


def _select(tensor: torch.Tensor | None, rows: list[int]) -> Any:
    return None if tensor is None else tensor.index_select(0, index_tensor(rows, tensor.device))


class SortedCache(Cache):
    """
    A key-value cache in which every token may have been run to its own depth. `generate` makes one wherever depth
    moves; passed back in, it continues in any mode. Only sorted models can fill it.

    Exits cut the decoder into segments. Each layer knows how many tokens passed it, and the hidden states of tokens
    that stopped at an exit are kept there, *pending*: the next forward pass that goes deeper takes them along, as one
    block with their own positions. So keys and values are exact in every layer, and no layer runs a token twice.
    Rows of the batch may hold different numbers of tokens.

    Pending states are freed when they are taken along. Storage grows by blocks of 256 tokens, or is allocated at once
    with `max_cache_len`. It is for inference: storage is written in place.

    Args:
        max_cache_len (`int`, *optional*, defaults to 0):
            Number of tokens to allocate at once; more still fit.

    Attributes:
        lengths (`tuple[int, ...]`): Number of tokens of each row.
        pending (`dict[int, torch.Tensor]`): By exit layer, states of shape `(batch_size, slots, hidden_size)`; row
            `r`'s tokens from the first that the model's next layer has not seen.
        exit_layers (`dict[int, SortedCacheLayer]`): By exit, keys and values of the decoder layer that it owns
            (`exit_heads="layer"`), and `pending` states of the tokens that went by.
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

    layers: list[Any]
    max_cache_len = 0  # in place of a property of transformers before 5.24, which fails where there are no layers

    def __init__(self, max_cache_len: int = 0):
        super().__init__(layers=[])
        self.max_cache_len = check_int(max_cache_len, "max_cache_len", least=0)
        self.lengths: tuple[int, ...] = ()
        self.exit_layers: dict[int, SortedCacheLayer] = {}
        self.layer_token_passes = 0
        self._positions: Any = None  # (batch_size, slots, 1)
        self._mask: torch.Tensor | None = None  # (batch_size, slots, 1); `None` where every token is attended to
        self._angles: torch.Tensor | None = None  # (batch_size, slots, 2 * head_dim); see `_write_angles`
        self._positions_ahead = 0  # of the slots, in the row where they are most; padding makes it negative

    # What transformers asks of a cache

    def update(self, *args: Any, **kwargs: Any):
        raise ValueError(
            "Only a sorted model can go on with a `SortedCache`, which has to know how deep each token has been run: "
            "load the checkpoint as a `SortedLlamaForCausalLM`, or start this model from an empty `DynamicCache()`."
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens of the longest row; of layer `layer_idx`, those that passed it."""
        return max(self.lengths if layer_idx == 0 else self.lengths_in(layer_idx), default=0)

    @property
    def batch_size(self) -> int:
        return len(self.lengths) or -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens of every row (transformers counts them negative)."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"`tokens_to_remove` must be 0 or negative, got {tokens_to_remove}: `rollback(lengths)` keeps a "
                "number of tokens of each row."
            )
        self.rollback([max(length + tokens_to_remove, 0) for length in self.lengths])

    def reset(self) -> None:
        self.layers, self.lengths, self.exit_layers = [], (), {}
        self._positions = self._mask = self._angles = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `r` becomes a copy of row `beam_idx[r]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order. A cache without tokens has no rows yet, and stays as it is."""
        if self.lengths:
            rows = torch.arange(len(self.lengths), device="cpu")
            self._select_rows(rows[torch.as_tensor(indices).cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._select_rows([row for row in range(len(self.lengths)) for _ in range(repeats)])

    def _select_rows(self, rows: list[int]) -> None:
        for layer in self._all_layers():
            layer.select_rows(rows)
        self.lengths = tuple(self.lengths[row] for row in rows)
        self._positions, self._mask, self._angles = (
            _select(storage, rows) for storage in (self._positions, self._mask, self._angles)
        )

    # What the sorted model asks of it

    @property
    def pending(self) -> dict[int, torch.Tensor]:
        return {layer.number: layer.pending for layer in self.layers if layer.pending is not None}

    def is_pending(self, depth: int) -> bool:
        """Whether tokens are pending before a layer that a pass to `depth` runs, the exit's own among them."""
        layers = [*self.layers[:depth], *(layer for k, layer in self.exit_layers.items() if k == depth)]
        return any(layer.pending is not None for layer in layers)

    def _all_layers(self) -> list[SortedCacheLayer]:
        return [*self.layers, *self.exit_layers.values()]

    def trunk(self, first: int, last: int) -> list[SortedCacheLayer]:
        """The model's layers from `first` to `last`, made where no token has come to them yet."""
        while len(self.layers) < last:
            self.layers.append(SortedCacheLayer(len(self.layers), len(self.lengths), self.max_cache_len))
        return self.layers[first:last]

    def of_exit(self, exit_layer: int) -> SortedCacheLayer:
        """The layer that an exit owns, made where no token has come to it yet."""
        if exit_layer not in self.exit_layers:
            self.exit_layers[exit_layer] = SortedCacheLayer(exit_layer, len(self.lengths), self.max_cache_len)
        return self.exit_layers[exit_layer]

    def lengths_in(self, layer_idx: int) -> tuple[int, ...]:
        """Number of tokens of each row that passed layer `layer_idx` (from 0)."""
        return self.layers[layer_idx].lengths if layer_idx < len(self.layers) else (0,) * len(self.lengths)

    def rollback(self, lengths: Sequence[int]) -> None:
        """
        Keep the first `lengths[r]` tokens of row `r`, if it holds more, in every layer and among the pending states;
        a `ValueError` if there is not an integer of at least 0 for each row.
        """
        lengths = [as_int(length) for length in lengths]  # type: ignore[misc]
        if len(lengths) != len(self.lengths) or any(length is None or length < 0 for length in lengths):
            raise ValueError(
                f"`lengths` must hold {len(self.lengths)} integers of at least 0, one a row, got {list(lengths)}."
            )
        self.lengths = tuple(map(min, self.lengths, lengths))
        for layer in self._all_layers():
            layer.rollback(lengths)

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
        Give new tokens their cells, positions and mask, before any layer runs.

        `inputs_embeds`, `(num_rows, num_tokens, hidden_size)`, are tokens of `rows`, of which `counts` are real, the
        first ones. A mask may begin with the cached tokens. `one_by_one` and `rotary_emb`: see `_write_angles`.
        """
        num_rows, num_tokens = inputs_embeds.shape[:2]
        known = self.lengths or (0,) * num_rows
        starts = known if rows is None else [known[row] for row in rows]
        if num_rows != len(starts):
            raise ValueError(f"The cache holds {len(starts)} rows, but the input has {num_rows}.")
        block = Block(rows, starts, [num_tokens] * num_rows if counts is None else counts)
        shapes = [(num_rows, block.width), (num_rows, block.end if block.even else block.width)]
        if attention_mask is not None and tuple(attention_mask.shape) not in shapes:
            raise ValueError(
                f"`attention_mask` must be of shape ({num_rows}, {block.end}), the cached tokens and the new ones "
                f"where rows are of one length, or ({num_rows}, {block.width}), got {tuple(attention_mask.shape)}."
            )
        self.lengths = known
        if num_tokens == 0:
            return block

        device = inputs_embeds.device
        if position_ids is None:
            position_ids = self._next_positions(block, device)
        position_ids = position_ids.expand(num_rows, num_tokens)
        self._positions = block.store(self._positions, position_ids.unsqueeze(-1), *self._sizes)
        self._append_to_mask(attention_mask, block, device)
        if rotary_emb is not None and (rotary_emb.rope_type == "longrope" or "dynamic" in rotary_emb.rope_type):
            self._write_angles(rotary_emb, position_ids, block, inputs_embeds, one_by_one)
        self.lengths = block.count_in(known)
        return block

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return len(self.lengths), STORAGE_STEP, self.max_cache_len

    def _next_positions(self, block: Block, device: torch.device) -> torch.Tensor:
        """Positions of a block's tokens, each behind the one before it in its row."""
        new = torch.arange(block.width, device=device)
        if self._positions is None or max(block.starts) == 0:
            return new
        if block.even and block.rows is None:
            return new + self._positions[:, block.starts[0] - 1] + 1
        rows, slots = block.index(device)
        newest = self._positions[rows, (slots[:, :1] - 1).clamp(min=0)].squeeze(-1)
        return new + torch.where(slots[:, :1] > 0, newest + 1, 0)

    def _append_to_mask(self, attention_mask: torch.Tensor | None, block: Block, device: torch.device) -> None:
        if attention_mask is None and self._mask is None:
            return
        if self._mask is None:
            self._mask = torch.ones(len(self.lengths), max(self.lengths), 1, dtype=torch.bool, device=device)
        if attention_mask is None:
            attention_mask = torch.ones(len(block.starts), block.width, dtype=torch.bool, device=device)
        attended = attention_mask.to(device, torch.bool).unsqueeze(-1)
        self._mask = block.store(self._mask, attended[:, -block.width :], *self._sizes)
        if attended.shape[1] > block.width and block.rows is None:
            self._mask[:, : block.starts[0]] = attended[:, : -block.width]

    def _write_angles(
        self, rotary_emb: Any, position_ids: torch.Tensor, block: Block, states: torch.Tensor, one_by_one: bool
    ) -> None:
        """
        RoPE of kind `dynamic` and `longrope` turns all tokens of a call by angles that depend on the greatest position
        in it, and remembers the greatest of all. A block of drafts, or of tokens that were pending, is no call of
        plain decoding: each of its tokens gets, once, the angles that it has there.
        """
        if block.rows is None and block.even:
            self._positions_ahead = int(position_ids.max()) - (block.end - 1)
        angles = torch.cat(rotary_emb(states, position_ids=position_ids), dim=-1)
        calls = [slice(i, i + 1) for i in range(block.width)] if one_by_one else [slice(0, block.width)]
        for start in set(block.starts):
            rows = index_tensor([i for i, s in enumerate(block.starts) if s == start], states.device)
            for call in calls:
                newest = position_ids.new_full((len(rows), 1), start + call.stop - 1 + self._positions_ahead)
                rotary_emb(states, position_ids=torch.zeros_like(newest))  # forgets the greatest
                positions = torch.cat([position_ids[rows, call], newest], dim=1)
                angles[rows, call] = torch.cat(rotary_emb(states, position_ids=positions), dim=-1)[:, :-1]
        self._angles = block.store(self._angles, angles, *self._sizes)

    def read(self, block: Block) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Of a block, the positions, `(num_rows, width)`, the angles where they are stored, and which tokens up to its
        end are no padding, `(num_rows, block.end)`, where some are.
        """
        positions = block.read(self._positions).squeeze(-1)
        angles = None if self._angles is None else block.read(self._angles)
        return positions, angles, None if self._mask is None else block.select(self._mask[:, : block.end, 0])

    def read_all(self, num_slots: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """As [`read`], of all slots, in use or not; the mask, `(batch_size, num_slots)`, also of no padding."""
        if self._mask is None:
            attended = self._positions.new_ones(len(self.lengths), num_slots, dtype=torch.bool)
        else:
            attended = torch.nn.functional.pad(self._mask[..., 0], (0, num_slots - self._mask.shape[1]))
        return self._positions, self._angles, attended

    def segments(
        self, depth: int, rows: list[int] | None = None, exits: Collection[int] = ()
    ) -> list[tuple[int, int]]:
        """Stretches of layers, `(first, last)`, that a pass to `depth` runs: cut at `exits`, and where states wait."""
        cuts = [0]
        for cut in range(1, depth):
            if self.lengths_in(cut - 1) != self.lengths_in(cut):
                layer = self.layers[cut] if cut < len(self.layers) else None
                filled = f"layer {cut + 1}: it was filled by a model of {cut} layers"
                self._check_arrived(layer, cut, rows, depth, filled)
            elif cut not in exits:
                continue
            cuts.append(cut)  # also where only other rows differ: the layers of a segment hold the same tokens
        return list(zip(cuts, [*cuts[1:], depth], strict=True))

    def from_pending(self, segments: list[tuple[int, int]], exits: list[int]) -> list[tuple[int, int]]:
        """Of `segments`, those that a pass without new tokens runs to read `exits`: none below what is pending."""
        lowest = min([*self.pending, *(k - 1 for k in exits)])
        return [(first, last) for first, last in segments if last > lowest]

    def check_exit(self, exit_layer: int, rows: list[int] | None = None) -> None:
        """Refuse to read an exit that owns a layer which tokens have gone by."""
        own = f"the one that exit {exit_layer} owns: it was filled by a model that has none there"
        self._check_arrived(self.exit_layers.get(exit_layer), exit_layer, rows, exit_layer, own)

    def _check_arrived(
        self, layer: SortedCacheLayer | None, number: int, rows: list[int] | None, depth: int, filled: str
    ) -> None:
        """Refuse a cache where tokens of `rows` passed layer `number`, and have not come to `layer`, the next."""
        below = self.lengths_in(number - 1)
        arrived, lengths = (layer.arrived, layer.lengths) if layer is not None else ((0,) * len(below),) * 2
        for row in range(len(below)) if rows is None else rows:
            if arrived[row] < below[row]:
                raise ValueError(
                    f"The cache holds {below[row]} tokens in layer {number} but {lengths[row]} in {filled} and cannot "
                    f"be continued at `exit_layer={depth}`. Go on where it was filled, or start from an empty cache."
                )

    @contextmanager
    def segment(
        self, layers: list[SortedCacheLayer], hidden_states: torch.Tensor, block: Block
    ) -> Iterator[tuple[torch.Tensor, Block]]:
        """
        The states and the block to run through `layers`, with what is pending before them. At the end of the `with`
        statement these layers hold their tokens; where it raises, the cache forgets them.
        """
        first, *others = layers
        try:
            hidden_states, block = first.take_along(hidden_states, block)
            yield hidden_states, block
        except BaseException:
            self.rollback([min(block.starts)] * len(self.lengths))
            raise
        first.count(block)
        for layer in others:
            layer.lengths = first.lengths
        self.layer_token_passes += sum(block.counts) * len(layers)


def is_sorted_cache(cache: Any) -> bool:
    # By name: remote code and an installed package have a class each
    return type(cache).__name__ == "SortedCache"


def as_sorted_cache(cache: Any) -> Any:
    """`cache`, if it is a [`SortedCache`]; an error that says how to get one otherwise."""
    if not is_sorted_cache(cache):
        raise ValueError(
            f"Decoding at moving depth continues from a `SortedCache`, got {type(cache).__name__}: pass "
            "`SortedCache()` or the cache that a call with `return_dict_in_generate=True` returned."
        )
    return cache


def check_cache_depth(cache: Any, depth: int, num_layers: int, synchronize: bool = False) -> None:
    """
    Refuse a cache whose upper layers have seen fewer tokens than its first, or were filled by other ones: an exit of
    `depth` layers with `num_layers`, its own among them, notes so on the cache that it begins. Lengths that live on a
    device (static caches) are read, which waits for it, only with `synchronize`.
    """
    if is_sorted_cache(cache):
        cache.segments(depth)
        if num_layers > depth:
            cache.check_exit(depth)
        return
    first, last = cache.get_seq_length(0), cache.get_seq_length(num_layers - 1)
    if isinstance(last, torch.Tensor) and not synchronize:
        return
    first, last, owner = int(first), int(last), depth if num_layers > depth else None
    if first == 0:
        cache.last_layer_of = owner
    elif getattr(cache, "last_layer_of", None) != owner:
        last = 0
    if last < first:
        raise ValueError(
            f"The cache holds {first} tokens in its first layer but {last} in layer {num_layers}: it was filled at "
            f"another `exit_layer`, and `exit_layer={depth}` cannot go on with it: go on at that one, or start anew."
        )
