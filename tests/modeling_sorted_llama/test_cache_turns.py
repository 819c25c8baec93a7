"""Turns of a chat on one `SortedCache`: in any mode, each goes on as if there were no cache."""

import copy

import pytest
import torch
from transformers import DynamicCache

from sorted_llama import SortedCache
from sorted_llama.modeling_sorted_llama.compat_sorted_llama import CACHE_NAME
from tests.modeling_sorted_llama.caches import LAYERS, count_layer_calls, random_tokens, run, run_plain, sorted_model
from tests.tiny import tiny_sorted


MODES = {
    "plain": {},
    "fixed": {"exit_layer": 2},
    "confidence": {"exit_threshold": [0.3, 0.5, 0.7]},
    "draft": {"assistant_early_exit": 2},
    "drafts of 3": {"assistant_early_exit": 1, "num_assistant_tokens": 3},
    "rows": {"exit_layer": [2, 4, 1]},
}
ENDS = {"eos_token_id": list(range(3, 259, 5)), "pad_token_id": 0, "max_new_tokens": 5}


def turn(mode, inputs, cache=None):
    arguments = {**inputs, **ENDS, **MODES[mode], "return_dict_in_generate": True}
    return sorted_model().generate(**arguments, **({} if cache is None else {"cache": cache}))


def first_prompt():
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    return {"input_ids": random_tokens(3, 6) * mask, "attention_mask": mask}


def next_prompt(inputs, sequences, padding_is_attended, seed):
    """The conversation so far and what the user says next: 3, 3 and 2 tokens, padded on the left."""
    said = sequences[:, inputs["input_ids"].shape[1] :]
    mask = torch.ones_like(said) if padding_is_attended else (said != 0).long()
    new_mask = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 1]])
    new = random_tokens(3, 3, seed=seed) * new_mask
    return {
        "input_ids": torch.cat([sequences, new], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], mask, new_mask], dim=1),
    }


def go_on(mode, inputs, cache):
    """Continue a copy of the cache: the tokens are those of one run on the whole text."""
    output = turn(mode, inputs, copy.deepcopy(cache))
    assert torch.equal(output.sequences, turn(mode, inputs).sequences)
    assert output[CACHE_NAME].get_seq_length() == output.sequences.shape[1] - 1
    return output


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
def test_three_turns_in_any_modes(first, second):
    """Every mode comes before and behind every other, on padding that is attended to and on padding that is not."""
    place = list(MODES).index(first) + list(MODES).index(second)
    third, attended = list(MODES)[place % len(MODES)], place % 2 == 0
    inputs = first_prompt()
    output = turn(first, inputs, SortedCache() if first in ("plain", "fixed") else None)
    lengths = (output.sequences[:, 6:] != 0).sum(1)
    assert len(set(lengths.tolist())) > 1  # some rows end before others
    inputs = next_prompt(inputs, output.sequences, attended, seed=1)
    output = go_on(second, inputs, output[CACHE_NAME])
    inputs = next_prompt(inputs, output.sequences, not attended, seed=2)
    go_on(third, inputs, output[CACHE_NAME])


@pytest.mark.parametrize("last", MODES)
def test_rows_that_stop_below_what_they_have_pending(last):
    """Row 0 waits at 3 and then at 2, while the others pass both."""
    inputs, cache = first_prompt(), SortedCache()
    for seed, depths in enumerate(([3, 4, 4], [2, 4, 4])):
        output = sorted_model().generate(**inputs, **ENDS, exit_layer=depths, cache=cache)
        assert torch.equal(output, sorted_model().generate(**inputs, **ENDS, exit_layer=depths))
        inputs = next_prompt(inputs, output, padding_is_attended=False, seed=seed)
    go_on(last, inputs, cache)


def test_a_first_turn_at_one_depth_goes_deeper_only_with_a_sorted_cache():
    inputs = first_prompt()
    output = turn("fixed", inputs)
    assert type(output[CACHE_NAME]) is DynamicCache
    assert output[CACHE_NAME].get_seq_length() == output.sequences.shape[1] - 1 == 9
    inputs = next_prompt(inputs, output.sequences, padding_is_attended=False, seed=1)
    with pytest.raises(ValueError, match="9 tokens in its first layer but 0 in layer 4"):
        turn("plain", inputs, copy.deepcopy(output[CACHE_NAME]))
    again = turn("fixed", inputs, output[CACHE_NAME])
    assert torch.equal(again.sequences, turn("fixed", inputs).sequences)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("plain", "fixed")])
def test_moving_depth_continues_from_no_other_cache(mode, filled):
    model, inputs, cache = tiny_sorted(exit_layers=[1, 2, 3, 4]), first_prompt(), DynamicCache()
    if filled:
        run_plain(inputs["input_ids"][:, :5], LAYERS, cache)
    calls = count_layer_calls(model)
    with pytest.raises(
        ValueError, match=r"continues from a `SortedCache`, got .*DynamicCache: pass `SortedCache\(\)`"
    ):
        model.generate(**inputs, **ENDS, **MODES[mode], cache=cache)
    assert calls == []


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("plain", "fixed")])
def test_a_cache_that_holds_the_whole_prompt(mode):
    inputs, cache = first_prompt(), SortedCache()
    run(cache, inputs["input_ids"], attention_mask=inputs["attention_mask"])
    with pytest.raises(ValueError, match=r"holds 6 tokens .* at least one new token .*`cache.crop\(-1\)`"):
        turn(mode, inputs, cache)
