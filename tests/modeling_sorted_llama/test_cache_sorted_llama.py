"""`SortedCache`: however its tokens got there, its keys and values are those of one straight pass at full depth."""

import contextlib
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from sorted_llama import SortedCache, SortedLlamaForCausalLM
from sorted_llama.modeling_sorted_llama.compat_sorted_llama import CACHE_NAME
from tests.modeling_sorted_llama.caches import (
    CLOSE,
    LAYERS,
    assert_equals_straight_pass,
    catch_up,
    count_layer_calls,
    random_tokens,
    reference,
    run,
    run_plain,
    sorted_model,
)
from tests.tiny import tiny_sorted


# Whatever happens to the cache


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

    def straight_pass(self, depth, exit_heads="shared"):
        """Slots of the attended tokens, their states and their keys and values, from the plain Llama."""
        slots = [i for i, is_attended in enumerate(self.attended) if is_attended]
        if not slots:
            return slots, None, None
        tokens, positions = (torch.tensor([[values[i] for i in slots]]) for values in (self.tokens, self.positions))
        states, cache = run_plain(tokens, depth, exit_heads=exit_heads, position_ids=positions)
        return slots, states[0], cache


class History:
    """A `SortedCache`, what it should hold, and random things that happen to both."""

    def __init__(self, draw, attention, exit_heads, rows, left_padded):
        self.draw, self.exit_heads = draw, exit_heads
        self.model, self.cache = sorted_model(attention, exit_heads), SortedCache()
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
        last = self.cache.exit_layers.get(depth)
        lengths = self.cache.lengths_in(depth - 1) if last is None else last.lengths
        passed = [lengths[row] for row in rows]
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
            slots, expected, _ = row.straight_pass(depth, self.exit_heads)
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
        self.cache.trunk(0, 1)[0].suspend(embeds, block)
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
        for k, layer in self.cache.exit_layers.items():
            assert layer.arrived == levels[k] and (layer.pending is None) == (layer.lengths == levels[k])

    def check_keys_and_values(self):
        for depth in range(1, LAYERS + 1):
            catch_up(self.cache, depth, model=self.model)
            self.check_lengths()
            assert self.cache.lengths_in(depth - 1) == self.cache.lengths
            own = [self.cache.exit_layers[depth]] if self.exit_heads == "layer" and depth < LAYERS else []
            self.check_layers([*self.cache.layers[:depth], *own], depth)
        assert self.cache.pending == {}
        assert all(layer.pending is None for layer in self.cache.exit_layers.values())

    def check_layers(self, layers, depth):
        for number, row in enumerate(self.rows):
            slots, _, expected = row.straight_pass(depth, self.exit_heads)
            for layer, expected_layer in zip(layers, expected.layers, strict=True) if slots else ():
                torch.testing.assert_close(layer.keys[number][:, slots], expected_layer.keys[0], **CLOSE)
                torch.testing.assert_close(layer.values[number][:, slots], expected_layer.values[0], **CLOSE)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_history_leaves_the_keys_and_values_of_one_straight_pass(data):
    history = History(
        data.draw,
        data.draw(st.sampled_from(["sdpa", "eager"]), "attention"),
        data.draw(st.sampled_from(["shared", "layer"]), "exit heads"),
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


# What a pass returns


def test_new_tokens_come_last_after_those_taken_along():
    tokens, cache = random_tokens(2, 7), SortedCache()
    run(cache, tokens[:, :3])
    run(cache, tokens[:, 3:5], depth=1)
    run(cache, tokens[:, 5:6], depth=2)
    states = run(cache, tokens[:, 6:])
    torch.testing.assert_close(states, run_plain(tokens)[0][:, 3:], **CLOSE)


def test_rows_take_along_different_numbers_of_tokens():
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


def test_a_pass_without_new_tokens_returns_at_every_exit_what_was_pending_below_it():
    tokens, cache = random_tokens(2, 4), SortedCache()
    run(cache, tokens, depth=2)
    assert run(cache, tokens[:, :0], depth=1).shape[1] == 0
    passes = cache.layer_token_passes
    outputs = sorted_model().model(tokens[:, :0], **{CACHE_NAME: cache}, exit_layers=[1, 3, LAYERS])
    assert [states.shape[1] for states in outputs.exit_hidden_states] == [0, 4, 4]
    assert cache.layer_token_passes - passes == tokens.numel() * (LAYERS - 2)
    torch.testing.assert_close(outputs.last_hidden_state, run_plain(tokens)[0], **CLOSE)


def test_states_at_exits_are_those_of_the_tokens_that_pass_them():
    tokens, cache, model = random_tokens(2, 6), SortedCache(), sorted_model()
    run(cache, tokens[:, :2])
    run(cache, tokens[:, 2:5], depth=2)
    with torch.no_grad():
        output = model.model(input_ids=tokens[:, 5:], cache=cache, exit_layers=[1, 2, 3])
    for depth, number in ((1, 1), (2, 1), (3, 4)):
        states = model.model.norm(output.exit_hidden_states[depth - 1])
        torch.testing.assert_close(states, run_plain(tokens, depth)[0][:, -number:], **CLOSE)


def test_a_pass_of_no_tokens_where_nothing_is_pending_runs_no_layer():
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


def test_the_causal_model_returns_logits_of_what_it_took_along():
    tokens, cache, model = random_tokens(2, 6), SortedCache(), sorted_model()
    with torch.no_grad():
        model(input_ids=tokens[:, :5], cache=cache, exit_layer=1)
        logits = model(input_ids=tokens[:, 5:], cache=cache, logits_to_keep=2).logits
        expected = reference()(input_ids=tokens).logits
    torch.testing.assert_close(logits, expected[:, -2:], **CLOSE)


# Other models, and other ways to generate


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


# What it refuses


def test_crop_and_rollback_forget_the_newest_tokens():
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
def test_an_input_of_another_number_of_rows_is_refused(depth):
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


def test_a_refused_first_pass_leaves_the_cache_empty():
    tokens, cache = random_tokens(2, 4), SortedCache()
    with pytest.raises(ValueError, match="must be of shape"):
        run(cache, random_tokens(3, 4), attention_mask=torch.ones(3, 5))
    torch.testing.assert_close(run(cache, tokens), run_plain(tokens)[0], **CLOSE)


# Errors on the way


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
def test_the_cache_goes_on_after_an_error_in_a_pass(number, pending):
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
def test_the_cache_is_empty_after_an_error_in_its_first_pass(number):
    model, tokens, cache = sorted_model(), random_tokens(2, 5), SortedCache()
    with raising_hook(model, number), pytest.raises(RuntimeError, match="out of order"):
        run(cache, tokens)
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(run(cache, tokens), run_plain(tokens)[0], **CLOSE)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_every_row_goes_on_after_an_error_in_a_pass_of_some(number):
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
