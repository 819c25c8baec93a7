"""Storage of `SortedCache`: memory, copies, and layers that are compiled."""

import copy
import io
import pickle

import pytest
import torch

from sorted_llama import SortedCache
from sorted_llama.modeling_sorted_llama.cache_sorted_llama import PENDING_STEP, STORAGE_STEP
from sorted_llama.modeling_sorted_llama.compat_sorted_llama import CACHE_NAME
from tests.modeling_sorted_llama.caches import (
    CLOSE,
    LAYERS,
    assert_equals_straight_pass,
    catch_up,
    random_tokens,
    run,
    run_plain,
    sorted_model,
    storages,
)
from tests.tiny import reference_llama, tiny_sorted


def tensors_in(thing, seen=None):
    """The tensors that an object holds, at any depth."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, dict):
        members = list(thing.values())
    else:
        members = list(thing) if isinstance(thing, (list, tuple)) else list(getattr(thing, "__dict__", {}).values())
    return [tensor for member in members for tensor in tensors_in(member, seen)]


def test_storage_stays_where_it_is_within_a_block():
    tokens, cache = random_tokens(2, STORAGE_STEP + 2), SortedCache()
    run(cache, tokens[:, :200])
    before = [storage.data_ptr() for storage in storages(cache)]
    for number, depth in zip(range(200, STORAGE_STEP), [4, 1, 2, 3] * 14, strict=True):
        run(cache, tokens[:, number : number + 1], depth)
    catch_up(cache)
    cache.crop(-3)
    run(cache, tokens[:, STORAGE_STEP - 3 : STORAGE_STEP])
    assert [storage.data_ptr() for storage in storages(cache)] == before
    assert {storage.nbytes() for storage in storages(cache)} == {2 * 2 * STORAGE_STEP * 8 * 4}
    run(cache, tokens[:, STORAGE_STEP:])
    assert {storage.nbytes() for storage in storages(cache)} == {2 * 2 * 2 * STORAGE_STEP * 8 * 4}
    assert cache.layers[0].keys.shape == (2, 2, STORAGE_STEP + 2, 8)
    assert_equals_straight_pass(cache, tokens)


def test_max_cache_len_allocates_once():
    tokens, cache = random_tokens(1, 700), SortedCache(max_cache_len=600)
    run(cache, tokens[:, :3])
    before = [storage.data_ptr() for storage in storages(cache)]
    assert {storage.nbytes() for storage in storages(cache)} == {2 * 600 * 8 * 4}
    run(cache, tokens[:, 3:400])
    run(cache, tokens[:, 400:599], depth=2)
    run(cache, tokens[:, 599:600])
    assert [storage.data_ptr() for storage in storages(cache)] == before
    assert_equals_straight_pass(cache, tokens[:, :600])
    run(cache, tokens[:, 600:])  # more still fit
    assert_equals_straight_pass(cache, tokens)


@pytest.mark.parametrize("wrong", [-5, 2.5, True, "x", None])
def test_a_wrong_number_of_tokens_to_allocate_is_refused(wrong):
    with pytest.raises(ValueError, match="`max_cache_len` must be an integer of at least 0, got"):
        SortedCache(max_cache_len=wrong)


def test_generate_with_a_static_cache_allocates_once():
    model, tokens = sorted_model(), random_tokens(2, 5)
    output = model.generate(
        tokens,
        exit_threshold=0.5,
        max_new_tokens=8,
        cache_implementation="static",
        return_dict_in_generate=True,
    )
    cache = output[CACHE_NAME]
    assert isinstance(cache, SortedCache)
    assert all(storage.nbytes() == 2 * 2 * STORAGE_STEP * 8 * 4 for storage in storages(cache)[:2])
    assert cache.layers[0].max_cache_len == 256


def test_it_holds_keys_values_pending_states_and_two_numbers_a_token():
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    tokens, cache = random_tokens(2, 40), SortedCache()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ordinary = LAYERS * 2 * (2 * 2 * STORAGE_STEP * 8 * 4) + 2 * STORAGE_STEP * (8 + 1)

    def held():
        assert not any(tensor.requires_grad for tensor in tensors_in(cache))
        unique = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(cache)}
        return sum(unique.values())

    run(cache, tokens[:, :3], attention_mask=mask, position_ids=positions)
    assert held() == ordinary
    for number in range(3, 10):
        run(cache, tokens[:, number : number + 1], depth=2)
    assert held() == ordinary + 2 * PENDING_STEP * 32 * 4
    run(cache, tokens[:, 10:11], depth=3)  # what was pending at 2 is pending at 3 now
    assert set(cache.pending) == {3}
    assert held() == ordinary + 2 * PENDING_STEP * 32 * 4
    run(cache, tokens[:, 11:12])
    assert cache.pending == {} and held() == ordinary


def test_pending_states_are_freed_with_their_tokens():
    tokens, cache = random_tokens(2, 6), SortedCache()
    run(cache, tokens[:, :3])
    run(cache, tokens[:, 3:5], depth=1)
    run(cache, tokens[:1, 5:], depth=1, cache_rows=[0])
    cache.rollback([3, 4])
    assert set(cache.pending) == {1}
    cache.rollback([3, 3])
    assert cache.pending == {}


def ragged_cache():
    """Rows of different lengths, pending states, padding; and the tokens that would make the rows equal."""
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    tokens, cache = random_tokens(2, 8), SortedCache()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    run(cache, tokens[:, :4], attention_mask=mask, position_ids=positions)
    run(cache, tokens[:, 4:7], depth=2)
    cache.rollback([5, 7])
    return cache, torch.stack([tokens[0, 5:6], tokens[1, 7:8]])


def saved_and_loaded(cache):
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_go_on_on_their_own(kind):
    cache, new = ragged_cache()
    copied = COPIES[kind](cache)
    expected = run(cache, new)
    found = run(copied, new)
    assert torch.equal(found, expected)
    assert copied.lengths == cache.lengths
    run(copied, new, depth=1)
    copied.rollback([0, 0])
    run(copied, new + 1)
    assert cache.lengths == (6, 8)
    again, _ = ragged_cache()
    run(again, new)
    for layer, same in zip(cache.layers, again.layers, strict=True):
        assert torch.equal(layer.keys[0, :, :6], same.keys[0, :, :6])
        assert torch.equal(layer.values[1, :, 2:], same.values[1, :, 2:])


def test_an_empty_cache_can_be_copied():
    tokens, cache = random_tokens(2, 5), copy.deepcopy(SortedCache(max_cache_len=300))
    run(cache, tokens)
    assert storages(cache)[0].nbytes() == 2 * 2 * 300 * 8 * 4


def test_a_reset_cache_is_empty():
    cache, _ = ragged_cache()
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.lengths == () and cache.pending == {}
    tokens = random_tokens(3, 5, seed=1)  # another number of rows, and no padding
    run(cache, tokens[:, :4], depth=1)
    states = run(cache, tokens[:, 4:])
    torch.testing.assert_close(states, run_plain(tokens)[0], **CLOSE)
    assert_equals_straight_pass(cache, tokens)


def test_compiled_layers_attend_to_rows_of_different_lengths():
    model, tokens, cache = tiny_sorted(num_hidden_layers=2, exit_layers=[1, 2]), random_tokens(2, 8), SortedCache()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model.model.layers[1].compile(backend=backend)
    run(cache, tokens[:, :4], 2, model)
    run(cache, tokens[:1, 4:6], 1, model, cache_rows=[0])
    states = run(cache, torch.stack([tokens[0, 6:], tokens[1, 4:6]]), 2, model)
    assert graphs and cache.layer_token_passes == 2 * (8 + 6)
    for row, length in enumerate((8, 6)):
        with torch.no_grad():
            expected = reference_llama(model, 2).model(input_ids=tokens[row : row + 1, :length]).last_hidden_state
        torch.testing.assert_close(states[row, 4 - length :], expected[0, 4:], **CLOSE)


def test_generate_with_compiled_layers_changes_no_token():
    model, inputs = tiny_sorted(num_hidden_layers=2, exit_layers=[1, 2]), random_tokens(1, 4)
    arguments = {"exit_threshold": 0.5, "max_new_tokens": 4}
    expected = model.generate(inputs, **arguments)
    torch._dynamo.reset()
    model.model.layers[1].compile(backend="eager")
    assert torch.equal(model.generate(inputs, **arguments), expected)


def test_an_empty_cache_takes_what_is_done_to_the_rows_of_a_cache():
    """As a `DynamicCache` does: beam search reorders it before the first token."""
    cache = SortedCache()
    cache.reorder_cache(torch.tensor([1, 0, 0]))
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(3)
    cache.crop(-2)
    cache.rollback([])
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.batch_size == -1
    run(cache, random_tokens(2, 5))
    assert cache.lengths == (5, 5)
