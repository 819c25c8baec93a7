"""`SortedCache`: however its tokens got there, its keys and values are those of one straight pass at full depth."""

import contextlib
import copy
import functools
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from sorted_llama import SortedCache, SortedLlamaForCausalLM
from sorted_llama.modeling_sorted_llama.cache_sorted_llama import PENDING_BLOCK, STORAGE_BLOCK
from sorted_llama.modeling_sorted_llama.compat_sorted_llama import CACHE_NAME
from tests.tiny import reference_llama, tiny_sorted


LAYERS = 4
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@functools.cache
def sorted_model(attention="sdpa"):
    """A model that no test changes."""
    return tiny_sorted(exit_layers=[1, 2, 3, 4], attn_implementation=attention)


@functools.cache
def reference(depth=LAYERS):
    """transformers' own Llama of the first layers of `sorted_model()`."""
    return reference_llama(sorted_model("eager"), depth)


def random_tokens(*shape, seed=0):
    return torch.randint(3, 259, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(cache, tokens, depth=LAYERS, model=None, **arguments):
    """Normed states of a pass of the sorted model; `tokens` of shape `(num_rows, 0)` only take pending ones along."""
    model = model or sorted_model()
    return model.model(input_ids=tokens, cache=cache, exit_layer=depth, **arguments).last_hidden_state


def catch_up(cache, depth=LAYERS, **arguments):
    return run(cache, torch.empty(len(cache.lengths), 0, dtype=torch.long), depth, **arguments)


@torch.no_grad()
def run_plain(tokens, depth=LAYERS, cache=None, **arguments):
    """Normed states of a pass of the plain Llama, and its cache (a `DynamicCache` by default)."""
    cache = DynamicCache() if cache is None else cache
    outputs = reference(depth).model(input_ids=tokens, **{CACHE_NAME: cache}, **arguments)
    return outputs.last_hidden_state, cache


def assert_equals_straight_pass(cache, tokens, depth=LAYERS):
    """Keys and values of rows without padding."""
    _, expected = run_plain(tokens, depth)
    for layer, expected_layer in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected_layer.keys, **CLOSE)
        torch.testing.assert_close(layer.values, expected_layer.values, **CLOSE)


def count_layer_calls(model) -> list[int]:
    calls = []
    for number, layer in enumerate(model.base_model.layers, start=1):
        layer.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    return calls


# 1. Whatever happens to the cache


class Row:
    """What a row of the cache should hold: of each token its id, its position and whether it is attended to."""

    def __init__(self, tokens=(), positions=(), attended=()):
        self.tokens, self.positions, self.attended = list(tokens), list(positions), list(attended)

    def __len__(self):
        return len(self.tokens)

    def append(self, tokens, attended):
        for token, is_attended in zip(tokens, attended, strict=True):
            self.positions.append(self.positions[-1] + 1 if self.positions else 0)
            self.tokens.append(token)
            self.attended.append(is_attended)

    def crop(self, length):
        return Row(self.tokens[:length], self.positions[:length], self.attended[:length])

    def straight_pass(self, depth):
        """Slots of the attended tokens, their states and their keys and values, from the plain Llama."""
        slots = [i for i, is_attended in enumerate(self.attended) if is_attended]
        if not slots:
            return slots, None, None
        tokens, positions = (torch.tensor([[values[i] for i in slots]]) for values in (self.tokens, self.positions))
        states, cache = run_plain(tokens, depth, position_ids=positions)
        return slots, states[0], cache


class History:
    """A `SortedCache`, what it should hold, and random things that happen to both."""

    def __init__(self, draw, attention, rows, left_padded):
        self.draw, self.model, self.cache = draw, sorted_model(attention), SortedCache()
        self.seed = 0
        width = draw(st.integers(1, 5), "prompt")
        pads = [draw(st.integers(0, width - 1), "pads") if left_padded else 0 for _ in range(rows)]
        self.rows = [Row() for _ in range(rows)]
        tokens = self.new_tokens(rows, width)
        mask = torch.tensor([[int(i >= n) for i in range(width)] for n in pads])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        for row, ids, places, attended in zip(self.rows, tokens, positions, mask, strict=True):
            row.tokens, row.positions, row.attended = ids.tolist(), places.tolist(), attended.tolist()
        arguments = {"attention_mask": mask, "position_ids": positions} if left_padded else {}
        self.forward_and_check(tokens, draw(st.integers(1, LAYERS), "depth"), None, [0] * rows, **arguments)

    def new_tokens(self, rows, width):
        self.seed += 1
        return random_tokens(rows, width, seed=self.seed)

    def act(self):
        actions = [self.forward, self.forward, self.forward, self.leave_at_embeddings, self.rollback, self.crop]
        self.draw(st.sampled_from([*actions, self.select, self.reorder, self.repeat]), "action")()
        self.check_lengths()

    def forward(self):
        rows = self.draw(st.sets(st.sampled_from(range(len(self.rows))), min_size=1).map(sorted), "rows")
        number, depth = self.draw(st.integers(0, 4), "tokens"), self.draw(st.integers(1, LAYERS), "depth")
        tokens, arguments = self.new_tokens(len(rows), number), {}
        mask = torch.ones_like(tokens)
        if number and self.draw(st.booleans(), "masked"):
            mask[:, 0] = torch.tensor(self.draw(st.lists(st.integers(0, 1), min_size=len(rows), max_size=len(rows))))
            arguments["attention_mask"] = mask
        passed = [self.cache.lengths_in(depth - 1)[row] for row in rows]
        for row, ids, attended in zip(rows, tokens.tolist(), mask.tolist(), strict=True):
            self.rows[row].append(ids, attended)
        everywhere = len(rows) == len(self.rows) and len({len(row) for row in self.rows}) == 1
        if arguments and everywhere and self.draw(st.booleans(), "whole mask"):
            arguments["attention_mask"] = torch.tensor([row.attended for row in self.rows])
        all_rows = len(rows) == len(self.rows) and self.draw(st.booleans(), "all rows")
        self.forward_and_check(tokens, depth, None if all_rows else rows, passed, **arguments)

    def forward_and_check(self, tokens, depth, cache_rows, passed, **arguments):
        """The newest tokens are in the last columns, and their states those of a plain Llama of `depth` layers."""
        states = run(self.cache, tokens, depth, self.model, cache_rows=cache_rows, **arguments)
        rows = self.rows if cache_rows is None else [self.rows[row] for row in cache_rows]
        counts = [len(row) - before for row, before in zip(rows, passed, strict=True)]
        counts = [max(n, 0) for n in counts]
        assert states.shape[:2] == (len(rows), max(counts))
        for row, before, count, found in zip(rows, passed, counts, states, strict=True):
            slots, expected, _ = row.straight_pass(depth)
            new = [i for i, slot in enumerate(slots) if slot >= before]
            if new and count:
                found = found[[states.shape[1] - len(row) + slots[i] for i in new]]
                torch.testing.assert_close(found, expected[new], **CLOSE)
        self.check_lengths()

    def leave_at_embeddings(self):
        """Rows get different numbers of tokens that no layer runs yet: what levels the rows of a returned cache."""
        counts = self.draw(st.lists(st.integers(0, 3), min_size=len(self.rows), max_size=len(self.rows)), "counts")
        if max(counts) == 0:
            return
        tokens = self.new_tokens(len(self.rows), max(counts))
        embeds = self.model.model.embed_tokens(tokens).detach()
        block = self.cache.append(embeds, counts=counts)
        self.cache.suspend(0, embeds, block)
        for row, ids, count in zip(self.rows, tokens.tolist(), counts, strict=True):
            row.append(ids[:count], [1] * count)

    def rollback(self):
        lengths = [self.draw(st.integers(0, len(row) + 1), "length") for row in self.rows]
        self.cache.rollback(lengths)
        self.rows = [row.crop(length) for row, length in zip(self.rows, lengths, strict=True)]

    def crop(self):
        number = self.draw(st.integers(0, 3), "removed")
        self.cache.crop(-number)
        self.rows = [row.crop(max(len(row) - number, 0)) for row in self.rows]

    def select(self):
        rows = self.draw(st.lists(st.sampled_from(range(len(self.rows))), min_size=1, max_size=4), "selected")
        self.cache.batch_select_indices(torch.tensor(rows))
        self.rows = [copy.deepcopy(self.rows[row]) for row in rows]

    def reorder(self):
        rows = [self.draw(st.sampled_from(range(len(self.rows))), "beam") for _ in self.rows]
        self.cache.reorder_cache(torch.tensor(rows))
        self.rows = [copy.deepcopy(self.rows[row]) for row in rows]

    def repeat(self):
        if len(self.rows) <= 2:
            self.cache.batch_repeat_interleave(2)
            self.rows = [copy.deepcopy(row) for row in self.rows for _ in range(2)]

    def check_lengths(self):
        """Deeper layers hold no more than those below, and states are pending exactly where they hold fewer."""
        assert list(self.cache.lengths) == [len(row) for row in self.rows]
        levels = [self.cache.lengths, *(self.cache.lengths_in(i) for i in range(LAYERS))]
        for below, above in zip(levels, levels[1:], strict=False):
            assert all(a >= b for a, b in zip(below, above, strict=True))
        differ = {i for i, (below, above) in enumerate(zip(levels, levels[1:], strict=False)) if below != above}
        assert set(self.cache.pending) == differ
        for layer, lengths in zip(self.cache.layers, levels[1:], strict=False):
            if layer.is_initialized:
                assert layer.keys.shape == layer.values.shape == (len(self.rows), 2, max(lengths), 8)

    def check_keys_and_values(self):
        catch_up(self.cache, model=self.model)
        self.check_lengths()
        assert self.cache.pending == {}
        assert all(self.cache.lengths_in(i) == self.cache.lengths for i in range(LAYERS))
        for number, row in enumerate(self.rows):
            slots, _, expected = row.straight_pass(LAYERS)
            for layer, expected_layer in zip(self.cache.layers, expected.layers if slots else (), strict=False):
                torch.testing.assert_close(layer.keys[number][:, slots], expected_layer.keys[0], **CLOSE)
                torch.testing.assert_close(layer.values[number][:, slots], expected_layer.values[0], **CLOSE)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_history_leaves_the_keys_and_values_of_one_straight_pass(data):
    history = History(
        data.draw,
        data.draw(st.sampled_from(["sdpa", "eager"]), "attention"),
        data.draw(st.integers(1, 3), "batch size"),
        data.draw(st.booleans(), "left padded"),
    )
    for _ in range(data.draw(st.integers(1, 8), "number of actions")):
        history.act()
    history.check_keys_and_values()


def test_a_pass_of_some_rows_leaves_what_is_pending_in_the_others():
    tokens, cache = random_tokens(2, 5), SortedCache()
    run(cache, tokens[:, :3])
    run(cache, tokens[:1, 3:], depth=2, cache_rows=[0])
    run(cache, tokens[1:, 3:], cache_rows=[1])
    assert cache.lengths_in(1) == (5, 5) and cache.lengths_in(2) == (3, 5)
    catch_up(cache)
    assert_equals_straight_pass(cache, tokens)


def test_first_mask_of_a_cache_with_rows_of_different_lengths():
    """A mask that comes late says nothing of the tokens before: they stay attended to."""
    tokens, cache = random_tokens(2, 6), SortedCache()
    run(cache, tokens[:, :5])
    cache.rollback([2, 5])
    mask = torch.tensor([[0, 1], [1, 1]])
    states = run(cache, torch.cat([tokens[:1, :2], tokens[1:, 4:]]), attention_mask=mask)
    expected, _ = run_plain(torch.cat([tokens[1:, :5], tokens[1:, 4:]], dim=1))
    torch.testing.assert_close(states[1, -2:], expected[0, -2:], **CLOSE)


def test_first_mask_that_some_rows_are_given():
    tokens, cache = random_tokens(2, 6), SortedCache()
    run(cache, tokens[:, :5])
    cache.rollback([2, 5])
    run(cache, tokens[:1, 2:3], cache_rows=[0], attention_mask=torch.ones(1, 1, dtype=torch.long))
    states = run(cache, tokens[1:, 5:], cache_rows=[1])
    torch.testing.assert_close(states, run_plain(tokens[1:])[0][:, -1:], **CLOSE)


def test_rows_that_nothing_is_pending_in_keep_nothing():
    tokens, cache = random_tokens(2, 4), SortedCache()
    run(cache, tokens[:, :3])
    run(cache, tokens[:1, 3:], depth=2, cache_rows=[0])
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.pending == {} and cache.lengths == (3, 3)
    states = run(cache, tokens[1:, 3:].expand(2, 1))
    torch.testing.assert_close(states, run_plain(tokens[[1, 1]])[0][:, -1:], **CLOSE)


def test_rows_are_chosen_by_a_mask_too():
    tokens, cache = random_tokens(3, 5), SortedCache()
    run(cache, tokens[:, :3])
    run(cache, tokens[:, 3:], depth=1)
    cache.batch_select_indices(torch.tensor([True, False, True]))
    catch_up(cache)
    assert_equals_straight_pass(cache, tokens[[0, 2]])


def test_rows_of_different_lengths_are_repeated():
    tokens, cache = random_tokens(2, 6), SortedCache()
    run(cache, tokens[:, :4])
    run(cache, tokens[:, 4:5], depth=2)
    cache.rollback([3, 5])
    cache.batch_repeat_interleave(2)
    assert cache.lengths == (3, 3, 5, 5) and cache.lengths_in(2) == (3, 3, 4, 4)
    run(cache, tokens[:1, 3:5].expand(2, 2), cache_rows=[0, 1])
    run(cache, tokens[[0, 0, 1, 1], 5:])
    assert_equals_straight_pass(cache, tokens[[0, 0, 1, 1]])


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


# 2. What a pass returns


def test_new_tokens_come_last_after_those_taken_along():
    tokens, cache = random_tokens(2, 7), SortedCache()
    run(cache, tokens[:, :3])
    run(cache, tokens[:, 3:5], depth=1)
    run(cache, tokens[:, 5:6], depth=2)
    states = run(cache, tokens[:, 6:])
    torch.testing.assert_close(states, run_plain(tokens)[0][:, 3:], **CLOSE)


def test_rows_with_different_numbers_pending():
    tokens, cache = random_tokens(3, 8), SortedCache()
    run(cache, tokens[:, :3])
    run(cache, tokens[:2, 3:6], depth=2, cache_rows=[0, 1])
    catch_up_of_one = run(cache, tokens[1:2, :0], depth=3, cache_rows=[1])
    torch.testing.assert_close(catch_up_of_one, run_plain(tokens[1:2, :6], 3)[0][:, 3:], **CLOSE)
    run(cache, tokens[2:, 3:4], depth=1, cache_rows=[2])
    new = torch.stack([tokens[0, 6:], tokens[1, 6:], tokens[2, 4:6]])
    states = run(cache, new, depth=3)
    assert states.shape[:2] == (3, 5)
    for row, length, count in ((0, 8, 5), (1, 8, 2), (2, 6, 3)):
        expected, _ = run_plain(tokens[row : row + 1, :length], 3)
        torch.testing.assert_close(states[row, -count:], expected[0, -count:], **CLOSE)


def test_states_at_exits_are_those_of_the_tokens_that_pass_them():
    tokens, cache, model = random_tokens(2, 6), SortedCache(), sorted_model()
    run(cache, tokens[:, :2])
    run(cache, tokens[:, 2:5], depth=2)
    with torch.no_grad():
        output = model.model(input_ids=tokens[:, 5:], cache=cache, exit_layers=[1, 2, 3])
    for depth, number in ((1, 1), (2, 1), (3, 4)):
        states = model.model.norm(output.exit_hidden_states[depth - 1])
        torch.testing.assert_close(states, run_plain(tokens, depth)[0][:, -number:], **CLOSE)


def test_a_pass_with_nothing_to_do():
    tokens, cache = random_tokens(2, 4), SortedCache()
    run(cache, tokens)
    passes = cache.layer_token_passes
    assert catch_up(cache).shape == (2, 0, 32)
    assert cache.layer_token_passes == passes == 2 * 4 * LAYERS
    assert_equals_straight_pass(cache, tokens)


def test_no_layer_runs_a_token_twice():
    tokens, cache = random_tokens(2, 6), SortedCache()
    for number, depth in enumerate((1, 3, 2, 1, 4, 4)):
        run(cache, tokens[:, number : number + 1], depth)
    assert cache.layer_token_passes == 2 * 6 * LAYERS
    assert_equals_straight_pass(cache, tokens)


def pending_model(**fields):
    """A model, and a cache in which two rows of five tokens wait at exit 2."""
    model, cache = tiny_sorted(exit_layers=[1, 2, 4], **fields), SortedCache()
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        model(tokens[:, :5], exit_layer=2, **{CACHE_NAME: cache})
    return model, cache, tokens


def labels_behind(tokens, start=5):
    """Labels that count from the second token behind `start`: a call with the tokens behind it has no other."""
    return torch.where(torch.arange(tokens.shape[1]) > start, tokens, -100)


@pytest.mark.parametrize("shifted", [False, True], ids=["labels", "shift_labels"])
@pytest.mark.parametrize("depth", [None, 4, 1])
def test_labels_are_those_of_the_input_where_tokens_were_pending(depth, shifted):
    model, cache, tokens = pending_model()
    new, behind = tokens[:, 5:], labels_behind(tokens)
    more = {"shift_labels": torch.nn.functional.pad(new[:, 1:], (0, 1), value=-100)} if shifted else {}
    with torch.no_grad():
        output = model(new, labels=new, exit_layer=depth, **more, **{CACHE_NAME: cache})
        expected = [model(tokens, labels=behind, exit_layer=k).loss for k in ([1, 2, 4] if depth is None else [depth])]
    torch.testing.assert_close(output.loss, sum(expected), **CLOSE)
    if depth is None:
        torch.testing.assert_close(output.exit_losses, torch.stack(expected), **CLOSE)
    assert output.logits.shape[1] == 4


def test_logits_to_keep_counts_the_tokens_of_the_input_where_tokens_were_pending():
    model, cache, tokens = pending_model()
    with torch.no_grad():
        expected = model(tokens).logits
        for kept, at in ((torch.tensor([0, 2]), [5, 7]), (2, [7, 8]), (1, [8])):
            again = copy.deepcopy(cache)
            logits = model(tokens[:, 5:], logits_to_keep=kept, **{CACHE_NAME: again}).logits
            torch.testing.assert_close(logits, expected[:, at], **CLOSE)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_states_of_all_layers_are_refused_where_tokens_are_pending(name):
    model, cache, tokens = pending_model(attn_implementation="eager")
    kwargs = {name: True, CACHE_NAME: cache}
    with pytest.raises(ValueError, match=f"`{name}=True`.*pending.*`exit_layer=4`"):
        model(tokens[:, 5:], **kwargs)
    with torch.no_grad():
        model(tokens[:, 5:7], exit_layer=2, **kwargs)  # nothing is pending below exit 2
        model(tokens[:, :0], exit_layer=4, **{CACHE_NAME: cache})  # as the message says
        output = model(tokens[:, 7:], **kwargs)
        whole = model(tokens, **{name: True})
    key = name.removeprefix("output_")
    for got, expected in zip(output[key], whole[key], strict=True):
        torch.testing.assert_close(got, expected[..., -2:, :], **CLOSE)


@pytest.mark.parametrize("width", [3, 5])
def test_labels_of_another_shape_than_the_input_are_refused(width):
    model, cache, tokens = pending_model()
    for labels in ({"labels": tokens[:, :width]}, {"labels": tokens[:, 5:], "shift_labels": tokens[:, :width]}):
        name = list(labels)[-1]
        with pytest.raises(ValueError, match=rf"`{name}` must be of the input's shape \(2, 4\), got \(2, {width}\)"):
            model(tokens[:, 5:], **labels, **{CACHE_NAME: cache})


def test_logits_of_the_causal_model():
    tokens, cache, model = random_tokens(2, 6), SortedCache(), sorted_model()
    with torch.no_grad():
        model(input_ids=tokens[:, :5], cache=cache, exit_layer=1)
        logits = model(input_ids=tokens[:, 5:], cache=cache, logits_to_keep=2).logits
        expected = reference()(input_ids=tokens).logits
    torch.testing.assert_close(logits, expected[:, -2:], **CLOSE)


# 3. Other models


def smaller_model(depth):
    """A sorted model of the first layers of `sorted_model()`, which knows nothing of those above."""
    return SortedLlamaForCausalLM.from_llama(sorted_model().extract_submodel(depth), exit_layers=[depth])


@pytest.mark.parametrize("filled", [1, 2, 3])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_cache_that_a_smaller_model_filled(filled, depth):
    model, tokens, cache = tiny_sorted(exit_layers=[1, 2, 3, 4]), random_tokens(2, 6), SortedCache()
    run(cache, tokens[:, :5], filled, smaller_model(filled))
    calls = count_layer_calls(model)
    if depth <= filled:
        states = run(cache, tokens[:, 5:], depth, model)
        torch.testing.assert_close(states, run_plain(tokens, depth)[0][:, -1:], **CLOSE)
        catch_up(cache, filled, model=model)
        assert_equals_straight_pass(cache, tokens, filled)
        return
    for new in (tokens[:, 5:], tokens[:, :0]):
        with pytest.raises(ValueError, match=rf"5 tokens in layer {filled} but 0 in layer {filled + 1}.*={depth}"):
            run(cache, new, depth, model)
    for mode in ({"exit_layer": depth}, {"exit_layer": [depth, depth]}, {"exit_threshold": 2.0}):
        with pytest.raises(ValueError, match=f"5 tokens in layer {filled} but 0 in layer {filled + 1}"):
            model.generate(tokens, cache=cache, **mode, max_new_tokens=2)
    assert calls == []
    assert cache.lengths == (5, 5)


def test_a_smaller_model_that_goes_on_where_states_are_pending():
    """Some of the hidden states are there, those of the newest tokens are not: as much a hole as none at all."""
    tokens, cache = random_tokens(2, 8), SortedCache()
    run(cache, tokens[:, :5], depth=2)
    run(cache, tokens[:, 5:7], 2, smaller_model(2))
    with pytest.raises(ValueError, match="7 tokens in layer 2 but 0 in layer 3"):
        run(cache, tokens[:, 7:])
    states = run(cache, tokens[:, 7:], depth=2)
    torch.testing.assert_close(states, run_plain(tokens, 2)[0][:, -1:], **CLOSE)


@pytest.mark.parametrize("filled", [0, 5])
def test_a_plain_llama_is_refused(filled):
    tokens, cache = random_tokens(2, 6), SortedCache()
    if filled:
        run(cache, tokens[:, :filled])
    message = "Only a sorted model can go on with a `SortedCache`.*`SortedLlamaForCausalLM`.*`DynamicCache"
    with pytest.raises(ValueError, match=message):
        run_plain(tokens[:, filled:], cache=cache)
    with pytest.raises(ValueError, match=message):
        reference().generate(tokens, **{CACHE_NAME: cache}, max_new_tokens=2)
    torch.testing.assert_close(run(cache, tokens[:, filled:]), run_plain(tokens)[0][:, filled:], **CLOSE)


def test_it_cannot_be_offloaded():
    with pytest.raises(TypeError, match="offloading"):
        SortedCache(offloading=True)


STRATEGIES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "beam samples": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("depth", [2, LAYERS])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_generate_with_it_equals_generate_with_a_dynamic_cache(strategy, depth):
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    inputs = {"input_ids": random_tokens(3, 5) * mask, "attention_mask": mask}
    if strategy == "prompt lookup":  # of one row
        inputs = {name: values[:1] for name, values in inputs.items()}
    arguments = {**inputs, **STRATEGIES[strategy], "max_new_tokens": 8}
    torch.manual_seed(0)
    expected = reference(depth).generate(**arguments, **{CACHE_NAME: DynamicCache()})
    torch.manual_seed(0)
    cache = SortedCache()
    assert torch.equal(sorted_model().generate(**arguments, exit_layer=depth, **{CACHE_NAME: cache}), expected)
    assert cache.get_seq_length() > 5 and set(cache.pending) == ({2} if depth == 2 else set())


# 4. Memory


def storages(cache):
    return [tensor.untyped_storage() for layer in cache.layers for tensor in (layer.keys, layer.values)]


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
    tokens, cache = random_tokens(2, STORAGE_BLOCK + 2), SortedCache()
    run(cache, tokens[:, :200])
    before = [storage.data_ptr() for storage in storages(cache)]
    for number, depth in zip(range(200, STORAGE_BLOCK), [4, 1, 2, 3] * 14, strict=True):
        run(cache, tokens[:, number : number + 1], depth)
    catch_up(cache)
    cache.crop(-3)
    run(cache, tokens[:, STORAGE_BLOCK - 3 : STORAGE_BLOCK])
    assert [storage.data_ptr() for storage in storages(cache)] == before
    assert {storage.nbytes() for storage in storages(cache)} == {2 * 2 * STORAGE_BLOCK * 8 * 4}
    run(cache, tokens[:, STORAGE_BLOCK:])
    assert {storage.nbytes() for storage in storages(cache)} == {2 * 2 * 2 * STORAGE_BLOCK * 8 * 4}
    assert cache.layers[0].keys.shape == (2, 2, STORAGE_BLOCK + 2, 8)
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
    assert all(storage.nbytes() == 2 * 2 * STORAGE_BLOCK * 8 * 4 for storage in storages(cache)[:2])
    assert cache.layers[0].max_cache_len == 13


def test_it_holds_keys_values_pending_states_and_two_numbers_a_token():
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    tokens, cache = random_tokens(2, 40), SortedCache()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ordinary = LAYERS * 2 * (2 * 2 * STORAGE_BLOCK * 8 * 4) + 2 * STORAGE_BLOCK * (8 + 1)

    def held():
        assert not any(tensor.requires_grad for tensor in tensors_in(cache))
        unique = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(cache)}
        return sum(unique.values())

    run(cache, tokens[:, :3], attention_mask=mask, position_ids=positions)
    assert held() == ordinary
    for number in range(3, 10):
        run(cache, tokens[:, number : number + 1], depth=2)
    assert held() == ordinary + 2 * PENDING_BLOCK * 32 * 4
    run(cache, tokens[:, 10:11], depth=3)  # what was pending at 2 is pending at 3 now
    assert set(cache.pending) == {3}
    assert held() == ordinary + 2 * PENDING_BLOCK * 32 * 4
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


# 5. What it refuses


def test_crop_and_rollback():
    tokens, cache = random_tokens(2, 5), SortedCache()
    run(cache, tokens)
    with pytest.raises(ValueError, match="must be 0 or negative, got 3"):
        cache.crop(3)
    for lengths in ([3], [3, 3, 3], [], [-1, 3], [3, 2.0], [3, True]):
        with pytest.raises(ValueError, match=r"must hold 2 integers of at least 0, one a row"):
            cache.rollback(lengths)
    assert cache.lengths == (5, 5)
    cache.crop(0)
    cache.crop(-2)
    assert cache.lengths == (3, 3) and cache.layers[3].keys.shape[-2] == 3
    cache.crop(-99)
    assert cache.lengths == (0, 0) and cache.get_seq_length() == 0
    torch.testing.assert_close(run(cache, tokens), run_plain(tokens)[0], **CLOSE)


@pytest.mark.parametrize("depth", [2, LAYERS])
def test_wrong_number_of_rows(depth):
    tokens, cache = random_tokens(2, 5), SortedCache()
    run(cache, tokens[:, :4], depth)
    for wrong, rows in ((tokens[:1, 4:], None), (random_tokens(3, 1), None), (tokens[:, 4:], [1])):
        with pytest.raises(ValueError, match="rows, but the input has"):
            run(cache, wrong, cache_rows=rows)
    states = run(cache, tokens[:, 4:])
    torch.testing.assert_close(states[:, -1:], run_plain(tokens)[0][:, -1:], **CLOSE)


def test_rows_are_those_of_a_sorted_cache():
    with pytest.raises(ValueError, match="`cache_rows` chooses rows of a `SortedCache`"):
        run(DynamicCache(), random_tokens(2, 2), cache_rows=[0, 1])


@pytest.mark.parametrize("shape", [(2, 3), (2, 7), (2, 1, 1, 6), (1, 2), (3, 2), (3, 6)])
@pytest.mark.parametrize("masked", [False, True])
def test_bad_shape_of_a_mask(shape, masked):
    tokens, cache = random_tokens(2, 6), SortedCache()
    run(cache, tokens[:, :4], attention_mask=torch.ones(2, 4) if masked else None)
    with pytest.raises(ValueError, match=r"must be of shape \(2, 6\).*or \(2, 2\), got"):
        run(cache, tokens[:, 4:], attention_mask=torch.zeros(shape))
    torch.testing.assert_close(run(cache, tokens[:, 4:]), run_plain(tokens)[0][:, 4:], **CLOSE)


def test_a_refused_first_pass_leaves_the_cache_empty():
    tokens, cache = random_tokens(2, 4), SortedCache()
    with pytest.raises(ValueError, match="must be of shape"):
        run(cache, random_tokens(3, 4), attention_mask=torch.ones(3, 5))
    torch.testing.assert_close(run(cache, tokens), run_plain(tokens)[0], **CLOSE)


def test_rows_of_different_lengths_need_a_mask_that_flash_attention_has_not():
    tokens, cache = random_tokens(2, 6), SortedCache()
    run(cache, tokens[:, :5])
    states = torch.zeros(2, 1, 32)
    even = cache.append(states)
    for kind in ("flash_attention_2", "kernels-community/flash-attn3"):
        assert cache.attention_mask(even, SimpleNamespace(_attn_implementation=kind), states) is None
    cache.rollback([3, 5])
    uneven = cache.append(states)
    for kind in ("flash_attention_2", "flash_attention_3", "flex_attention"):
        with pytest.raises(ValueError, match=f"{kind}.*cannot attend to rows of different lengths"):
            cache.attention_mask(uneven, SimpleNamespace(_attn_implementation=kind), states)


def test_flash_attention_is_given_the_mask_as_it_is():
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    tokens, cache = random_tokens(2, 4), SortedCache()
    run(cache, tokens[:, :3], attention_mask=mask)
    states = torch.zeros(2, 1, 32)
    found = cache.attention_mask(
        cache.append(states), SimpleNamespace(_attn_implementation="flash_attention_2"), states
    )
    assert found.tolist() == [[True, True, True, True], [False, True, True, True]]


def test_refused_rows_of_different_lengths_in_a_pass():
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


# 6. Copies


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


def test_reset():
    cache, _ = ragged_cache()
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.lengths == () and cache.pending == {}
    tokens = random_tokens(3, 5, seed=1)  # another number of rows, and no padding
    run(cache, tokens[:, :4], depth=1)
    states = run(cache, tokens[:, 4:])
    torch.testing.assert_close(states, run_plain(tokens)[0], **CLOSE)
    assert_equals_straight_pass(cache, tokens)


# 7. Errors on the way


@contextlib.contextmanager
def raising_hook(model, number):
    """Layer `number` (from 1) of the model is out of order."""

    def fail(*_):
        raise RuntimeError("out of order")

    handle = model.model.layers[number - 1].register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("pending", [[], [1], [2], [3, 1], [2, 3]])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_an_error_in_the_middle_of_a_pass(number, pending):
    model, tokens, cache = sorted_model(), random_tokens(2, 9), SortedCache()
    run(cache, tokens[:, :4])
    for depth in pending:
        run(cache, tokens[:, cache.get_seq_length() :][:, :1], depth)
    with raising_hook(model, number), pytest.raises(RuntimeError, match="out of order"):
        run(cache, tokens[:, cache.get_seq_length() :])
    first = cache.get_seq_length()
    assert first >= 4
    states = run(cache, tokens[:, first:])
    new = tokens.shape[1] - first
    torch.testing.assert_close(states[:, -new:], run_plain(tokens)[0][:, first:], **CLOSE)
    assert cache.pending == {}
    assert_equals_straight_pass(cache, tokens)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_an_error_in_the_first_pass(number):
    model, tokens, cache = sorted_model(), random_tokens(2, 5), SortedCache()
    with raising_hook(model, number), pytest.raises(RuntimeError, match="out of order"):
        run(cache, tokens)
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(run(cache, tokens), run_plain(tokens)[0], **CLOSE)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_an_error_in_a_pass_of_some_rows(number):
    """Every row goes on after the tokens that the cache says it holds."""
    model, tokens, cache = sorted_model(), random_tokens(3, 9), SortedCache()
    run(cache, tokens[:, :5])
    run(cache, tokens[1:, 5:7], depth=2, cache_rows=[1, 2])
    run(cache, tokens[2:, :0], cache_rows=[2])
    cache.rollback([3, 7, 7])
    with raising_hook(model, number), pytest.raises(RuntimeError, match="out of order"):
        run(cache, tokens[1:, 7:8], cache_rows=[1, 2])
    assert cache.lengths[0] == 3
    for row, length in enumerate(cache.lengths):
        states = run(cache, tokens[row : row + 1, length:], cache_rows=[row])
        expected = run_plain(tokens[row : row + 1])[0]
        torch.testing.assert_close(states[0, length - 9 :], expected[0, length:], **CLOSE)
    assert_equals_straight_pass(cache, tokens)


# 8. Turns of a chat


MODES = {
    "plain": {},
    "fixed": {"exit_layer": 2},
    "confidence": {"exit_threshold": [0.3, 0.5, 0.7]},
    "draft": {"assistant_early_exit": 2},
    "drafts of 3": {"assistant_early_exit": 1, "num_assistant_tokens": 3},
    "rows": {"exit_layer": [2, 4, 1]},
    "auto": {"exit_layer": "auto", "exit_agreement": 0.3},
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


def tokens_without_a_cache(mode, inputs, output):
    """One run on the whole text. Where the prompt chooses the depths, and most of it is cached, it takes the same."""
    if mode != "auto":
        return turn(mode, inputs).sequences
    depths = output.exit_layers_used[:, 0].tolist()
    return sorted_model().generate(**inputs, **ENDS, exit_layer=depths)


def go_on(mode, inputs, cache):
    """Continue a copy of the cache, and check the tokens."""
    output = turn(mode, inputs, copy.deepcopy(cache))
    assert torch.equal(output.sequences, tokens_without_a_cache(mode, inputs, output))
    assert output[CACHE_NAME].get_seq_length() == output.sequences.shape[1] - 1
    return output


@pytest.mark.parametrize("padding_is_attended", [False, True])
@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
def test_a_second_turn_in_any_mode(first, second, padding_is_attended):
    inputs = first_prompt()
    output = turn(first, inputs, SortedCache() if first in ("plain", "fixed") else None)
    lengths = (output.sequences[:, 6:] != 0).sum(1)
    assert len(set(lengths.tolist())) > 1  # some rows end before others
    inputs = next_prompt(inputs, output.sequences, padding_is_attended, seed=1)
    go_on(second, inputs, output[CACHE_NAME])


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
def test_a_third_turn_in_any_mode(first, second):
    attended = len(first + second) % 2 == 0
    inputs = first_prompt()
    output = turn(first, inputs, SortedCache())
    inputs = next_prompt(inputs, output.sequences, attended, seed=1)
    output = go_on(second, inputs, output[CACHE_NAME])
    inputs = next_prompt(inputs, output.sequences, not attended, seed=2)
    for third in MODES:
        go_on(third, inputs, output[CACHE_NAME])


@pytest.mark.parametrize("agreement", [0.0, 1.0])
def test_a_depth_from_the_prompt_of_a_second_turn(agreement):
    """Everything agrees well enough, or nothing does: as without a cache."""
    inputs = first_prompt()
    output = turn("confidence", inputs)
    inputs = next_prompt(inputs, output.sequences, padding_is_attended=False, seed=3)
    mode = {"exit_layer": "auto", "exit_agreement": agreement, "return_dict_in_generate": True}
    expected = sorted_model().generate(**inputs, **ENDS, **mode)
    found = sorted_model().generate(**inputs, **ENDS, **mode, cache=output[CACHE_NAME])
    assert set(found.exit_layers_used[:, 0].tolist()) == {1 if agreement == 0 else LAYERS}
    assert torch.equal(found.exit_layers_used, expected.exit_layers_used)
    assert torch.equal(found.sequences, expected.sequences)


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
    with pytest.raises(ValueError, match=r"holds 6 tokens .* at least one new token.*`cache.crop\(-1\)`"):
        turn(mode, inputs, cache)


# 9. Compiled layers


def test_compiled_layers():
    model, tokens, cache = tiny_sorted(num_hidden_layers=2, exit_layers=[1, 2]), random_tokens(2, 8), SortedCache()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend=backend)
    run(cache, tokens[:, :4], 2, model)
    run(cache, tokens[:1, 4:6], 1, model, cache_rows=[0])
    states = run(cache, torch.stack([tokens[0, 6:], tokens[1, 4:6]]), 2, model)
    assert graphs and cache.layer_token_passes == 2 * (8 + 6)
    for row, length in enumerate((8, 6)):
        with torch.no_grad():
            expected = reference_llama(model, 2).model(input_ids=tokens[row : row + 1, :length]).last_hidden_state
        torch.testing.assert_close(states[row, 4 - length :], expected[0, 4:], **CLOSE)


def test_generate_with_compiled_layers():
    model, inputs = tiny_sorted(num_hidden_layers=2, exit_layers=[1, 2]), random_tokens(1, 4)
    arguments = {"exit_threshold": 0.5, "max_new_tokens": 6}
    expected = model.generate(inputs, **arguments)
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="eager")
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
