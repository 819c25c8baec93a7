"""Masks of `SortedCache`: padding, rows of different lengths, and what attention implementations can do."""

from types import SimpleNamespace

import pytest
import torch

from sorted_llama import SortedCache
from sorted_llama.modeling_sorted_llama.layer_inputs_sorted_llama import attention_mask
from tests.modeling_sorted_llama.caches import CLOSE, count_layer_calls, random_tokens, run, run_plain, sorted_model
from tests.tiny import tiny_sorted


def test_a_first_mask_may_come_where_rows_are_of_different_lengths():
    """A mask that comes late says nothing of the tokens before: they stay attended to."""
    tokens, cache = random_tokens(2, 6), SortedCache()
    run(cache, tokens[:, :5])
    cache.rollback([2, 5])
    mask = torch.tensor([[0, 1], [1, 1]])
    states = run(cache, torch.cat([tokens[:1, :2], tokens[1:, 4:]]), attention_mask=mask)
    expected, _ = run_plain(torch.cat([tokens[1:, :5], tokens[1:, 4:]], dim=1))
    torch.testing.assert_close(states[1, -2:], expected[0, -2:], **CLOSE)


def test_a_first_mask_may_come_for_some_rows():
    tokens, cache = random_tokens(2, 6), SortedCache()
    run(cache, tokens[:, :5])
    cache.rollback([2, 5])
    run(cache, tokens[:1, 2:3], cache_rows=[0], attention_mask=torch.ones(1, 1, dtype=torch.long))
    states = run(cache, tokens[1:, 5:], cache_rows=[1])
    torch.testing.assert_close(states, run_plain(tokens[1:])[0][:, -1:], **CLOSE)


@pytest.mark.parametrize("pass_depth", [1, 2, 3])
def test_attention_implementations_agree(pass_depth):
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
    positions, tokens = (mask.cumsum(-1) - 1).clamp(min=0), random_tokens(3, 12)
    found = {}
    for attention in ("eager", "sdpa"):
        cache, model = SortedCache(), sorted_model(attention)
        run(cache, tokens[:, :4], model=model, attention_mask=mask, position_ids=positions)
        run(cache, tokens[1:, 4:7], pass_depth, model, cache_rows=[1, 2])
        cache.rollback([4, 5, 7])
        found[attention] = run(cache, tokens[:, 7:9], 4, model), run(cache, tokens[:, 9:10], 4, model)
    for eager, sdpa, counts in zip(*found.values(), [(2, 3, 5), (1, 1, 1)], strict=True):
        assert eager.shape == sdpa.shape
        for row, count in enumerate(counts):
            torch.testing.assert_close(eager[row, -count:], sdpa[row, -count:], **CLOSE)


@pytest.mark.parametrize("shape", [(2, 3), (2, 7), (2, 1, 1, 6), (1, 2), (3, 2), (3, 6)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_mask_of_another_shape_is_refused(shape, masked):
    tokens, cache = random_tokens(2, 6), SortedCache()
    run(cache, tokens[:, :4], attention_mask=torch.ones(2, 4) if masked else None)
    with pytest.raises(ValueError, match=r"must be of shape \(2, 6\).*or \(2, 2\), got"):
        run(cache, tokens[:, 4:], attention_mask=torch.zeros(shape))
    torch.testing.assert_close(run(cache, tokens[:, 4:]), run_plain(tokens)[0][:, 4:], **CLOSE)


def mask_of(cache, block, attention, states):
    attended = cache.read(block)[2]
    return attention_mask(attended, block, SimpleNamespace(_attn_implementation=attention), states)


def test_rows_of_different_lengths_need_a_mask_that_flash_attention_has_not():
    tokens, cache = random_tokens(2, 6), SortedCache()
    run(cache, tokens[:, :5])
    states = torch.zeros(2, 1, 32)
    even = cache.append(states)
    for kind in ("flash_attention_2", "kernels-community/flash-attn3"):
        assert mask_of(cache, even, kind, states) is None
    cache.rollback([3, 5])
    uneven = cache.append(states)
    for kind in ("flash_attention_2", "flash_attention_3", "flex_attention"):
        with pytest.raises(ValueError, match=f"{kind}.*cannot attend to rows of different lengths"):
            mask_of(cache, uneven, kind, states)


def test_flash_attention_is_given_the_mask_as_it_is():
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    tokens, cache = random_tokens(2, 4), SortedCache()
    run(cache, tokens[:, :3], attention_mask=mask)
    states = torch.zeros(2, 1, 32)
    found = mask_of(cache, cache.append(states), "flash_attention_2", states)
    assert found.tolist() == [[True, True, True, True], [False, True, True, True]]


def test_a_pass_of_rows_of_different_lengths_is_refused_before_any_layer_runs():
    model, tokens, cache = tiny_sorted(exit_layers=[1, 2, 3, 4]), random_tokens(2, 6), SortedCache()
    run(cache, tokens[:, :5], model=model)
    cache.rollback([3, 5])
    calls = count_layer_calls(model)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="load the model with `attn_implementation='sdpa'`"):
        run(cache, tokens[:, 5:], model=model)
    assert calls == []
    model.config._attn_implementation = "sdpa"
    states = run(cache, tokens[:, 3:], cache_rows=None, model=model)
    torch.testing.assert_close(states[0], run_plain(tokens[:1])[0][0, 3:], **CLOSE)
