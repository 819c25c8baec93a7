"""`generate(exit_threshold=...)` and `exit_layer=[...]`, against a loop without a cache."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.modeling_sorted_llama.decoding import (
    EXITS,
    MEASURES,
    Schedule,
    alone,
    assert_as_the_runs,
    batch_with_ends,
    cached_model,
    end_token,
    following,
    generate,
    naive,
    padded,
    reaching,
    record_work,
    rows_of,
    shallow_model,
    thresholds_at,
    undecided,
)
from tests.tiny import prompts, reference_llama, tiny_sorted


# The ends of the scale


@pytest.mark.parametrize("lengths", [(5,), (6, 4, 1)], ids=["one_row", "left_padded"])
@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True, "temperature": 1.5, "top_k": 50}], ids=["greedy", "sample"]
)
@pytest.mark.parametrize("threshold, depth", [(1.5, 4), ([2, 1.01], 4), (math.inf, 4), (0, 1), ([3.0, 0.0], 2)])
def test_thresholds_that_decide_everything(threshold, depth, sampling, lengths):
    """Above 1 it is full depth, 0 is the first exit; sampling draws what plain sampling draws with the same seed."""
    model, arguments = cached_model(), {**prompts(lengths), **sampling, "max_new_tokens": 12, "eos_token_id": []}
    output = generate(model, exit_threshold=threshold, **arguments)
    expected = generate(reference_llama(model, depth), **arguments)
    assert torch.equal(output.sequences, expected.sequences)
    assert output.exit_layers_used.tolist() == [[depth] * 12] * len(lengths)
    assert torch.equal(output.sequences, generate(model, exit_layer=depth, **arguments).sequences)


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True}], ids=["greedy", "sample"])
@pytest.mark.parametrize("threshold, depth", [(2.0, 4), (0.0, 1)])
def test_thresholds_that_decide_everything_where_rows_end(threshold, depth, sampling):
    """Rows that have ended change neither the others' tokens nor what is drawn for them."""
    model, arguments = cached_model(), {**prompts(), **sampling, "max_new_tokens": 16}
    arguments["eos_token_id"] = list(range(2, 40 if sampling else 60))
    expected = generate(reference_llama(model, depth), **arguments).sequences
    ends = [len(row) for row in (expected[:, 6:] != 0).int().tolist()], (expected[:, 6:] == 0).sum(1).tolist()
    assert len(set(ends[1])) > 1  # rows end at different lengths
    output = generate(model, exit_threshold=threshold, **arguments)
    assert torch.equal(output.sequences, expected)
    assert torch.equal(output.exit_layers_used, torch.where(expected[:, 6:] == 0, 0, depth))
    assert output.exit_layers_used.is_contiguous() and output.exit_confidences.is_contiguous()


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("vocab_size", [32, 259])
def test_threshold_0_where_nothing_is_known(measure, vocab_size):
    """A uniform distribution has confidence 0, not a rounding below it: it leaves at the first exit."""
    model = tiny_sorted(vocab_size=vocab_size)
    torch.nn.init.zeros_(model.lm_head.weight)
    output = generate(
        model, input_ids=torch.tensor([[3, 4]]), exit_threshold=0.0, exit_confidence=measure, max_length=4
    )
    assert output.exit_layers_used.tolist() == [[1, 1]]
    assert (output.exit_confidences >= 0).all() and (output.exit_confidences < 0.05).all()


# Every token computed from exact states


PROCESSORS = {
    "none": ({}, []),
    "penalties": (
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        [RepetitionPenaltyLogitsProcessor(1.7), NoRepeatNGramLogitsProcessor(2)],
    ),
    "temperature": (
        {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.4)])},
        [TemperatureLogitsWarper(0.4)],
    ),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("kind", PROCESSORS)
def test_one_row_equals_the_naive_loop(kind, measure):
    model, inputs = cached_model(), prompts((5,), seed=3)
    options, processors = PROCESSORS[kind]
    (row,), how = rows_of(inputs), {"measure": measure, "processors": processors, "new_tokens": 14}
    thresholds = thresholds_at(model, [row], {1: 0.6, 2: 0.4}, **how)
    run = naive(model, row, reaching(thresholds), **how)
    assert set(run.depths) == {1, 2, 4} and not undecided([run], thresholds)
    asked = {"exit_threshold": list(thresholds.values()), "max_new_tokens": 14, **options}
    output = generate(model, **inputs, exit_confidence=measure, output_scores=True, output_logits=True, **asked)
    assert_as_the_runs(output, inputs, [run])
    if measure == "max_prob":
        assert torch.equal(generate(model, **inputs, **asked).sequences, output.sequences)  # the default
    same = reaching(dict.fromkeys(EXITS, thresholds[1]))
    output = generate(model, **inputs, exit_confidence=measure, **{**asked, "exit_threshold": thresholds[1]})
    assert_as_the_runs(output, inputs, [naive(model, row, same, **how)])


def test_one_sampled_row_equals_the_naive_loop():
    model, inputs = cached_model(), prompts((5,), seed=3)
    processors = [RepetitionPenaltyLogitsProcessor(1.2), TemperatureLogitsWarper(0.6), TopKLogitsWarper(30)]
    processors.append(TopPLogitsWarper(0.9))
    (row,), how = rows_of(inputs), {"processors": processors, "new_tokens": 14, "sample": True}
    torch.manual_seed(7)
    thresholds = thresholds_at(model, [row], {1: 0.6, 2: 0.4}, **how)
    torch.manual_seed(1)
    run = naive(model, row, reaching(thresholds), **how)
    assert set(run.depths) == {1, 2, 4} and not undecided([run], thresholds)
    output = generate(
        model,
        seed=1,
        **inputs,
        exit_threshold=list(thresholds.values()),
        do_sample=True,
        repetition_penalty=1.2,
        temperature=0.6,
        top_k=30,
        top_p=0.9,
        max_new_tokens=14,
        output_scores=True,
        output_logits=True,
    )
    assert_as_the_runs(output, inputs, [run])


@pytest.mark.parametrize(
    "bounds, exits",
    [
        ({"exit_layer": 1}, [1]),
        ({"exit_layer": 2}, [1, 2]),
        ({"exit_layer": 3}, [1, 2, 3]),
        ({"exit_layer": 4}, [1, 2, 4]),
    ],
)
def test_a_depth_beside_thresholds_bounds_the_search(bounds, exits):
    """Only the exits below it are looked at, each with its own threshold."""
    model, inputs = tiny_sorted(), prompts((5, 3), seed=4)
    rows = rows_of(inputs)
    thresholds = thresholds_at(model, rows, {1: 0.7, 2: 0.4}, exits=EXITS)
    runs = [naive(model, row, reaching(thresholds), exits=exits) for row in rows]
    assert {k for run in runs for k in run.depths} == set(exits) and not undecided(runs, thresholds)
    work = record_work(model)
    output = generate(model, **inputs, exit_threshold=list(thresholds.values()), **bounds, max_new_tokens=8)
    assert_as_the_runs(output, inputs, runs)
    assert max(call[1] for call in work if call[0] == "layer") == exits[-1]


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_batch_equals_the_naive_loop(data):
    """Each row's tokens, depths and confidences are those that it has alone, without a cache."""
    model = cached_model(data.draw(st.integers(0, 5), "seed"))
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4), "lengths")
    inputs = prompts(lengths, seed=data.draw(st.integers(0, 99), "prompts"))
    measure = data.draw(st.sampled_from(MEASURES), "measure")
    quantiles = {k: data.draw(st.floats(0.1, 0.9), f"quantile of exit {k}") for k in EXITS[:-1]}
    rows, how = rows_of(inputs), {"measure": measure, "new_tokens": 6}
    thresholds = thresholds_at(model, rows[:2], quantiles, **{**how, "new_tokens": 4, "eos": ()})
    runs = [naive(model, row, reaching(thresholds), **how) for row in rows]
    assume(not undecided(runs, thresholds))
    output = generate(
        model,
        **inputs,
        exit_threshold=list(thresholds.values()),
        exit_confidence=measure,
        max_new_tokens=6,
    )
    assert_as_the_runs(output, inputs, runs)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_schedule_of_depths(data):
    """Whatever depths the tokens before had, a token is computed from exact states; scores are those of its exit."""
    exits = data.draw(st.sampled_from([[1, 2, 4], [1, 2, 3, 4], [3, 4]]), "exits")
    model = tiny_sorted(data.draw(st.integers(0, 5), "seed"), exit_layers=exits)
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3), "lengths")
    inputs = prompts(lengths, seed=data.draw(st.integers(0, 99), "prompts"))
    assume(len({tuple(ids) for ids in inputs["input_ids"].tolist()}) == len(lengths))
    plan = [
        data.draw(st.lists(st.sampled_from(exits), min_size=8, max_size=8), f"row {r}") for r in range(len(lengths))
    ]
    runs = [
        naive(model, row, following(depths), exits=exits, processors=[TemperatureLogitsWarper(0.5)])
        for row, depths in zip(rows_of(inputs), plan, strict=True)
    ]
    schedule = Schedule(inputs, plan)
    output = generate(
        model,
        **inputs,
        exit_threshold=0.5,
        exit_confidence=schedule,
        max_new_tokens=8,
        logits_processor=LogitsProcessorList([TemperatureLogitsWarper(0.5)]),
        output_scores=True,
        output_logits=True,
    )
    assert_as_the_runs(output, inputs, runs, check_confidences=False)
    new_tokens = output.exit_layers_used.shape[1]
    ends = padded([[1.0] * len(run.tokens) for run in runs], new_tokens, 0.0)
    assert output.exit_confidences.tolist() == ends
    # Called once for every exit that a token came by, with the processed scores
    looked = [
        (row, step, k)
        for row, run in enumerate(runs)
        for step, depth in enumerate(run.depths)
        for k in exits
        if k <= depth
    ]
    assert sorted(call[:3] for call in schedule.calls) == sorted(looked)
    for row, step, depth, scores in schedule.calls:
        if depth == runs[row].depths[step]:
            torch.testing.assert_close(scores, runs[row].scores[step], atol=2e-4, rtol=2e-4)


def test_a_callable_decides_above_1_too():
    """Its values are its own: a threshold above 1 switches no exit off."""
    model, inputs = cached_model(), prompts((5,), seed=3)

    def number_of_tokens(scores, exit_layer, input_ids):
        return torch.full((len(input_ids),), float(input_ids.shape[1]))

    output = generate(
        model, **inputs, exit_threshold=[9.0, 7.0], exit_confidence=number_of_tokens, max_new_tokens=6, eos_token_id=[]
    )
    assert output.exit_layers_used.tolist() == [[4, 4, 2, 2, 1, 1]]
    assert output.exit_confidences.tolist() == [[5.0, 6.0, 7.0, 8.0, 9.0, 10.0]]


@pytest.mark.parametrize(
    "options", [{"prefill_chunk_size": 2}, {"cache_implementation": "static"}, {"max_length": 14}]
)
def test_prefill_and_cache_options(options):
    model, inputs = cached_model(), prompts((6, 4, 2), seed=5)
    rows = rows_of(inputs)
    thresholds = thresholds_at(model, rows, {1: 0.6, 2: 0.5})
    runs = [naive(model, row, reaching(thresholds)) for row in rows]
    assert {k for run in runs for k in run.depths} == set(EXITS) and not undecided(runs, thresholds)
    limit = {} if "max_length" in options else {"max_new_tokens": 8}
    output = generate(model, **inputs, exit_threshold=list(thresholds.values()), **limit, **options)
    assert_as_the_runs(output, inputs, runs)


@pytest.mark.parametrize("mode", ["threshold", "list"])
def test_embeddings_instead_of_tokens(mode):
    model, inputs = shallow_model(), prompts()
    asked = {"threshold": {"exit_threshold": 0.15}, "list": {"exit_layer": [2, 1, 4]}}
    expected = generate(model, **inputs, **asked[mode], max_new_tokens=8)
    embeds = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    output = generate(model, **embeds, attention_mask=inputs["attention_mask"], **asked[mode], max_new_tokens=8)
    assert torch.equal(output.sequences, expected.sequences[:, 6:])
    assert torch.equal(output.exit_layers_used, expected.exit_layers_used)


def test_rows_that_end():
    model, inputs, thresholds, runs, options = batch_with_ends()
    asked = {"exit_threshold": list(thresholds.values()), **options}
    output = generate(model, **inputs, **asked, output_scores=True, output_logits=True)
    assert_as_the_runs(output, inputs, runs)
    assert output.exit_layers_used.shape == output.exit_confidences.shape == (3, max(len(r.tokens) for r in runs))
    # The row alone, by the library itself
    for row, run in zip(rows_of(inputs), runs, strict=True):
        alone = generate(model, input_ids=torch.tensor([row]), **asked)
        assert alone.sequences[0, len(row) :].tolist() == run.tokens
        assert alone.exit_layers_used[0].tolist() == run.depths
    # The order of the rows does not matter
    turned = {name: values.flip(0) for name, values in inputs.items()}
    assert_as_the_runs(generate(model, **turned, **asked), turned, runs[::-1])
    # A plain tensor without `return_dict_in_generate`
    assert torch.equal(model.generate(**inputs, **asked), output.sequences)


@pytest.mark.parametrize("mode", ["threshold", "list"])
def test_sampled_return_sequences(mode):
    """Each of the sampled sequences follows the rules of the mode, from its own tokens."""
    model, inputs = shallow_model(), prompts((6, 3), seed=8)
    rows = [row for row in rows_of(inputs) for _ in range(3)]
    processors = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(20)]
    if mode == "threshold":
        thresholds = thresholds_at(model, rows[::3], {1: 0.6, 2: 0.4}, processors=processors)
        asked, rules = {"exit_threshold": list(thresholds.values())}, [reaching(thresholds)] * 6
    else:
        asked, rules = {"exit_layer": [1, 4]}, [following([k] * 9) for k in (1, 4) for _ in range(3)]
    output = generate(
        model, **inputs, **asked, do_sample=True, temperature=0.8, top_k=20, num_return_sequences=3, max_new_tokens=9
    )
    assert output.sequences.shape[0] == 6 and len({tuple(s) for s in output.sequences.tolist()}) > 3
    used = set()
    for i, (row, rule) in enumerate(zip(rows, rules, strict=True)):
        tokens = [t for t in output.sequences[i, 6:].tolist() if t != 0]
        run = naive(model, row, rule, processors=processors, forced=tokens)
        assert output.exit_layers_used[i].tolist()[: len(tokens)] == run.depths
        assert all(scores[token] > -math.inf for scores, token in zip(run.scores, tokens, strict=True))
        used |= set(run.depths)
    assert len(used) > 1


@pytest.mark.parametrize("mode", ["threshold", "list"])
def test_next_turn_with_the_returned_cache(mode):
    """The cache of one turn, handed to the next: every depth goes on from exact states."""
    model, question, turn = cached_model(), prompts((5, 5), seed=9)["input_ids"], prompts((4, 4), seed=1)["input_ids"]
    asked = {"threshold": {"exit_threshold": 0.14}, "list": {"exit_layer": [1, 4]}}[mode]
    arguments = {"max_new_tokens": 6, "eos_token_id": []}
    first = generate(model, input_ids=question, **asked, **arguments)
    assert len(set(first.exit_layers_used.flatten().tolist())) > 1
    both = torch.cat([first.sequences, turn], dim=1)
    for follow_up in ({"exit_threshold": 0.14}, {"exit_layer": [2, 1]}, {"exit_layer": 4}):
        afresh = generate(model, input_ids=both, **follow_up, **arguments)
        second = generate(model, input_ids=both, cache=first.past_key_values, **follow_up, **arguments)
        assert torch.equal(second.sequences, afresh.sequences)
        first.past_key_values.rollback([first.sequences.shape[1] - 1] * 2)


def expected_work(width, depths: list[list[int]], exits, head_everywhere: bool, prefilled=False):
    """
    The work that the tokens of rows with these `depths` make necessary, and the number of layer-token passes: each
    layer runs each token once, as soon as a token goes that deep, together with those that left below.
    """
    work, passes = [], 0
    ran = [[width if prefilled else 0] * (exits[-1] + 1) for _ in depths]
    for step in range(max(map(len, depths))):
        going, layer = [row for row, used in enumerate(depths) if step < len(used)], 0
        for depth in exits:
            for number in range(layer + 1, depth + 1):
                missing = [width + step - ran[row][number] for row in going]
                passes += sum(missing)
                if max(missing) > 0:
                    work.append(("layer", number, len(going), max(missing)))
                for row in going:
                    ran[row][number] = width + step
            layer = depth
            deciding = [row for row in going if head_everywhere or depths[row][step] == depth]
            if deciding:
                work.append(("head", len(deciding)))
            going = [row for row in going if depths[row][step] > depth]
            if not going:
                break
    return work, passes


@pytest.mark.parametrize(
    "plan",
    [
        [[1, 1, 1, 4, 1, 2, 2, 4]],
        [[4, 2, 1, 1, 1, 1, 1, 1], [1, 1, 2, 1, 4, 1, 1, 2], [1, 1, 1, 1, 1, 1, 1, 4]],
        [[1] * 8, [2] * 8],
        [[4] * 8, [4] * 8],
    ],
    ids=["one_row", "three_rows", "never_deep", "always_deep"],
)
def test_work_of_a_schedule(plan):
    """No layer runs twice for a token, none above its exit but in one block with a later, deeper token."""
    model, inputs = tiny_sorted(), prompts(tuple(range(5, 5 - len(plan), -1)), seed=2)
    work = record_work(model)
    options = {"exit_threshold": 0.5, "max_new_tokens": 8, "eos_token_id": []}
    output = generate(model, **inputs, exit_confidence=Schedule(inputs, plan), **options)
    assert output.exit_layers_used.tolist() == plan
    expected, passes = expected_work(5, plan, EXITS, head_everywhere=True)
    assert work == expected
    assert output.past_key_values.layer_token_passes == passes
    if len(plan) == 1:
        assert passes == sum(call[2] * call[3] for call in work if call[0] == "layer")


def test_work_of_rows_that_end():
    """A row that has ended is in no layer and no head any more."""
    cached, inputs, thresholds, runs, options = batch_with_ends()
    model = tiny_sorted()
    work = record_work(model)
    output = generate(model, **inputs, exit_threshold=list(thresholds.values()), **options)
    assert_as_the_runs(output, inputs, runs)
    expected, passes = expected_work(6, [run.depths for run in runs], EXITS, head_everywhere=True)
    assert work == expected
    assert output.past_key_values.layer_token_passes == passes


@pytest.mark.parametrize("thresholds, exits", [([2.0, 0.1], [2, 4]), ([0.12, 1.5], [1, 4]), (7.0, [4])])
def test_exits_with_a_threshold_above_1_are_not_looked_at(thresholds, exits):
    model, inputs = tiny_sorted(), prompts((5, 3), seed=4)
    work = record_work(model)
    options = {"max_new_tokens": 8, "eos_token_id": []}
    output = generate(model, **inputs, exit_threshold=thresholds, **options)
    used = output.exit_layers_used.tolist()
    assert {k for row in used for k in row} == set(exits)
    expected, passes = expected_work(5, used, exits, head_everywhere=True)
    assert work == expected
    assert output.past_key_values.layer_token_passes == passes


def test_work_of_row_depths():
    """The head runs where a row leaves; rows that ended cost nothing, layers above the deepest never run."""
    model, inputs = tiny_sorted(), prompts((6, 4, 5, 2), seed=3)
    free = generate(model, **inputs, exit_layer=[2, 1, 3, 1], max_new_tokens=8, eos_token_id=[])
    eos = [int(free.sequences[2, 6 + 3]), int(free.sequences[1, 6 + 1])]  # the deepest row ends, a shallow one before
    work = record_work(model)
    output = generate(model, **inputs, exit_layer=[2, 1, 3, 1], max_new_tokens=8, eos_token_id=eos)
    used = [[k for k in row if k > 0] for row in output.exit_layers_used.tolist()]
    assert [set(row) for row in used] == [{2}, {1}, {3}, {1}] and len(used[1]) < len(used[2]) < len(used[0]) == 8
    expected, passes = expected_work(6, used, [1, 2, 3], head_everywhere=False)
    assert work == expected
    assert output.past_key_values.layer_token_passes == passes
    assert max(call[1] for call in work if call[0] == "layer") == 3


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "top_k": 1}], ids=["greedy", "top_1"])
@pytest.mark.parametrize("depths", [[4, 1, 2], [1, 1, 3], [3, 3, 3], (2, 4, 1), torch.tensor([1, 3, 2])])
def test_each_row_at_its_depth(depths, sampling):
    """Each row is what its sub-model generates for it alone; the order of the rows is kept."""
    model, inputs = cached_model(), prompts((6, 3, 5), seed=10)
    listed = [int(k) for k in depths]
    arguments = {"max_new_tokens": 8, **sampling}
    expected = [alone(model, row, k, **arguments) for row, k in zip(rows_of(inputs), listed, strict=True)]
    output = generate(model, **inputs, exit_layer=depths, output_scores=True, **arguments)
    longest = max(map(len, expected))
    assert output.sequences[:, 6:].tolist() == padded(expected, longest)
    used = [[k] * len(tokens) for k, tokens in zip(listed, expected, strict=True)]
    assert output.exit_layers_used.tolist() == padded(used, longest)
    assert output.exit_confidences is None
    fixed = [
        generate(model, input_ids=torch.tensor([r]), exit_layer=k, **arguments)
        for r, k in zip(rows_of(inputs), listed)
    ]
    assert [
        f.sequences[0, -f.sequences.shape[1] + len(r) :].tolist() for f, r in zip(fixed, rows_of(inputs))
    ] == expected


def test_row_depths_with_processors_and_ends():
    model, inputs, depths = cached_model(), prompts((6, 3, 5, 1), seed=11), [2, 4, 1, 2]
    processors = [NoRepeatNGramLogitsProcessor(2), TemperatureLogitsWarper(0.5)]
    options = {"no_repeat_ngram_size": 2, "logits_processor": LogitsProcessorList(processors[1:])}
    plans = [following([k] * 9) for k in depths]
    how = {"processors": processors, "new_tokens": 9}
    free = [naive(model, row, plan, **how) for row, plan in zip(rows_of(inputs), plans, strict=True)]
    eos = [end_token(free[0], 3), end_token(free[1], 5)]
    runs = [naive(model, row, plan, eos=eos, **how) for row, plan in zip(rows_of(inputs), plans, strict=True)]
    assert len({len(run.tokens) for run in runs}) > 2
    output = generate(
        model,
        **inputs,
        exit_layer=depths,
        **options,
        eos_token_id=eos,
        max_new_tokens=9,
        output_scores=True,
        output_logits=True,
    )
    assert_as_the_runs(output, inputs, runs, check_confidences=False)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_row_depths(data):
    model = cached_model(data.draw(st.integers(0, 5), "seed"))
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4), "lengths")
    inputs = prompts(lengths, seed=data.draw(st.integers(0, 99), "prompts"))
    depths = [data.draw(st.integers(1, 4), f"depth of row {i}") for i in range(len(lengths))]
    eos = data.draw(st.lists(st.integers(3, 258), max_size=60), "end tokens")
    runs = [
        naive(model, row, following([k] * 6), exits=[k], new_tokens=6, eos=eos)
        for row, k in zip(rows_of(inputs), depths, strict=True)
    ]
    output = generate(model, **inputs, exit_layer=depths, max_new_tokens=6, eos_token_id=eos)
    assert_as_the_runs(output, inputs, runs, check_confidences=False)


def test_row_depths_of_sampled_return_sequences():
    """Each prompt's depth holds for all of its sequences."""
    model, inputs = cached_model(), prompts((6, 3), seed=10)
    arguments = {"do_sample": True, "top_k": 1, "max_new_tokens": 8, "eos_token_id": []}
    output = generate(model, **inputs, exit_layer=[4, 1], num_return_sequences=2, **arguments)
    expected = [alone(model, row, k, **arguments) for row, k in zip(rows_of(inputs), [4, 1], strict=True)]
    assert output.sequences[:, 6:].tolist() == [expected[0], expected[0], expected[1], expected[1]]
    assert output.exit_layers_used.tolist() == [[4] * 8, [4] * 8, [1] * 8, [1] * 8]


def test_row_depths_of_one_row():
    model, inputs = cached_model(), prompts((5,), seed=1)
    output = generate(model, **inputs, exit_layer=[3], max_new_tokens=8)
    assert output.sequences[0, 5:].tolist() == alone(model, rows_of(inputs)[0], 3, max_new_tokens=8)
