"""Cells of a cache: the tokens that pass a stretch of layers together."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch


class Block:
    """
    The tokens that pass a stretch of layers together: token `i` of row `rows[j]` is in slot `starts[j] + i` of the
    cache. Rows may hold different numbers of tokens; the cells behind a shorter row's last one hold no token, and
    what is written there is overwritten before it is ever attended to.
    """

    def __init__(self, rows: list[int] | None, starts: Sequence[int], counts: Sequence[int]):
        self.rows = rows  # `None`: all rows of the cache
        self.row_numbers = range(len(starts)) if rows is None else rows
        self.starts = list(starts)
        self.counts = list(counts)
        self.width = max(self.counts)
        self.end = max(self.starts) + self.width
        self.even = len(set(self.starts)) == 1 and len(set(self.counts)) == 1
        # What layers are given beside the states: made by the first stretch that the block runs
        self.inputs: dict[str, Any] | None = None
        self._index: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def count_in(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """`lengths` of all rows, with the block's tokens."""
        grown = list(lengths)
        for row, start, count in zip(self.row_numbers, self.starts, self.counts, strict=True):
            grown[row] = start + count
        return tuple(grown)

    def of_all_rows(self, lengths: Sequence[int]) -> "Block":
        """A block of all rows of the cache, which hold `lengths` tokens; the cells of the others hold no token."""
        if self.rows is None:
            return self
        starts, counts = list(lengths), [0] * len(lengths)
        for row, start, count in zip(self.rows, self.starts, self.counts, strict=True):
            starts[row], counts[row] = start, count
        return Block(None, starts, counts)

    def index(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows, `(num_rows, 1)`, and slots, `(num_rows, width)`, of the cells."""
        if device not in self._index:
            slots = index_tensor(self.starts, device)[:, None] + torch.arange(self.width, device=device)
            self._index[device] = index_tensor(self.row_numbers, device)[:, None], slots
        return self._index[device]

    def write(self, storage: torch.Tensor, values: torch.Tensor) -> None:
        """Put `values`, `(num_rows, ..., width, dim)`, into `storage`, `(batch_size, ..., slots, dim)`."""
        if self.even and self.rows is None:
            storage[..., self.starts[0] : self.starts[0] + self.width, :] = values
            return
        rows, slots = self.index(storage.device)
        if storage.dim() == 4:
            storage[rows, :, slots] = values.transpose(1, 2)
        else:
            storage[rows, slots] = values

    def store(
        self, storage: torch.Tensor | None, values: torch.Tensor, batch_size: int, step: int, at_least: int = 0
    ) -> torch.Tensor:
        """[`write`] to `storage`, which grows by `step` slots where they end: zeros, as NaN would pass a mask."""
        if storage is not None and storage.shape[-2] >= self.end:
            storage = outside_inference(storage)
        else:
            slots = max(-(-self.end // step) * step, at_least)
            grown = values.new_zeros(batch_size, *values.shape[1:-2], slots, values.shape[-1])
            if storage is not None:
                grown[..., : storage.shape[-2], :] = storage
            storage = grown
        self.write(storage, values)
        return storage

    def read(self, storage: torch.Tensor) -> torch.Tensor:
        """The cells of `storage`, `(batch_size, slots, dim)`: `(num_rows, width, dim)`."""
        if self.even and self.rows is None:
            return outside_inference(storage[:, self.starts[0] : self.starts[0] + self.width])
        rows, slots = self.index(storage.device)
        return storage[rows, slots.clamp(max=storage.shape[1] - 1)]  # cells that hold no token may lie behind its end

    def select(self, storage: torch.Tensor) -> torch.Tensor:
        """The rows of `storage`: a view where they are all of them."""
        if self.rows is None:
            return storage
        return storage.index_select(0, self.index(storage.device)[0].squeeze(1))

    def align_right(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Every row's newest token in the last column, as with left padding; the cells before the first repeat it."""
        if min(self.counts) == self.width:
            return hidden_states
        device = hidden_states.device
        shift = self.width - index_tensor(self.counts, device)
        columns = (torch.arange(self.width, device=device) - shift[:, None]).clamp(min=0)
        return hidden_states.gather(1, columns[..., None].expand_as(hidden_states))


def index_tensor(values: Iterable[int], device: torch.device) -> torch.Tensor:
    """`values` as an int64 tensor on `device`, by way of pinned memory: from pageable memory, the host would wait."""
    index = torch.tensor(list(values), dtype=torch.long, device="cpu")
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)


def is_left_from_inference(tensor: torch.Tensor) -> bool:
    """What `torch.inference_mode()` made can be neither written to nor trained through later."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


def outside_inference(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy where it is left from inference."""
    return tensor.clone() if is_left_from_inference(tensor) else tensor
