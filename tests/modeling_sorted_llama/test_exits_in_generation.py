"""`generate(exit_threshold=...)` and `exit_layer=[...]`, against a loop without a cache."""

import functools
import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from sorted_llama import SortedLlamaForCausalLM
from tests.tiny import prompts, reference_llama, run_as_stranger, save_tiny, tiny_sorted, tiny_tokenizer


EXITS = [1, 2, 4]
MEASURES = ["max_prob", "margin", "entropy"]


def rows_of(inputs) -> list[list[int]]:
    """The prompts without their padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(*map(inputs.get, ("input_ids", "attention_mask")))]


def generate(model, seed=0, **arguments):
    torch.manual_seed(seed)
    return model.generate(return_dict_in_generate=True, **arguments)


@functools.cache
def cached_model(seed=0) -> SortedLlamaForCausalLM:
    """For tests that leave the model as it is."""
    return tiny_sorted(seed)


# The naive reference: one row, one token at a time, everything computed again from the tokens alone


@dataclass
class Run:
    """What the reference generated for one row."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    seen: list[tuple[int, float]] = field(default_factory=list)  # exit and confidence, wherever it was looked at


def naive_confidence(scores: torch.Tensor, measure: str) -> float:
    probabilities = sorted((math.exp(p) for p in scores.double().log_softmax(-1).tolist()), reverse=True)
    if measure == "max_prob":
        return probabilities[0]
    if measure == "margin":
        return probabilities[0] - probabilities[1]
    return 1 + sum(p * math.log(p) for p in probabilities if p > 0) / math.log(len(probabilities))


@torch.no_grad()
def naive(
    model,
    prompt: list[int],
    leaves: Callable[[int, int, float], bool],
    measure="max_prob",
    exits=EXITS,
    processors=(),
    new_tokens=8,
    eos=(2,),
    stop: Callable[[list[int]], bool] = lambda ids: False,
    sample=False,
    forced=None,
) -> Run:
    """
    Each token leaves at the first exit where `leaves(exit, step, confidence)`, at the latest at the last one. `forced`
    are tokens to follow instead of its own.
    """
    run, ids = Run(), list(prompt)
    for step in range(new_tokens if forced is None else len(forced)):
        sequence = torch.tensor([ids])
        for depth in exits:
            logits = model(input_ids=sequence, exit_layer=depth).logits[:, -1].float()
            scores = logits.clone()
            for processor in processors:
                scores = processor(sequence, scores)
            confidence = naive_confidence(scores[0], measure)
            run.seen.append((depth, confidence))
            if depth == exits[-1] or leaves(depth, step, confidence):
                break
        token = torch.multinomial(scores.softmax(-1), 1) if sample else scores.argmax(-1)
        token = int(token) if forced is None else forced[step]
        ids.append(token)
        run.tokens.append(token)
        run.depths.append(depth)
        run.confidences.append(confidence)
        run.scores.append(scores[0])
        run.logits.append(logits[0])
        if token in eos or stop(ids):
            break
    return run


def never(depth, step, confidence) -> bool:
    return False


def reaching(thresholds: dict[int, float]) -> Callable:
    return lambda depth, step, confidence: confidence >= thresholds[depth]


def following(schedule: list[int]) -> Callable:
    return lambda depth, step, confidence: depth >= schedule[step]


def between(confidences: list[float], quantile: float) -> float:
    """A threshold in the middle of two observed confidences: no decision hangs on rounding."""
    ordered = sorted(confidences)
    at = min(int(quantile * len(ordered)), len(ordered) - 2)
    return (ordered[at] + ordered[at + 1]) / 2


def thresholds_at(model, rows, quantiles: dict[int, float], **arguments) -> dict[int, float]:
    """By exit, a quantile of the confidences seen on the way to full depth."""
    seen = [pair for row in rows for pair in naive(model, row, never, **arguments).seen]
    return {k: between([c for depth, c in seen if depth == k], q) for k, q in quantiles.items()}


def undecided(runs: list[Run], thresholds: dict[int, float]) -> bool:
    """Whether a decision hangs on rounding."""
    return any(abs(c - thresholds[k]) < 1e-5 for run in runs for k, c in run.seen if k in thresholds)


def padded(rows: list[list], length: int, filler=0) -> list[list]:
    return [row + [filler] * (length - len(row)) for row in rows]


def assert_as_the_runs(output, inputs, runs: list[Run], check_confidences=True):
    """Tokens, depths and confidences are those that the reference found for each row alone."""
    width, new_tokens = inputs["input_ids"].shape[1], max(len(run.tokens) for run in runs)
    assert torch.equal(output.sequences[:, :width], inputs["input_ids"])
    assert output.sequences[:, width:].tolist() == padded([run.tokens for run in runs], new_tokens)
    assert output.exit_layers_used.tolist() == padded([run.depths for run in runs], new_tokens)
    if check_confidences:
        expected = torch.tensor(padded([run.confidences for run in runs], new_tokens, 0.0))
        torch.testing.assert_close(output.exit_confidences, expected, atol=1e-5, rtol=1e-4)
    for name in ("scores", "logits"):
        stored = getattr(output, name)
        if stored is not None:
            assert len(stored) == new_tokens
            for row, run in enumerate(runs):
                for step, expected in enumerate(getattr(run, name)):
                    torch.testing.assert_close(stored[step][row], expected, atol=2e-4, rtol=2e-4)


class Schedule:
    """A confidence that makes row `r`'s token `i` leave at `depths[r][i]`; keeps what it was called with."""

    def __init__(self, inputs, depths: list[list[int]]):
        self.prompts, self.depths, self.calls = inputs["input_ids"].tolist(), depths, []

    def __call__(self, scores, exit_layer, input_ids):
        width = len(self.prompts[0])
        rows = [self.prompts.index(ids[:width]) for ids in input_ids.tolist()]
        step = input_ids.shape[1] - width
        self.calls += [(row, step, exit_layer, s.clone()) for row, s in zip(rows, scores, strict=True)]
        return torch.tensor([float(exit_layer >= self.depths[row][step]) for row in rows])


def end_token(run: Run, step: int) -> int:
    """The token that a run generates at `step`, for the first time there."""
    assert run.tokens[step] not in run.tokens[:step]
    return run.tokens[step]


# The ends of the scale


@pytest.mark.parametrize("lengths", [(5,), (6, 4, 1)], ids=["one_row", "left_padded"])
@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True, "temperature": 1.5, "top_k": 50}], ids=["greedy", "sample"]
)
@pytest.mark.parametrize(("threshold", "depth"), [(1.5, 4), ([2, 1.01], 4), (math.inf, 4), (0, 1), ([3.0, 0.0], 2)])
def test_thresholds_that_decide_everything(threshold, depth, sampling, lengths):
    """Above 1 it is full depth, 0 is the first exit; sampling draws what plain sampling draws with the same seed."""
    model, arguments = cached_model(), {**prompts(lengths), **sampling, "max_new_tokens": 12, "eos_token_id": []}
    output = generate(model, exit_threshold=threshold, **arguments)
    expected = generate(reference_llama(model, depth), **arguments)
    assert torch.equal(output.sequences, expected.sequences)
    assert output.exit_layers_used.tolist() == [[depth] * 12] * len(lengths)
    assert torch.equal(output.sequences, generate(model, exit_layer=depth, **arguments).sequences)


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True}], ids=["greedy", "sample"])
@pytest.mark.parametrize(("threshold", "depth"), [(2.0, 4), (0.0, 1)])
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
    ("bounds", "exits"),
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


# Rows of a batch


def batch_with_ends(threshold_quantiles=(0.6, 0.5), seed=6, ends=(2, None, 5), new_tokens=9):
    """A batch of three whose rows end after different numbers of tokens: model, inputs, thresholds, runs, ends."""
    model, inputs = cached_model(), prompts((6, 3, 5), seed=seed)
    rows = rows_of(inputs)
    thresholds = thresholds_at(model, rows, dict(zip(EXITS, threshold_quantiles, strict=False)))
    free = [naive(model, row, reaching(thresholds), eos=(), new_tokens=new_tokens) for row in rows]
    eos = [end_token(run, step) for run, step in zip(free, ends, strict=True) if step is not None]
    runs = [naive(model, row, reaching(thresholds), eos=eos, new_tokens=new_tokens) for row in rows]
    assert len({len(run.tokens) for run in runs}) == 3 and not undecided(runs, thresholds)
    assert all(len(set(run.depths)) > 1 for run in runs)
    return model, inputs, thresholds, runs, {"eos_token_id": eos, "max_new_tokens": new_tokens}


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


# Streamers


class Log(BaseStreamer):
    """Keeps what it is given, in order."""

    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append(("put", value.tolist()))

    def end(self):
        self.events.append(("end", None))


class LogWithExits(Log):
    def put_exits(self, exit_layers, confidences):
        assert confidences is None or all(isinstance(c, float) for c in confidences)
        self.events.append(("exits", (list(exit_layers), confidences and list(confidences))))


@pytest.mark.parametrize("mode", ["threshold", "list"])
@pytest.mark.parametrize("streamer_class", [Log, LogWithExits])
def test_streamers(streamer_class, mode):
    """The prompt, then the columns of the result, each as soon as it is known; before it, how deep it was run."""
    model, inputs, thresholds, _, options = batch_with_ends()
    asked = {"threshold": {"exit_threshold": list(thresholds.values())}, "list": {"exit_layer": [4, 1, 2]}}
    asked = {**options, **asked[mode]}
    streamer = streamer_class()
    output = generate(model, **inputs, **asked, streamer=streamer)
    expected = [("put", inputs["input_ids"].tolist())]
    for step in range(output.exit_layers_used.shape[1]):
        if streamer_class is LogWithExits:
            confidences = pytest.approx(output.exit_confidences[:, step].tolist()) if mode == "threshold" else None
            expected.append(("exits", (output.exit_layers_used[:, step].tolist(), confidences)))
        expected.append(("put", output.sequences[:, 6 + step].tolist()))
    assert streamer.events == [*expected, ("end", None)]


def test_streamed_while_it_runs():
    """A column is put before the next token's layers run."""
    model, order = tiny_sorted(), []
    streamer = Log()
    streamer.put = lambda value: order.append("put")
    model.model.layers[0].register_forward_pre_hook(lambda *_: order.append("layer"))
    generate(model, **prompts((5, 3)), exit_threshold=0.15, max_new_tokens=4, eos_token_id=[], streamer=streamer)
    assert order == ["put"] + ["layer", "put"] * 4


def test_text_streamer():
    model, tokenizer = cached_model(), tiny_tokenizer()
    inputs = tokenizer("hello", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    output = generate(model, **inputs, exit_threshold=0.15, max_new_tokens=8, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :])


# Work


def record_work(model) -> list[tuple]:
    """From now on: `("layer", number, rows, tokens)` and `("head", rows)`, in the order of the calls."""
    work = []
    for number, layer in enumerate(model.model.layers, start=1):
        layer.register_forward_pre_hook(lambda _, args, n=number: work.append(("layer", n, *args[0].shape[:2])))
    model.lm_head.register_forward_pre_hook(lambda _, args: work.append(("head", args[0].shape[:-1].numel())))
    return work


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


@pytest.mark.parametrize(("thresholds", "exits"), [([2.0, 0.1], [2, 4]), ([0.12, 1.5], [1, 4]), (7.0, [4])])
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


# `exit_layer=[...]`


def alone(model, row, depth, **arguments) -> list[int]:
    """What the sub-model of `depth` layers generates for one row: transformers' own Llama."""
    output = generate(reference_llama(model, depth), input_ids=torch.tensor([row]), **arguments)
    return output.sequences[0, len(row) :].tolist()


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


@functools.cache
def shallow_model(seed=0, scale=0.2) -> SortedLlamaForCausalLM:
    """A model whose upper layers do little: on some prompts its exits agree with full depth."""
    model = tiny_sorted(seed)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            if number > 0:
                for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    projection.weight.mul_(scale if number > 1 else 1.5 * scale)
    return model


# Where the options come from


MODES = {
    "threshold": {"exit_threshold": [2.0, 0.0]},
    "thresholds": {"exit_threshold": [0.13, 0.12], "exit_confidence": "margin", "exit_layer": 2},
    "list": {"exit_layer": [2, 1, 4]},
}


@pytest.mark.parametrize("mode", MODES)
def test_sources(mode, tmp_path):
    """A keyword argument, a generation config, the model's own and its file say the same; objects are left alone."""
    model, inputs, asked = tiny_sorted(), {**prompts(), "max_new_tokens": 8}, MODES[mode]
    model.load_state_dict(shallow_model().state_dict())
    before = dict(vars(model.generation_config))
    plain = generate(model, **inputs)
    expected = generate(model, **inputs, **asked)
    assert not torch.equal(expected.sequences, plain.sequences)

    def same(output):
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.exit_layers_used, expected.exit_layers_used)

    given = GenerationConfig(**asked, max_new_tokens=8, eos_token_id=2, pad_token_id=0)
    as_given = dict(vars(given))
    same(generate(model, **prompts(), generation_config=given))
    assert vars(given) == as_given and vars(model.generation_config) == before

    # An ordinary call afterwards is an ordinary call
    after = generate(model, **inputs)
    assert torch.equal(after.sequences, plain.sequences) and type(after) is type(plain)
    assert isinstance(after.past_key_values, DynamicCache)

    for name, value in asked.items():
        setattr(model.generation_config, name, value)
    edited = dict(vars(model.generation_config))
    same(generate(model, **inputs))
    same(generate(model, **prompts(), generation_config=GenerationConfig(max_new_tokens=8)))
    assert vars(model.generation_config) == edited
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: saved[name] for name in asked} == asked
    loaded = SortedLlamaForCausalLM.from_pretrained(tmp_path)
    assert {name: getattr(loaded.generation_config, name) for name in asked} == asked
    same(generate(loaded, **inputs))


def test_a_call_has_the_last_word():
    """Keyword arguments come before a generation config, which comes before the model's."""
    model, inputs = tiny_sorted(), {**prompts(), "max_new_tokens": 8}
    expected = {k: generate(reference_llama(model, k), **inputs).sequences for k in EXITS}
    model.generation_config.exit_threshold = 0.0
    given = GenerationConfig(exit_threshold=[2.0, 0.0], max_new_tokens=8)
    assert torch.equal(generate(model, **inputs).sequences, expected[1])
    assert torch.equal(generate(model, **prompts(), generation_config=given).sequences, expected[2])
    assert torch.equal(
        generate(model, **prompts(), generation_config=given, exit_threshold=2.0).sequences, expected[4]
    )


def test_a_depth_of_the_call_replaces_that_of_the_file():
    """Depths of rows in `generation_config.json` are no obstacle to other calls."""
    model, inputs = tiny_sorted(), {**prompts(), "max_new_tokens": 8}
    model.generation_config.exit_layer = [1, 2, 4]
    for depth in EXITS:
        expected = generate(reference_llama(model, depth), **inputs).sequences
        assert torch.equal(generate(model, **inputs, exit_layer=depth).sequences, expected)
    output = generate(model, **inputs, exit_layer=[1, 1, 1])
    assert torch.equal(output.sequences, generate(reference_llama(model, 1), **inputs).sequences)


def test_default_depth_bounds_the_search(tmp_path):
    """A model loaded with a depth goes no deeper, unless the call says so."""
    saved, inputs = save_tiny(tmp_path, tiny_sorted()), {**prompts(), "max_new_tokens": 8}
    model = SortedLlamaForCausalLM.from_pretrained(saved, exit_layer=2)
    work = record_work(model)
    rows = rows_of(inputs)
    thresholds = thresholds_at(model, rows, {1: 0.5}, exits=[1, 2])
    runs = [naive(model, row, reaching(thresholds), exits=[1, 2]) for row in rows]
    assert {k for run in runs for k in run.depths} == {1, 2} and not undecided(runs, thresholds)
    work.clear()
    assert_as_the_runs(generate(model, **inputs, exit_threshold=[thresholds[1], 0.0]), inputs, runs)
    full = generate(model, **inputs, exit_threshold=2.0)
    assert torch.equal(full.sequences, generate(reference_llama(model, 2), **inputs).sequences)
    assert max(call[1] for call in work if call[0] == "layer") == 2
    deep = generate(model, **inputs, exit_threshold=2.0, exit_layer=4)
    assert torch.equal(deep.sequences, generate(reference_llama(model, 4), **inputs).sequences)


@pytest.mark.parametrize("at", ["constructor", "call", "model"])
@pytest.mark.parametrize(
    ("asked", "depth"),
    [
        ({"exit_threshold": 0.0, "exit_layer": 2}, 1),
        ({"exit_threshold": [2.0, 0.0], "exit_confidence": "entropy"}, 2),
        ({"exit_layer": [2]}, 2),
    ],
)
def test_pipeline(asked, depth, at):
    model, tokenizer = tiny_sorted(), tiny_tokenizer()
    if at == "model":
        for name, value in asked.items():
            setattr(model.generation_config, name, value)
    pipe = pipeline("text-generation", model, tokenizer=tokenizer, **(asked if at == "constructor" else {}))
    text = {"max_new_tokens": 6, "do_sample": False}
    (result,) = pipe("hello", **text, **(asked if at == "call" else {}), return_tensors=True)
    inputs = tokenizer("hello", return_tensors="pt")
    expected = {k: generate(reference_llama(model, k), **inputs, **text).sequences[0].tolist() for k in EXITS}
    assert result["generated_token_ids"] == expected[depth] != expected[4]


def test_pipeline_with_a_batch():
    model, tokenizer = tiny_sorted(), tiny_tokenizer()
    pipe = pipeline("text-generation", model, tokenizer=tokenizer, exit_layer=[1, 4, 2])
    text = {"max_new_tokens": 6, "do_sample": False}
    results = pipe(["hello", "you", "there!"], batch_size=3, return_tensors=True, **text)
    for (result,), prompt, depth in zip(results, ["hello", "you", "there!"], [1, 4, 2], strict=True):
        row = tokenizer(prompt)["input_ids"]
        new = alone(model, row, depth, **text)
        assert [t for t in result["generated_token_ids"] if t != 0] == [*row, *(t for t in new if t != 0)]


DECODE = """
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder, tokens, mask, modes, out = sys.argv[1:]
inputs = {"input_ids": torch.tensor(json.loads(tokens)), "attention_mask": torch.tensor(json.loads(mask))}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")


def run(**asked):
    output = model.generate(**inputs, **asked, max_new_tokens=8, return_dict_in_generate=True)
    return [output.sequences.tolist(), output.exit_layers_used.tolist()]


results = {mode: run(**asked) for mode, asked in json.loads(modes).items()}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model.generation_config.exit_threshold = [2.0, 0.0]
model.save_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
results["file"] = run()
pipe = pipeline("text-generation", model=folder, trust_remote_code=True)
results["pipe"] = pipe("hello", max_new_tokens=6, do_sample=False)[0]["generated_text"]
with open(out, "w") as file:
    json.dump(results, file)
"""


def test_a_process_without_the_package(tmp_path):
    model, inputs = tiny_sorted(), prompts()
    model.load_state_dict(shallow_model().state_dict())
    folder, out = save_tiny(tmp_path / "model", model), tmp_path / "out.json"
    arguments = [json.dumps(values.tolist()) for values in inputs.values()]
    run_as_stranger(DECODE, folder, *arguments, json.dumps(MODES), out, folder=tmp_path)
    results = json.loads(out.read_text())
    for mode, asked in {**MODES, "file": {"exit_threshold": [2.0, 0.0]}}.items():
        expected = generate(model, **inputs, **asked, max_new_tokens=8)
        assert results[mode] == [expected.sequences.tolist(), expected.exit_layers_used.tolist()]
    pipe = pipeline("text-generation", model, tokenizer=tiny_tokenizer())
    expected = pipe("hello", exit_layer=2, max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert results["pipe"] == expected


def test_threads_in_different_modes():
    """Calls on one model do not see each other."""
    model, inputs = cached_model(), {**prompts(), "max_new_tokens": 20, "eos_token_id": []}
    calls = [{"exit_threshold": 0.14}, {"exit_layer": [4, 1, 2]}, {"exit_layer": 2}, {}]
    expected = [model.generate(**inputs, **asked) for asked in calls]
    results = {}

    def work(number):
        results[number] = [model.generate(**inputs, **calls[number]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(tokens, expected[n]) for n in range(len(calls)) for tokens in results[n])


# Errors


ERRORS = {
    "threshold_text": ({"exit_threshold": "x"}, ["exit_threshold", "'x'", "list of 2"]),
    "threshold_nan": ({"exit_threshold": math.nan}, ["exit_threshold", "nan", "list of 2"]),
    "threshold_bool": ({"exit_threshold": True}, ["exit_threshold", "True", "list of 2"]),
    "thresholds_too_few": ({"exit_threshold": [0.5]}, ["exit_threshold", "[0.5]", "list of 2", "[1, 2]"]),
    "thresholds_too_many": ({"exit_threshold": [0.5] * 3}, ["exit_threshold", "[0.5, 0.5, 0.5]", "list of 2"]),
    "thresholds_empty": ({"exit_threshold": []}, ["exit_threshold", "[]", "list of 2"]),
    "thresholds_nan": ({"exit_threshold": [0.5, math.nan]}, ["exit_threshold", "[0.5, nan]", "list of 2"]),
    "thresholds_bool": ({"exit_threshold": [0.5, False]}, ["exit_threshold", "False", "list of 2"]),
    "thresholds_text": ({"exit_threshold": [0.5, "x"]}, ["exit_threshold", "[0.5, 'x']", "list of 2"]),
    "thresholds_none": ({"exit_threshold": [0.5, None]}, ["exit_threshold", "[0.5, None]", "list of 2"]),
    "confidence_unknown": (
        {"exit_threshold": 0.5, "exit_confidence": "sure"},
        ["exit_confidence", "'sure'", "max_prob", "margin", "entropy", "callable"],
    ),
    "confidence_number": ({"exit_threshold": 0.5, "exit_confidence": 3}, ["exit_confidence", "3", "max_prob"]),
    "confidence_empty": ({"exit_threshold": 0.5, "exit_confidence": ""}, ["exit_confidence", "''", "max_prob"]),
    **{
        f"bound_{value}": ({"exit_threshold": 0.5, "exit_layer": value}, ["exit_layer", repr(value), "1 to 4"])
        for value in (0, 5, -1)
    },
    "threshold_and_list": (
        {"exit_threshold": 0.5, "exit_layer": [1, 2]},
        ["exit_threshold=0.5", "exit_layer=[1, 2]", "one of them"],
    ),
    "threshold_and_draft": (
        {"exit_threshold": 0.5, "assistant_early_exit": 2},
        ["exit_threshold=0.5", "assistant_early_exit=2", "one of them"],
    ),
    "list_and_draft": (
        {"exit_layer": [1, 2], "assistant_early_exit": 2},
        ["exit_layer=[1, 2]", "assistant_early_exit=2", "one of them"],
    ),
    "confidence_alone": ({"exit_confidence": "margin"}, ["exit_confidence='margin'", "exit_threshold"]),
    "confidence_with_list": (
        {"exit_confidence": "margin", "exit_layer": [1, 2]},
        ["exit_confidence='margin'", "exit_threshold"],
    ),
    "min_exit_layer": ({"min_exit_layer": 2, "exit_threshold": 0.5}, ["min_exit_layer=2", "removed", "[2, 0.9]"]),
    "max_exit_layer": ({"max_exit_layer": 2, "exit_threshold": 0.5}, ["max_exit_layer=2", "removed", "exit_layer=k"]),
    "exit_agreement": ({"exit_agreement": 0.9}, ["exit_agreement=0.9", "removed", "exit_threshold"]),
    "auto_depth": ({"exit_layer": "auto"}, ['exit_layer="auto"', "removed", "exit_threshold", "exit_layer=[...]"]),
    "depth_0": ({"exit_layer": [0, 1]}, ["exit_layer", "1 to 4", "0"]),
    "depth_too_large": ({"exit_layer": [5, 1]}, ["exit_layer", "1 to 4", "5"]),
    "depths_empty": ({"exit_layer": []}, ["exit_layer", "[]", "1 to 4", "list"]),
    "depth_text": ({"exit_layer": ["a", 1]}, ["exit_layer", "'a'", "1 to 4"]),
    "depth_float": ({"exit_layer": [2.0, 1]}, ["exit_layer", "2.0", "1 to 4"]),
    "depth_bool": ({"exit_layer": [True, 1]}, ["exit_layer", "True", "1 to 4"]),
    "depth_none": ({"exit_layer": [None, 1]}, ["exit_layer", "None", "1 to 4"]),
    "depth_word": ({"exit_layer": "deep"}, ["exit_layer", "'deep'", "1 to 4", "list"]),
    "depth_single_float": ({"exit_layer": 2.0}, ["exit_layer", "2.0", "1 to 4", "list"]),
    "depths_too_few": ({"exit_layer": [2]}, ["exit_layer", "[2]", "2 rows"]),
    "depths_too_many": ({"exit_layer": [2, 1, 4]}, ["exit_layer", "[2, 1, 4]", "2 rows"]),
    "depths_as_many_as_sequences": (
        {"exit_layer": [2, 1, 4, 4], "do_sample": True, "num_return_sequences": 2},
        ["exit_layer", "[2, 1, 4, 4]", "2 rows"],
    ),
}


def assert_refused(model, asked, words):
    """A `ValueError` that says all of `words`, before any layer runs."""
    work = record_work(model)
    before = dict(vars(model.generation_config))
    with pytest.raises(ValueError) as error:
        model.generate(**prompts((5, 3)), max_new_tokens=4, **asked)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in {error.value}"
    assert not work
    assert vars(model.generation_config) == before


@pytest.mark.parametrize("case", ERRORS)
def test_values_that_are_refused(case):
    assert_refused(tiny_sorted(), *ERRORS[case])


@pytest.mark.parametrize("exits", [None, [4]])
def test_a_model_without_exits(exits):
    asked = {"exit_threshold": 0.5}
    assert_refused(tiny_sorted(exit_layers=exits), asked, ["exit_threshold=0.5", "config.exit_layers", str(exits)])


MODE_CALLS = {
    "exit_threshold=0.5": {"exit_threshold": 0.5},
    "exit_layer=[1, 2]": {"exit_layer": [1, 2]},
}


@pytest.mark.parametrize("call", MODE_CALLS)
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"num_beams": 2}, ["num_beams=2", "greedy", "sampling"]),
        ({"num_beams": 2, "do_sample": True}, ["num_beams=2", "greedy", "sampling"]),
        ({"prompt_lookup_num_tokens": 3}, ["prompt_lookup_num_tokens=3", "greedy", "sampling"]),
        ({"use_cache": False}, ["use_cache=False"]),
        ({"output_attentions": True, "return_dict_in_generate": True}, ["output_attentions"]),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, ["hidden states"]),
        ({"cache_implementation": "quantized"}, ["cache_implementation", "quantized", "dynamic"]),
        ({"cache_implementation": "offloaded"}, ["cache_implementation", "offloaded", "dynamic"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_company_that_is_refused(asked, words, call):
    assert_refused(tiny_sorted(), {**MODE_CALLS[call], **asked}, [call, *words])


@pytest.mark.parametrize("call", MODE_CALLS)
def test_an_assistant_model_is_refused(call):
    """Drafting by another model and moving depth are two ways of decoding: not silently one of them."""
    asked = {**MODE_CALLS[call], "assistant_model": tiny_sorted(1)}
    if call == "exit_layer=[1, 2]":
        asked["exit_layer"] = [1]
    model = tiny_sorted()
    work = record_work(model)
    with pytest.raises(ValueError, match="assistant_model|assisted"):
        model.generate(**prompts((5,)), max_new_tokens=4, **asked)
    assert not work


@pytest.mark.parametrize("call", MODE_CALLS)
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_another_cache_is_refused(name, call):
    model = tiny_sorted()
    assert_refused(
        model, {**MODE_CALLS[call], name: DynamicCache(config=model.config)}, ["DynamicCache", "SortedCache"]
    )


# Criteria and processors that look at the text or at the row


def test_stopping_criteria_of_the_user():
    """Each row ends where its own text says so."""

    class Sevens(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -2:].sum(1) % 5 == 0

    model, inputs = cached_model(), prompts((6, 3, 5), seed=6)
    rows = rows_of(inputs)
    thresholds = thresholds_at(model, rows, {1: 0.6, 2: 0.5})
    how = {"stop": lambda ids: sum(ids[-2:]) % 5 == 0, "new_tokens": 12}
    runs = [naive(model, row, reaching(thresholds), **how) for row in rows]
    assert len({len(run.tokens) for run in runs}) == 3 and not undecided(runs, thresholds)
    options = {"stopping_criteria": StoppingCriteriaList([Sevens()]), "max_new_tokens": 12}
    output = generate(model, **inputs, exit_threshold=list(thresholds.values()), **options)
    assert_as_the_runs(output, inputs, runs)
    depths = [2, 4, 1]
    runs = [naive(model, row, following([k] * 12), **how) for row, k in zip(rows, depths, strict=True)]
    output = generate(model, **inputs, exit_layer=depths, **options)
    assert_as_the_runs(output, inputs, runs, check_confidences=False)


class RowLimits(StoppingCriteria):
    """Another length for each row of the batch: transformers always calls with all of them."""

    def __init__(self, limits):
        self.limits = torch.tensor(limits)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.limits


@pytest.mark.parametrize("asked", [{"exit_threshold": 2.0}, {"exit_layer": [4, 4, 4]}], ids=["threshold", "list"])
def test_a_criterion_that_depends_on_the_row(asked):
    model, inputs = cached_model(), prompts((6, 3, 5), seed=6)
    options = {"stopping_criteria": StoppingCriteriaList([RowLimits([9, 12, 10])]), "max_new_tokens": 12}
    expected = generate(reference_llama(model, 4), **inputs, **options).sequences
    assert (expected[:, 6:] != 0).sum(1).tolist() == [3, 6, 4]
    assert torch.equal(generate(model, **inputs, **asked, **options).sequences, expected)


@pytest.mark.parametrize("asked", [{"exit_threshold": 2.0}, {"exit_layer": [4, 4, 4]}], ids=["threshold", "list"])
def test_rows_without_an_end_token(asked):
    """Without an end token rows go on until all are done, as in transformers."""
    model, inputs = tiny_sorted(eos_token_id=None), prompts((6, 3, 5), seed=6)
    options = {"stopping_criteria": StoppingCriteriaList([RowLimits([9, 12, 10])]), "max_new_tokens": 12}
    expected = generate(reference_llama(model, 4), **inputs, **options).sequences
    assert expected.shape[1] == 12
    output = generate(model, **inputs, **asked, **options)
    assert torch.equal(output.sequences, expected)
    assert output.exit_layers_used.tolist() == [[4] * 6] * 3


def test_stop_strings():
    model, tokenizer = cached_model(), tiny_tokenizer()
    letters = tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    others = [token for token in range(259) if token not in letters]
    texts = ["hello", "you", "dear reader"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    rows, how = rows_of(inputs), {"processors": [SuppressTokensLogitsProcessor(others)], "new_tokens": 14, "eos": ()}
    thresholds = thresholds_at(model, rows, {1: 0.6, 2: 0.5}, **how)
    free = [tokenizer.decode(naive(model, row, reaching(thresholds), **how).tokens) for row in rows]
    strings = [free[0][3:5], free[1][6:9]]
    runs = [
        naive(model, row, reaching(thresholds), stop=lambda ids: tokenizer.decode(ids).endswith(tuple(strings)), **how)
        for row in rows
    ]
    assert len(runs[0].tokens) < len(runs[1].tokens) < 14 and not undecided(runs, thresholds)
    assert {k for run in runs for k in run.depths} == set(EXITS)
    output = generate(
        model,
        **inputs,
        exit_threshold=list(thresholds.values()),
        stop_strings=strings,
        tokenizer=tokenizer,
        suppress_tokens=others,
        max_new_tokens=14,
    )
    assert_as_the_runs(output, inputs, runs)


@pytest.mark.parametrize("mode", ["threshold", "list"])
def test_allowed_tokens_that_depend_on_the_row(mode):
    """Rows that decide at another exit than their neighbours, or go on after them, keep their own constraint."""

    def allowed(row, ids):
        return [token for token in range(3, 259) if token % 3 == row and token != int(ids[-1])]

    model, inputs = cached_model(), prompts((6, 3, 5), seed=6)
    rows = rows_of(inputs)
    constraints = [[PrefixConstrainedLogitsProcessor(lambda _, ids, r=r: allowed(r, ids), 1)] for r in range(3)]
    thresholds = thresholds_at(model, [rows[1]], {1: 0.7, 2: 0.2}, processors=constraints[1])
    if mode == "threshold":
        asked, rules = {"exit_threshold": list(thresholds.values())}, [reaching(thresholds)] * 3
    else:
        asked, rules = {"exit_layer": [2, 4, 1]}, [following([k] * 9) for k in (2, 4, 1)]
    pairs = list(zip(rows, rules, constraints, strict=True))
    free = [naive(model, row, rule, processors=p, new_tokens=9) for row, rule, p in pairs]
    eos = [end_token(free[0], 2), end_token(free[2], 5)]
    runs = [naive(model, row, rule, processors=p, new_tokens=9, eos=eos) for row, rule, p in pairs]
    assert len({len(run.tokens) for run in runs}) == 3 and not undecided(runs, thresholds)
    assert {k for run in runs for k in run.depths} == set(EXITS)
    options = {"prefix_allowed_tokens_fn": allowed, "eos_token_id": eos, "max_new_tokens": 9}
    output = generate(model, **inputs, **asked, **options)
    assert_as_the_runs(output, inputs, runs, check_confidences=mode == "threshold")


class RowBan(LogitsProcessor):
    """Bans other tokens in each row of the batch: transformers always calls with all of them."""

    def __init__(self, rows):
        self.banned = torch.tensor([[token % 3 == row for token in range(259)] for row in rows])

    def __call__(self, input_ids, scores):
        return scores.masked_fill(self.banned, -math.inf)


@pytest.mark.parametrize("mode", ["threshold", "list"])
@pytest.mark.parametrize("kind", ["own", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty"])
def test_processors_that_depend_on_the_row(kind, mode):
    """A processor with something for each row of the batch (here also transformers' own, with the prompts)."""
    model, inputs = cached_model(), prompts((5, 5, 5), seed=6)
    rows = rows_of(inputs)
    # alone in a batch of one, the row's own part
    if kind == "own":
        arguments = [{"logits_processor": LogitsProcessorList([RowBan([row])])} for row in range(3)]
        together = {"logits_processor": LogitsProcessorList([RowBan(range(3))])}
    else:
        together = {kind: 1 if kind == "encoder_no_repeat_ngram_size" else 0.2}
        arguments = [together] * 3
    options = {"max_new_tokens": 10, "eos_token_id": list(range(3, 60))}
    asked = [{"exit_threshold": 0.15}] * 3
    if mode == "list":
        asked = [{"exit_layer": [depth]} for depth in (2, 4, 1)]
    alone = [
        generate(model, input_ids=torch.tensor([row]), **options, **own, **mine)
        for row, own, mine in zip(rows, arguments, asked, strict=True)
    ]
    lengths = [single.exit_layers_used.shape[1] for single in alone]
    assert len(set(lengths)) > 1
    asked = {"exit_threshold": 0.15} if mode == "threshold" else {"exit_layer": [2, 4, 1]}
    output = generate(model, **inputs, **options, **together, **asked)
    expected = [single.sequences[0, 5:].tolist() for single in alone]
    assert output.sequences[:, 5:].tolist() == padded(expected, max(lengths))
    depths = [single.exit_layers_used[0].tolist() for single in alone]
    assert output.exit_layers_used.tolist() == padded(depths, max(lengths))
