"""`generate(assistant_early_exit=k)`: a shallow exit drafts, the layers above verify, and nobody can tell."""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sorted_llama.modeling_sorted_llama import drafting_sorted_llama
from sorted_llama.modeling_sorted_llama.compat_sorted_llama import CACHE_NAME
from sorted_llama.modeling_sorted_llama.drafting_sorted_llama import LearnedDrafts, accept_sampled
from tests.modeling_sorted_llama.decoding import (
    MODELS,
    RETURN,
    ends,
    layer_calls,
    quiet,
    row_lengths,
)
from tests.tiny import Pieces, prompts, reference_llama, tiny_sorted, tiny_tokenizer


# Greedy decoding: token for token what full depth generates


LENGTHS = {
    "one": {"num_assistant_tokens": 1},
    "five": {"num_assistant_tokens": 5},
    "auto": {"num_assistant_tokens": "auto"},
    "default": {"num_assistant_tokens_schedule": "constant"},
    "confident": {"num_assistant_tokens": 6, "assistant_confidence_threshold": 0.6},
    "confident_auto": {"assistant_confidence_threshold": 0.3},
}


@pytest.fixture
def even_clock(monkeypatch):
    """Every cycle takes as long as any other: drafting pays, whatever else the machine does."""
    monkeypatch.setattr(drafting_sorted_llama, "time", SimpleNamespace(perf_counter=itertools.count().__next__))


@functools.cache
def greedy_runs(kind):
    """Arguments of one row and of a left-padded batch, without end tokens and with, and full depth's tokens."""
    reference, runs = reference_llama(MODELS[kind](), 4), []
    for inputs in (prompts((6,)), prompts()):
        for eos in ([], ends(reference, inputs)):
            arguments = {**inputs, "max_new_tokens": 17, "eos_token_id": eos}
            runs.append((arguments, reference.generate(**arguments)))
    return runs


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_tokens_are_full_depths(length, kind):
    """
    One row, a left-padded batch, and both with rows that end at different times: each drafted by two exits of four,
    so that over all cases every exit drafts with every length, every model and every batch.
    """
    model, drafts = MODELS[kind](), [1, 2, 3, "auto"]
    turn = list(LENGTHS).index(length) + list(MODELS).index(kind)
    for number, (arguments, expected) in enumerate(greedy_runs(kind)):
        for draft in {drafts[(turn + number) % 4], drafts[(turn + 2 * number + 1) % 4]}:
            output = model.generate(**arguments, assistant_early_exit=draft, **LENGTHS[length], **RETURN)
            assert torch.equal(output.sequences, expected), (draft, arguments["eos_token_id"])
            if "num_assistant_tokens" in LENGTHS[length] and "auto" not in length:
                assert output.draft_statistics.drafted > 0


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_greedy_tokens_of_any_model(data):
    layers = data.draw(st.integers(2, 5), "layers")
    model = tiny_sorted(
        seed=data.draw(st.integers(0, 99), "seed"),
        exit_layers=None,
        num_hidden_layers=layers,
        attn_implementation=data.draw(st.sampled_from(["eager", "sdpa"]), "attention"),
    )
    quiet(model, data.draw(st.integers(1, layers), "loud layers"), data.draw(st.sampled_from([0.0, 0.1]), "scale"))
    inputs = prompts(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4), "lengths"))
    depth = data.draw(st.integers(2, layers), "verifying depth")
    reference = reference_llama(model, depth)
    steps = data.draw(st.lists(st.integers(0, 12), max_size=4), "ends")
    eos = ends(reference, inputs, steps) if steps else []
    arguments = {**inputs, "max_new_tokens": data.draw(st.integers(1, 16), "new tokens"), "eos_token_id": eos}
    tokens = model.generate(
        **arguments,
        exit_layer=None if depth == layers else depth,
        assistant_early_exit=data.draw(st.integers(1, depth - 1), "draft exit"),
        num_assistant_tokens=data.draw(st.sampled_from([1, 2, 3, 7, "auto"]), "length"),
    )
    assert torch.equal(tokens, reference.generate(**arguments))


@pytest.mark.parametrize(
    "draft, source",
    [
        *((draft, "argument") for draft in (1, 2)),
        *(("auto", source) for source in ("argument", "generation_config", "given_generation_config", "config")),
    ],
)
def test_drafts_are_verified_at_a_depth_below_full(draft, source):
    fields = {"exit_layer": 3} if source == "config" else {}
    model = quiet(tiny_sorted(exit_layers=[1, 2, 3, 4], **fields), 2)
    arguments = {**prompts(), "max_new_tokens": 20}
    expected = reference_llama(model, 3).generate(**arguments)
    assert not torch.equal(expected, reference_llama(model, 4).generate(**arguments))
    if source == "argument":
        arguments["exit_layer"] = 3
    elif source == "generation_config":
        model.generation_config.exit_layer = 3
    elif source == "given_generation_config":
        given = GenerationConfig(exit_layer=3, max_new_tokens=20, eos_token_id=2, pad_token_id=0)
        arguments = {**prompts(), "generation_config": given}
    calls = layer_calls(model)
    output = model.generate(**arguments, assistant_early_exit=draft, num_assistant_tokens=3, **RETURN)
    assert torch.equal(output.sequences, expected)
    assert {layer for layer, _ in calls} == {1, 2, 3}
    assert set(output.exit_layers_used.unique().tolist()) <= {0, 1, 2, 3}


@pytest.mark.parametrize("draft", [1, 2, 3, "auto"])
def test_drafting_with_a_model_without_exits(even_clock, draft):
    model = quiet(tiny_sorted(exit_layers=None), 1, 0.0)
    arguments = {**prompts(), "max_new_tokens": 64}
    output = model.generate(**arguments, assistant_early_exit=draft, **RETURN)
    assert torch.equal(output.sequences, reference_llama(model, 4).generate(**arguments))
    assert output.draft_statistics.drafted > 0


# Processors and criteria, a row each


def only_of_the_row(row, ids):
    """Allows other tokens in every row, and after every length."""
    return [token for token in range(3, 259) if token % 3 == row and token % 5 != len(ids) % 5]


class NoNeighbours(LogitsProcessor):
    """Forbids the two newest tokens and those beside them."""

    def __call__(self, input_ids, scores):
        for shift in (-1, 0, 1):
            scores = scores.scatter(1, (input_ids[:, -2:] + shift).clamp(0, 258), -torch.inf)
        return scores


class Divisible(StoppingCriteria):
    """Ends a row where the sum of its tokens is divisible by 7."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids.sum(1) % 7 == 0) & (input_ids.shape[1] > 9)


PROCESSORS = {
    "repetition_penalty": lambda: {"repetition_penalty": 1.7},
    "no_repeat_ngram": lambda: {"no_repeat_ngram_size": 1},
    "encoder_repetition_penalty": lambda: {"encoder_repetition_penalty": 1.5},
    "encoder_no_repeat_ngram": lambda: {"encoder_no_repeat_ngram_size": 1},
    "forced_eos": lambda: {"forced_eos_token_id": 9},
    "suppress_tokens": lambda: {"suppress_tokens": list(range(3, 200))},
    "begin_suppress_tokens": lambda: {"begin_suppress_tokens": list(range(3, 259, 2))},
    "sequence_bias": lambda: {"sequence_bias": [[[5], 4.0], [[5, 6], 4.0]]},
    "exponential_decay": lambda: {"exponential_decay_length_penalty": (4, 1.5)},
    "prefix_allowed": lambda: {"prefix_allowed_tokens_fn": only_of_the_row},
    "user_processor": lambda: {"logits_processor": LogitsProcessorList([NoNeighbours()])},
    "user_criterion": lambda: {"stopping_criteria": StoppingCriteriaList([Divisible()])},
    "max_time": lambda: {"max_time": 1000.0},
}


@functools.cache
def without_processors():
    """Arguments, and full depth's tokens: a batch whose rows accept unequally, one that repeats itself, one row."""
    reference, repeating = reference_llama(MODELS["mixed"](), 4), prompts((4, 4), seed=1)["input_ids"].repeat(1, 4)
    batches = (prompts(), {"input_ids": repeating, "attention_mask": torch.ones_like(repeating)}, prompts((5,)))
    arguments = [{**inputs, "max_new_tokens": 16} for inputs in batches]
    return [(of_batch, reference.generate(**of_batch)) for of_batch in arguments]


@pytest.mark.parametrize("name", PROCESSORS)
def test_drafting_with_processors_and_criteria(name):
    """They are called for blocks of which all is kept, a part, or nothing."""
    model, changed, kept = MODELS["mixed"](), False, []
    reference = reference_llama(model, 4)
    for arguments, plain in without_processors():
        expected = reference.generate(**arguments, **PROCESSORS[name]())
        drafting = {"assistant_early_exit": 1, "num_assistant_tokens": 3, **RETURN}
        output = model.generate(**arguments, **PROCESSORS[name](), **drafting)
        assert torch.equal(output.sequences, expected)
        changed = changed or plain.shape != expected.shape or not torch.equal(plain, expected)
        kept.append((output.draft_statistics.accepted, output.draft_statistics.drafted))
    assert 0 < sum(accepted for accepted, _ in kept) < sum(drafted for _, drafted in kept)
    if name not in ("max_time", "encoder_no_repeat_ngram"):
        assert changed, "a processor that does nothing here shows nothing"


def test_processors_read_the_drafts_before():
    """The exit is full depth's equal: each draft that is processed as full depth's tokens are is accepted."""
    arguments = {**prompts((6,)), "max_new_tokens": 17, "eos_token_id": [], "no_repeat_ngram_size": 1, **RETURN}
    output = MODELS["accepting"]().generate(**arguments, assistant_early_exit=1, num_assistant_tokens=3)
    assert output.draft_statistics.accepted == output.draft_statistics.drafted == 12


@pytest.mark.parametrize("kind", MODELS)
def test_drafting_with_bad_words_and_min_new_tokens(kind):
    """Where full depth would take the token: a word of one token, one of two, and an end that comes too early."""
    model, inputs = MODELS[kind](), prompts()
    reference = reference_llama(model, 4)
    free = reference.generate(**inputs, max_new_tokens=16, eos_token_id=[])[:, 6:].tolist()
    eos = ends(reference, inputs, (2, 3, 5))
    for tools in (
        {"bad_words_ids": [[free[0][3]], free[1][5:7]], "eos_token_id": []},
        {"eos_token_id": eos, "min_new_tokens": 8},
    ):
        arguments = {**inputs, **tools, "max_new_tokens": 16}
        expected = reference.generate(**arguments)
        assert expected[:, 6:].tolist() != free
        tokens = model.generate(**arguments, assistant_early_exit=1, num_assistant_tokens=4)
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("kind", ["mixed", "accepting"])
def test_drafting_with_a_criterion_that_reads_the_scores(kind):
    """It is handed the scores up to its token, and no further."""

    class Scores(StoppingCriteria):
        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores, **kwargs):
            self.seen.append((input_ids.shape[1], len(scores), int(scores[-1].argmax(-1)[0])))
            return torch.tensor([len(scores) >= 11])

    model, mine, theirs = MODELS[kind](), Scores(), Scores()
    arguments = {**prompts((5,)), "max_new_tokens": 16, "output_scores": True, **RETURN}
    expected = reference_llama(model, 4).generate(**arguments, stopping_criteria=[theirs])
    output = model.generate(**arguments, stopping_criteria=[mine], assistant_early_exit=1, num_assistant_tokens=3)
    assert mine.seen == theirs.seen
    assert torch.equal(output.sequences, expected.sequences) and len(output.scores) == len(expected.scores) == 11


@pytest.mark.parametrize("eos", [2, None])
def test_drafting_with_stop_strings(eos):
    """Without an end token a finished row goes on until all are done, as in transformers."""
    model, tokenizer, inputs = MODELS["mixed"](eos_token_id=eos), tiny_tokenizer(), prompts()
    reference = reference_llama(model, 4)
    texts = [tokenizer.decode([token]) for token in range(259)]
    arguments = {**inputs, "max_new_tokens": 40}
    arguments["suppress_tokens"] = [i for i in range(3, 259) if not (texts[i].isascii() and texts[i].isprintable())]
    free = reference.generate(**arguments)[:, 6:].tolist()
    strings = [texts[row[after]] for row, after in zip(free, (4, 8, 13), strict=True)]
    arguments |= {"stop_strings": strings, "tokenizer": tokenizer}
    expected = reference.generate(**arguments)
    assert expected.shape[1] < 46
    mine, theirs = Pieces(), Pieces()
    for length in (1, 4, "auto"):
        output = model.generate(**arguments, assistant_early_exit=1, num_assistant_tokens=length, **RETURN)
        assert torch.equal(output.sequences, expected)
        assert output[CACHE_NAME].lengths == (expected.shape[1] - 1,) * 3
    model.generate(**arguments, assistant_early_exit=1, num_assistant_tokens=3, streamer=mine)
    reference.generate(**arguments, streamer=theirs)
    assert mine.pieces == theirs.pieces and mine.ended == 1


@pytest.mark.parametrize("length", [3, "auto"])
def test_drafting_with_a_max_time_that_is_over(length):
    model, arguments = tiny_sorted(), {**prompts(), "max_new_tokens": 30, "max_time": 0.0}
    tokens = model.generate(**arguments, assistant_early_exit=1, num_assistant_tokens=length)
    assert torch.equal(tokens, reference_llama(model, 4).generate(**arguments))


@pytest.mark.parametrize("new_tokens", range(1, 9))
def test_rows_end_inside_a_block_of_drafts(new_tokens):
    """Every place in a block of accepted drafts: an end token there, and the last of the tokens that fit."""
    model, inputs = MODELS["accepting"](), prompts((6, 3))
    reference = reference_llama(model, 4)
    drafting = {"assistant_early_exit": 1, "num_assistant_tokens": 5, **RETURN}
    output = model.generate(**inputs, max_new_tokens=new_tokens, eos_token_id=[], **drafting)
    assert torch.equal(output.sequences, reference.generate(**inputs, max_new_tokens=new_tokens, eos_token_id=[]))
    assert output.draft_statistics.accepted == output.draft_statistics.drafted
    assert output.sequences.shape[1] == 6 + new_tokens
    eos = ends(reference, inputs, (new_tokens - 1,))
    output = model.generate(**inputs, max_new_tokens=14, eos_token_id=eos, **drafting)
    assert torch.equal(output.sequences, reference.generate(**inputs, max_new_tokens=14, eos_token_id=eos))
    assert output.draft_statistics.new_tokens == sum(row_lengths(output.sequences, 6, eos))


# Sampling: the same distribution


def small_model(seed=3):
    """12 tokens, and upper layers that say something else than the lowest one, but not always."""
    fields = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 32, "initializer_range": 0.25}
    fields |= {"num_hidden_layers": 3, "num_key_value_heads": 1, "eos_token_id": None}
    return quiet(tiny_sorted(seed, exit_layers=[1, 2, 3], **fields), 1, 0.7)


def exact_distribution(reference, prompt, new_tokens, **tools) -> torch.Tensor:
    """Probability of every sequence of `new_tokens` tokens, by the reference's processed scores."""
    vocab_size = reference.config.vocab_size
    probabilities, prefixes = torch.ones(1, dtype=torch.float64), prompt
    for _ in range(new_tokens):
        arguments = {**RETURN, "output_scores": True, "do_sample": True, "max_new_tokens": 1}
        mask = torch.ones_like(prefixes)
        scores = reference.generate(prefixes, attention_mask=mask, **arguments, **tools).scores[0]
        probabilities = (probabilities[:, None] * scores.double().softmax(-1)).flatten()
        tokens = torch.arange(vocab_size).repeat(len(prefixes))[:, None]
        prefixes = torch.cat([prefixes.repeat_interleave(vocab_size, dim=0), tokens], dim=1)
    return probabilities


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Of a chi-square test; cells that expect less than 5 are put together."""
    assert not counts[probabilities == 0].any(), "a sequence that plain decoding never gives"
    expected = probabilities * counts.sum()
    large = expected >= 5
    counts = torch.cat([counts[large].double(), counts[~large].sum()[None].double()])
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    counts, expected = counts[expected > 1], expected[expected > 1]
    assert len(counts) > 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


def draws(model, prompt, new_tokens, number=10_000, **arguments):
    """How often each sequence is drawn, and the statistics of the last of four calls."""
    vocab_size = model.config.vocab_size
    counts = torch.zeros(vocab_size**new_tokens, dtype=torch.long)
    arguments |= {"do_sample": True, "max_new_tokens": new_tokens, "attention_mask": torch.ones_like(prompt), **RETURN}
    for _ in range(4):
        output = model.generate(prompt, num_return_sequences=number // 4, **arguments)
        index = torch.zeros(number // 4, dtype=torch.long)
        for token in output.sequences[:, prompt.shape[1] :].T:
            index = index * vocab_size + token
        counts += torch.bincount(index, minlength=len(counts))
    return counts, output.draft_statistics


WARPERS = {
    "plain": {"top_k": 0},
    "top_p": {"top_k": 0, "temperature": 0.8, "top_p": 0.8},
    "repetition_penalty": {"top_k": 0, "repetition_penalty": 2.5},
}


@pytest.mark.parametrize("name", WARPERS)
def test_sampled_tokens_have_the_distribution_of_full_depth(name):
    model, prompt = small_model(), torch.tensor([[3, 7, 5, 3, 7]])
    torch.manual_seed(11)
    counts, statistics = draws(model, prompt, 3, **WARPERS[name], assistant_early_exit=1, num_assistant_tokens=2)
    assert 0.2 < statistics.acceptance_rate < 0.95
    assert p_value(counts, exact_distribution(reference_llama(model, 3), prompt, 3, **WARPERS[name])) > 1e-4


DRAFTINGS = {
    "fixed": {"num_assistant_tokens": 3},
    "confident": {"num_assistant_tokens": 3, "assistant_confidence_threshold": 0.3},
}


def test_sampled_tokens_have_the_distribution_of_full_depth_with_longer_drafts():
    """Four tokens: the first, then up to two drafts, and those after them."""
    model, prompt = small_model(), torch.tensor([[8, 3, 7, 5, 3, 7]])
    expected = exact_distribution(reference_llama(model, 3), prompt, 4, top_k=4)
    for name, drafting in DRAFTINGS.items():
        torch.manual_seed(12)
        counts, _ = draws(model, prompt, 4, top_k=4, assistant_early_exit=2, **drafting)
        assert p_value(counts, expected) > 1e-4, name


def accept(p, q, drafts):
    """`accept_sampled` of one pair of distributions in many rows: numbers accepted, and next tokens."""
    number = len(drafts)
    return accept_sampled(p.log().expand(number, *p.shape), drafts, q.expand(number, *q.shape))


def assert_drawn(tokens, probabilities):
    assert p_value(torch.bincount(tokens, minlength=len(probabilities)), probabilities.double()) > 1e-4


def test_disjoint_distributions_accept_nothing():
    """Nothing that the draft proposes is possible: all is rejected, and the next token is the target's."""
    torch.manual_seed(0)
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0, 0.0], [0.0, 0.0, 0.2, 0.2, 0.6]])
    q = torch.tensor([[0.0, 0.0, 0.0, 0.4, 0.6]])
    accepted, new = accept(p, q, torch.multinomial(q[0], 20_000, replacement=True)[:, None])
    assert not accepted.any()
    assert_drawn(new[:, 0], p[0])


def test_equal_distributions_accept_everything():
    """All is kept; the next token is that of the last position. Nothing is left of equal distributions: no NaN."""
    torch.manual_seed(0)
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.6, 0.2, 0.2]])
    drafts = torch.cat([torch.multinomial(row, 20_000, replacement=True)[:, None] for row in p[:2]], dim=1)
    # As computed from the same scores: rounding must not reject
    accepted, new = accept(p, p[:2].log().softmax(-1), drafts)
    assert (accepted == 2).all()
    assert_drawn(new[:, 0], p[2])
    # A draft that has no probability on either side is rejected with nothing left to draw from
    p, q = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
    accepted, new = accept(p, q, torch.ones(100, 1, dtype=torch.long))
    assert not accepted.any() and not new.any()


@pytest.mark.parametrize("one_hot", [True, False])
def test_overlapping_distributions_accept_their_overlap(one_hot):
    """The tokens of two positions together are distributed as by the target, also of drafts that are certain."""
    torch.manual_seed(0)
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.1, 0.5, 0.3], [0.25, 0.25, 0.25, 0.25]])
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    if one_hot:
        q = torch.nn.functional.one_hot(torch.tensor([0, 2]), 4).float()
    drafts = torch.cat([torch.multinomial(row, 40_000, replacement=True)[:, None] for row in q], dim=1)
    accepted, new = accept(p, q, drafts)
    first = torch.where(accepted > 0, drafts[:, 0], new[:, 0])
    assert_drawn(first, p[0])
    reached = accepted > 0
    assert_drawn(torch.where(accepted > 1, drafts[:, 1], new[:, 0])[reached], p[1])
    assert_drawn(new[accepted == 2, 0], p[2])
    overlap = torch.minimum(p[:2], q).sum(-1)
    assert reached.float().mean() == pytest.approx(overlap[0].item(), abs=0.02)
    assert (accepted == 2).float().mean() == pytest.approx(overlap.prod().item(), abs=0.02)


# Accounting


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("draft", [1, 2, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_drafting_runs_no_layer_twice(kind, draft, sample):
    """
    A cycle of n drafts: n + 1 tokens through the draft's layers, one at a time, and the same n + 1 through the others,
    at once; the head n times for drafts and n + 1 times for what is verified.
    """
    model, length = MODELS[kind](), 4
    calls, heads = layer_calls(model), []
    model.lm_head.register_forward_pre_hook(lambda _, args: heads.append(args[0].shape[:-1].numel()))
    output = model.generate(
        **prompts((6,)),
        **RETURN,
        assistant_early_exit=draft,
        num_assistant_tokens=length,
        max_new_tokens=23,
        min_new_tokens=23,
        do_sample=sample,
    )
    statistics = output.draft_statistics
    assert calls[:4] == [(layer, 6) for layer in (1, 2, 3, 4)]
    verified = [tokens for layer, tokens in calls[4:] if layer == 4]  # n + 1, cycle by cycle
    expected_calls = []
    for tokens in verified:
        expected_calls += [(layer, 1) for layer in range(1, draft + 1)] * tokens
        expected_calls += [(layer, tokens) for layer in range(draft + 1, 5)]
    assert calls[4:] == expected_calls
    assert verified[0] == length + 1 and set(verified[:-4]) <= {length + 1}
    expected_heads = [1]
    for tokens in verified:
        expected_heads += [1] * (tokens - 1) + [tokens]
    assert heads == expected_heads

    assert statistics.layer_token_passes == sum(tokens for _, tokens in calls)
    assert statistics.layer_token_passes == 4 * 6 + sum(verified) * draft + sum(verified) * (4 - draft)
    assert statistics.cycles == 1 + len(verified)
    assert statistics.drafted == sum(verified) - len(verified) == statistics.exit_layers[draft]
    assert statistics.new_tokens == 23 == statistics.accepted + statistics.cycles
    assert statistics.accepted == (output.exit_layers_used == draft).sum()
    assert statistics.acceptance_rate == statistics.accepted / statistics.drafted
    if not sample:
        assert {"rejecting": 0.0, "mixed": 0.2, "accepting": 1.0}[kind] <= statistics.acceptance_rate


def test_the_config_stays_as_it_is():
    """Also while it runs, and after an exception in the middle, which leaves nothing behind."""
    model, arguments = MODELS["mixed"](), {**prompts(), "max_new_tokens": 12}
    expected = reference_llama(model, 4).generate(**arguments)
    before, seen = model.config.to_dict(), []

    def fail_at(number):
        def look(*_):
            seen.append((model.config.num_hidden_layers, len(model.model.layers)))
            if len(seen) == number:
                raise RuntimeError("in the middle")

        return look

    for layer, number in ((0, 9), (3, 3), (1, 4)):
        seen.clear()
        hook = model.model.layers[layer].register_forward_pre_hook(fail_at(number))
        with pytest.raises(RuntimeError, match="in the middle"):
            model.generate(**arguments, assistant_early_exit=1, num_assistant_tokens=3)
        hook.remove()
        assert set(seen) == {(4, 4)}
        assert model.config.to_dict() == before
        assert torch.equal(model.generate(**arguments, assistant_early_exit=1, num_assistant_tokens=3), expected)
        assert torch.equal(model.generate(**arguments), expected)
    assert model.config.to_dict() == before


# Batches


def test_rows_of_drafts_advance_on_their_own():
    """Row 0 has its drafts accepted early on, row 1 later: neither waits for the other."""
    model, new_tokens, width = tiny_sorted(), 24, 5

    def forced(row, ids):
        """One token only: drafts are then full depth's."""
        easy = (len(ids) - width < new_tokens // 2) == (row == 0)
        return [3 + len(ids) % 7] if easy else list(range(3, 259))

    inputs = prompts((width, width))
    arguments = {"max_new_tokens": new_tokens, "assistant_early_exit": 1, "num_assistant_tokens": 3, **RETURN}
    alone = [
        model.generate(
            **{name: value[row : row + 1] for name, value in inputs.items()},
            prefix_allowed_tokens_fn=lambda _, ids, row=row: forced(row, ids),
            **arguments,
        )
        for row in (0, 1)
    ]
    together = model.generate(**inputs, prefix_allowed_tokens_fn=forced, **arguments)
    assert torch.equal(together.sequences, torch.cat([output.sequences for output in alone]))
    cycles = [output.draft_statistics.cycles for output in alone]
    assert all(12 <= c <= 17 for c in cycles)  # half of the row in blocks of 4, half token by token
    # At the pace of the slower row, each half would take about 12
    assert together.draft_statistics.cycles <= max(cycles) + 1
    passes = [output.draft_statistics.layer_token_passes for output in alone]
    assert together.draft_statistics.layer_token_passes <= sum(passes) + 2 * 4 * 4  # the last blocks are cut alone


def test_a_drafting_row_that_has_ended_costs_nothing():
    model, inputs = MODELS["rejecting"](), prompts((6, 6))
    eos = ends(reference_llama(model, 4), inputs, (2,))
    calls = layer_calls(model)
    output = model.generate(
        **inputs, eos_token_id=eos, max_new_tokens=20, assistant_early_exit=1, num_assistant_tokens=2
    )
    lengths = row_lengths(output, 6, eos)
    assert lengths[0] == 3 and lengths[1] > 10
    verified = [tokens for layer, tokens in calls if layer == 4]
    assert verified[1] == 2 * 3 and verified[4:8] == [3] * 4


# The length that is learned


class Decoding:
    """Runs the policy through cycles whose times and acceptances are chosen."""

    def __init__(self, acceptance, cost, max_new_tokens=10_000, expected=None):
        """By exit: `acceptance` of each draft, `cost` of a draft in plain steps, and what it is `expected` to be."""
        self.acceptance, self.cost, self.seconds = acceptance, cost, 0.0
        self.random = torch.Generator().manual_seed(0)
        self.policy = LearnedDrafts(expected or cost, max_new_tokens)

    def run(self, cycles, room=1000) -> list[tuple[int, int]]:
        """Exit and number of drafts of every cycle."""
        asked = []
        for _ in range(cycles):
            exit_layer, n = self.policy.next(room)
            assert 0 <= n <= room
            asked.append((exit_layer, n))
            seconds = 1.0 + n * self.cost[exit_layer]
            hits = torch.rand(n, generator=self.random) < self.acceptance[exit_layer]
            self.policy.learn(exit_layer, n, [int(hits.long().cumprod(0).sum())], seconds)
            self.seconds += seconds
        return asked


def test_cheap_drafts_that_are_accepted_are_long():
    lengths = [n for _, n in Decoding({1: 0.95}, {1: 0.1}).run(200)]
    assert lengths[:2] == [0, 0]  # what a plain step takes
    assert sum(n >= 5 for n in lengths[20:]) > 0.9 * len(lengths[20:])


def test_the_draft_length_follows_acceptance():
    """Half accepted at a tenth of a step: best are 2 or 3."""
    lengths = [n for _, n in Decoding({1: 0.5}, {1: 0.1}).run(400)][100:]
    drafts = [n for n in lengths if n]
    assert len(drafts) > 0.8 * len(lengths) and 1.2 < sum(drafts) / len(drafts) < 4
    decoding = Decoding({1: 1.0}, {1: 0.1})
    before = [n for _, n in decoding.run(60)]
    decoding.acceptance = {1: 0.3}
    after = [n for _, n in decoding.run(60)]
    assert max(before[-20:]) == 8 and max(after[-20:]) <= 3


def test_accepted_drafts_that_cost_too_much_are_few():
    """A draft takes as long as a plain step, whatever was expected of it."""
    for expected in ({1: 1.0}, {1: 0.3}):
        lengths = [n for _, n in Decoding({1: 0.9}, {1: 1.0}, expected=expected).run(400)]
        assert sum(lengths[30:]) <= 8


def test_drafts_that_cost_less_than_expected_are_taken_up():
    lengths = [n for _, n in Decoding({1: 0.8}, {1: 0.1}, expected={1: 0.9}).run(200)]
    assert sum(n > 1 for n in lengths[-50:]) > 40


def test_one_late_cycle_changes_little():
    """Another process may have had the machine: times are medians, and the loss of a cycle is bounded."""
    decoding = Decoding({1: 1.0}, {1: 0.1}, max_new_tokens=64)
    decoding.run(4)
    decoding.cost = {1: 30.0}
    decoding.run(1)
    decoding.cost = {1: 0.1}
    assert min(n for _, n in decoding.run(5)) >= 4


def test_where_nothing_pays_it_tries_again_ever_more_rarely():
    """One draft after twice as many plain steps each time, up to a limit."""
    first, last = LearnedDrafts.FIRST_WAIT, LearnedDrafts.LAST_WAIT
    lengths = [n for _, n in Decoding({1: 0.0}, {1: 0.3}).run(2500)]
    tries = [step for step, n in enumerate(lengths) if n]
    assert all(lengths[step] == 1 for step in tries)
    waits = [b - a - 1 for a, b in zip(tries, tries[1:], strict=False)]
    doubling = [first * 2**i for i in range(20) if first * 2**i < last]
    assert waits == [*doubling, *[last] * (len(waits) - len(doubling))] and len(waits) > len(doubling) + 3


@pytest.mark.parametrize("expected", [0.5, 1, 2], ids="expected {} times the cost".format)
@pytest.mark.parametrize("cost", [0.1, 0.3, 0.8])
@pytest.mark.parametrize("max_new_tokens", [4, 16, 64, 256])
def test_it_is_never_more_than_5_percent_slower_than_plain_decoding(max_new_tokens, cost, expected):
    decoding = Decoding({1: 0.0}, {1: cost}, max_new_tokens, expected={1: expected * cost})
    lengths = [n for _, n in decoding.run(max_new_tokens - 1)]
    assert decoding.seconds <= 1.05 * max_new_tokens
    assert sum(lengths) > 0 or max_new_tokens <= 16  # and yet it tries where it can afford to


def test_what_drafts_have_brought_may_be_spent():
    """On a short answer one failed draft ends the drafting, unless accepted ones came before it."""
    failed = Decoding({1: 0.0}, {1: 0.3}, max_new_tokens=16)
    assert sum(n for _, n in failed.run(15)) == 1
    accepted = Decoding({1: 1.0}, {1: 0.3}, max_new_tokens=16)
    accepted.run(5)
    accepted.acceptance = {1: 0.0}
    assert sum(n for _, n in accepted.run(3)) > 1


def test_drafts_that_stop_being_accepted_stop_soon():
    decoding = Decoding({1: 1.0}, {1: 0.3})
    assert sum(n for _, n in decoding.run(50)) > 100
    decoding.acceptance = {1: 0.0}
    lengths = [n for _, n in decoding.run(200)]
    assert 0 < sum(lengths) < 200 and sum(lengths[50:]) < 10


def test_it_takes_up_drafting_again():
    decoding = Decoding({1: 0.0}, {1: 0.1})
    decoding.run(100)
    decoding.acceptance = {1: 1.0}
    lengths = [n for _, n in decoding.run(1500)]
    assert sorted(lengths[-100:])[10] >= 4


@pytest.mark.parametrize("room", [0, 1, 3])
def test_it_never_drafts_more_than_the_room(room):
    lengths = [n for _, n in Decoding({1: 1.0}, {1: 0.05}).run(100, room)]
    assert max(lengths) == room


def share_of(exit_layer: int, asked: list[tuple[int, int]]) -> float:
    """Of the cycles that draft, and they are most, those that draft at this exit."""
    drafting = [k for k, n in asked if n]
    assert len(drafting) > 0.7 * len(asked)
    return drafting.count(exit_layer) / len(drafting)


def test_the_exit_that_pays_most_drafts():
    """The deeper exit is accepted more often, and pays, until it is no longer accepted: then the other."""
    decoding = Decoding({1: 0.1, 2: 0.97}, {1: 0.1, 2: 0.12})
    assert share_of(2, decoding.run(200)[100:]) > 0.9
    decoding.acceptance = {1: 0.95, 2: 0.0}
    assert share_of(1, decoding.run(800)[-100:]) > 0.9


def test_every_exit_is_tried_again_where_nothing_pays():
    tried = Decoding({1: 0.0, 2: 0.0, 3: 0.0}, {1: 0.2, 2: 0.3, 3: 0.4}).run(500)
    assert {k for k, n in tried[20:] if n} == {1, 2, 3}


def test_auto_chooses_among_the_exits_in_generate(monkeypatch):
    """Of a model whose exit 2 is full depth's and whose exit 1 is not, exit 2 drafts."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(drafting_sorted_llama, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    model = quiet(tiny_sorted(), 2, 0.0)
    for number, layer in enumerate(model.model.layers, start=1):
        seconds = 0.01 if number == 1 else 0.3
        layer.register_forward_pre_hook(lambda *_, s=seconds: setattr(clock, "now", clock.now + s))
    output = model.generate(**prompts(), **RETURN, max_new_tokens=60, min_new_tokens=60, assistant_early_exit="auto")
    statistics = output.draft_statistics
    assert statistics.exit_layers[2] > 0.8 * statistics.drafted and statistics.cycles < 50
    assert torch.equal(
        output.sequences, reference_llama(model, 4).generate(**prompts(), max_new_tokens=60, min_new_tokens=60)
    )


def test_what_finding_a_draft_length_may_cost_counts_the_tokens_that_are_asked_for(monkeypatch):
    """From a text, from embeddings and in a second turn."""
    asked, made = [], LearnedDrafts.__init__

    def spy(self, costs, max_tokens):
        made(self, costs, max_tokens)
        asked.append(max_tokens)

    monkeypatch.setattr(LearnedDrafts, "__init__", spy)
    model, ids = tiny_sorted(eos_token_id=None), prompts((20,))["input_ids"]
    turn = model.generate(ids, exit_threshold=0.5, max_new_tokens=15, **RETURN)
    second = {"input_ids": torch.cat([turn.sequences, ids[:, :3]], dim=1), CACHE_NAME: turn[CACHE_NAME]}
    for inputs in ({"input_ids": ids}, {"inputs_embeds": model.model.embed_tokens(ids)}, second):
        model.generate(**inputs, max_new_tokens=50, assistant_early_exit=2)
    assert asked == [50, 50, 50]
