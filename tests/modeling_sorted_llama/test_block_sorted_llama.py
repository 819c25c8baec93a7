"""`Block`: which cells of a cache the tokens of a pass are in."""

import pytest
import torch

from sorted_llama.modeling_sorted_llama.block_sorted_llama import Block, index_tensor


SLOTS = 6
BLOCKS = {
    "all rows": Block(None, [2, 2, 2], [3, 3, 3]),
    "all rows from different slots": Block(None, [0, 3, 1], [3, 3, 3]),
    "rows of different numbers": Block(None, [0, 0, 0], [3, 1, 2]),
    "some rows": Block([0, 2], [2, 2], [3, 3]),
    "a row": Block([1], [3], [2]),
}


def cells_of(block):
    """Row and slot of every cell, one row of the block after another."""
    return [[(row, start + i) for i in range(block.width)] for row, start in zip(block.row_numbers, block.starts)]


@pytest.mark.parametrize("heads", [(), (2,)], ids=["states", "keys"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_written_to_its_cells_and_nowhere_else(name, heads):
    block, storage = BLOCKS[name], torch.zeros(3, *heads, SLOTS, 4)
    values = torch.randn(len(block.starts), *heads, block.width, 4)
    block.write(storage, values)
    written = torch.zeros(3, SLOTS, dtype=torch.bool)
    for cells, row_values in zip(cells_of(block), values, strict=True):
        for i, (row, slot) in enumerate(cells):
            written[row, slot] = True
            assert torch.equal(storage[row, ..., slot, :], row_values[..., i, :])
    assert torch.equal(storage.flatten(2).abs().sum(-1) > 0 if not heads else storage.abs().sum((1, 3)) > 0, written)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_reads_its_cells(name):
    block, storage = BLOCKS[name], torch.randn(3, SLOTS, 4)
    expected = torch.stack([torch.stack([storage[cell] for cell in cells]) for cells in cells_of(block)])
    assert torch.equal(block.read(storage), expected)


def test_cells_of_no_token_may_lie_behind_the_end_of_the_storage():
    storage = torch.randn(2, 4, 3)
    found = Block(None, [0, 3], [3, 1]).read(storage)
    assert torch.equal(found[0], storage[0, :3]) and torch.equal(found[1, 0], storage[1, 3])


def test_storage_grows_by_steps_of_zeros_and_keeps_its_tokens():
    values = torch.ones(2, 3, 4)
    first = Block(None, [0, 0], [3, 3]).store(None, values, 2, step=4)
    assert first.shape == (2, 4, 4) and torch.equal(first[:, 3:], torch.zeros(2, 1, 4))
    second = Block(None, [3, 3], [3, 3]).store(first, 2 * values, 2, step=4)
    assert second.shape == (2, 8, 4) and torch.equal(second[:, :6], torch.cat([values, 2 * values], dim=1))
    assert Block(None, [6, 6], [2, 2]).store(second, values[:, :2], 2, step=4) is second
    assert Block([1], [0], [3]).store(None, values[:1], 2, step=4, at_least=10).shape == (2, 10, 4)


def test_storage_made_under_inference_mode_is_copied_outside_of_it():
    block, values = Block(None, [0], [2]), torch.ones(1, 2, 3)
    with torch.inference_mode():
        storage = block.store(None, values, 1, step=4)
        assert block.store(storage, values, 1, step=4) is storage
    assert storage.is_inference() and not block.read(storage).is_inference()
    assert not block.store(storage, values, 1, step=4).is_inference()


def test_the_newest_tokens_are_aligned_right():
    states = torch.arange(6.0).view(2, 3, 1)
    assert Block(None, [0, 0], [3, 3]).align_right(states) is states
    assert Block(None, [0, 0], [3, 1]).align_right(states).squeeze(-1).tolist() == [[0, 1, 2], [3, 3, 3]]


def test_a_block_counts_its_tokens_in_the_lengths_of_all_rows():
    assert Block([0, 2], [5, 1], [2, 3]).count_in((5, 9, 1)) == (7, 9, 4)
    assert Block(None, [5, 1], [2, 0]).count_in((5, 1)) == (7, 1)


def test_rows_are_selected_and_all_of_them_are_a_view():
    storage = torch.randn(3, 2, 4, 5)
    assert BLOCKS["all rows"].select(storage) is storage
    assert torch.equal(BLOCKS["some rows"].select(storage), storage[[0, 2]])


def test_an_index_is_made_on_its_device_whatever_the_default_is():
    index = index_tensor(range(3), torch.device("cpu"))
    assert index.dtype == torch.long and index.tolist() == [0, 1, 2]
    assert index_tensor([], torch.device("cpu")).dtype == torch.long
    with torch.device("meta"):
        assert index_tensor([7], torch.device("cpu")).tolist() == [7]
