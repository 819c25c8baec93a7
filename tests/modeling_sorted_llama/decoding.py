"""What the tests of decoding share: a naive loop without a cache, and models whose drafts are accepted or not."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from packaging.version import Version

from sorted_llama import SortedLlamaForCausalLM
from tests.tiny import prompts, reference_llama, tiny_sorted


EXITS = [1, 2, 4]


MEASURES = ["max_prob", "margin", "entropy"]

# Before, `pipeline` handed on a part alone of what its constructor was given for `generate`
since_transformers_5_20 = pytest.mark.skipif(Version(transformers.__version__) < Version("5.20"), reason="dropped")


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


# Work


def record_work(model) -> list[tuple]:
    """From now on: `("layer", number, rows, tokens)` and `("head", rows)`, in the order of the calls."""
    work = []
    for number, layer in enumerate(model.model.layers, start=1):
        layer.register_forward_pre_hook(lambda _, args, n=number: work.append(("layer", n, *args[0].shape[:2])))
    model.lm_head.register_forward_pre_hook(lambda _, args: work.append(("head", args[0].shape[:-1].numel())))
    return work


# `exit_layer=[...]`


def alone(model, row, depth, **arguments) -> list[int]:
    """What the sub-model of `depth` layers generates for one row: transformers' own Llama."""
    output = generate(reference_llama(model, depth), input_ids=torch.tensor([row]), **arguments)
    return output.sequences[0, len(row) :].tolist()


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


# Drafting


RETURN = {"return_dict_in_generate": True}


def quiet(model, layers: int, scale: float = 0.1):
    """`model`, its layers above the first `layers` adding little: their drafts are often accepted."""
    with torch.no_grad():
        for layer in model.model.layers[layers:]:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return model


# Almost no draft accepted, about two of three, all


MODELS = {
    "rejecting": tiny_sorted,
    "mixed": lambda seed=0, **fields: quiet(tiny_sorted(seed, **fields), 1),
    "accepting": lambda seed=0, **fields: quiet(tiny_sorted(seed, **fields), 1, 0.0),
}


def ends(reference, inputs, steps=(4, 9, 15)) -> list[int]:
    """Tokens that end each row at another step: those that the row would have there."""
    tokens = reference.generate(**inputs, max_new_tokens=max(steps) + 1, eos_token_id=[])
    width = inputs["input_ids"].shape[1]
    return [int(row[width + step]) for row, step in zip(tokens, steps, strict=False)]


def row_lengths(sequences, width: int, eos: list[int]) -> list[int]:
    """Number of new tokens of each row, its end token included."""
    is_end = torch.isin(sequences[:, width:], torch.tensor(eos))
    first = torch.where(is_end.any(1), is_end.long().argmax(1) + 1, is_end.shape[1])
    return first.tolist()


def layer_calls(model) -> list[tuple[int, int]]:
    """Layer (from 1) and number of tokens of every call of a layer from now on."""
    calls = []
    for number, layer in enumerate(model.model.layers, start=1):
        layer.register_forward_pre_hook(
            lambda _, args, number=number: calls.append((number, args[0].shape[0] * args[0].shape[1]))
        )
    return calls
