"""The statistics of a certificate: exact tails, and promises that hold where the risk is known."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from sorted_llama.hub_card.risk import Tested, choose_sequence, fixed_sequence, least_prompts, p_value


RISK, DELTA = 0.05, 0.05
RISKS = st.floats(0.001, 0.5)


def test_59_prompts_without_a_failure_are_the_least_for_5_percent():
    assert least_prompts(0.05, 0.05) == 59
    assert p_value(np.zeros(59), 0.05, zero_one=True) <= 0.05 < p_value(np.zeros(58), 0.05, zero_one=True)


@given(RISKS, RISKS)
def test_the_least_prompts_are_the_least(risk, delta):
    n = least_prompts(risk, delta)
    for zero_one in (True, False):
        assert p_value(np.zeros(n), risk, zero_one) <= delta * (1 + 1e-9)
        assert n == 1 or p_value(np.zeros(n - 1), risk, zero_one) > delta * (1 - 1e-9)


@settings(deadline=None)
@given(st.integers(1, 60), st.floats(0, 1), st.fractions(Fraction(1, 50), Fraction(1, 2), max_denominator=50))
def test_the_tail_of_failures_is_that_of_exact_arithmetic(n, share, risk):
    failures = int(share * n)
    terms = [math.comb(n, k) * risk**k * (1 - risk) ** (n - k) for k in range(failures + 1)]
    losses = np.array([1.0] * failures + [0.0] * (n - failures))
    assert p_value(losses, float(risk), zero_one=True) == pytest.approx(float(sum(terms)))
    # Of losses in between it knows less: the bounds of Hoeffding and of Bentkus, the lower one
    mean, r = min(failures / n, float(risk)), float(risk)
    hoeffding = (r / mean) ** (n * mean) * ((1 - r) / (1 - mean)) ** (n - n * mean) if mean else (1 - r) ** n
    bounded = p_value(losses, r, zero_one=False)
    assert bounded == pytest.approx(min(hoeffding, math.e * float(sum(terms)), 1)) and bounded >= sum(terms) * (
        1 - 1e-9
    )


LOSSES = {  # draws of shape (runs, prompts), the expected loss just RISK: the hardest of what is to be refused
    "rare and whole": lambda rng, shape: (rng.random(shape) < RISK).astype(float),
    "often and small": lambda rng, shape: rng.beta(0.5, 0.5 * (1 / RISK - 1), shape),
    "always the same": lambda rng, shape: np.full(shape, RISK),
    "half or nothing": lambda rng, shape: 0.5 * (rng.random(shape) < 2 * RISK),
}


@pytest.mark.parametrize("draw", LOSSES)
def test_a_p_value_is_small_as_rarely_as_it_says(draw):
    runs = LOSSES[draw](np.random.default_rng(0), (2000, 150))
    for zero_one in {False, draw == "rare and whole"}:
        values = np.array([p_value(losses, RISK, zero_one) for losses in runs])
        for level in (0.01, 0.05, 0.2):
            assert binomtest(int((values <= level).sum()), len(values), level, alternative="greater").pvalue > 0.01


def test_small_losses_are_seen_to_be_small():
    """A bound that counts every loss as a whole one would not."""
    losses = np.full(200, 0.02)
    assert p_value(losses, RISK, zero_one=False) < 0.2 < p_value(np.ceil(losses), RISK, zero_one=True)


RESULTS = st.dictionaries(st.text(max_size=3), st.tuples(st.sampled_from([0, 0.01, 0.02, 0.2]), st.integers(1, 12)))


@given(RESULTS)
def test_what_is_tested_is_the_frontier_from_the_safest_to_the_cheapest(results):
    risks, costs = ({name: values[i] for name, values in results.items()} for i in (0, 1))
    order = choose_sequence(risks, costs, RISK, full_cost=10)
    assert order == sorted(order, key=lambda name: risks[name])
    assert [costs[name] for name in order] == sorted({costs[name] for name in order}, reverse=True)
    for name in results:
        rivals = [r for r in order if risks[r] <= risks[name] and costs[r] <= costs[name]]
        assert rivals or risks[name] > RISK or costs[name] >= 10
        if name in order:  # what looks as safe and is cheaper is tested, but later
            assert all(risks[r] == risks[name] and order.index(r) >= order.index(name) for r in rivals)


def test_nothing_is_looked_at_behind_the_first_that_is_not_significant():
    losses = {"safe": np.zeros(100), "doubtful": np.eye(100)[0] + np.eye(100)[1], "wrong": np.ones(100)}
    seen = []

    def losses_of(name):
        seen.append(name)
        return losses[name]

    tested = fixed_sequence(["safe", "doubtful", "wrong", "safe"], losses_of, RISK, DELTA, zero_one=True)
    assert seen == ["safe", "doubtful"] == [test.setting for test in tested]
    assert tested[0] == Tested("safe", 0.0, pytest.approx(0.95**100))
    assert tested[0].p_value <= DELTA < tested[1].p_value and tested[1].mean_loss == 0.02


# Settings whose risks are known: from each, the losses of all prompts of a draw


def nested(rng, risks, n):
    """What fails at a setting fails at all cheaper ones."""
    return np.outer(np.ones(len(risks)), rng.random(n)) < risks[:, None]


def independent(rng, risks, n):
    return rng.random((len(risks), n)) < risks[:, None]


def fractions(rng, risks, n):
    """Not 0 or 1."""
    return independent(rng, np.minimum(2 * risks, 1), n) * rng.beta(2, 2, (len(risks), n))


WORLDS = {
    "nested": (nested, np.array([0, 0.005, 0.02, 0.035, 0.051, 0.06, 0.1, 0.3])),
    "many just above the risk": (independent, np.full(20, 0.052)),
    "fractions": (fractions, np.array([0, 0.005, 0.02, 0.04, 0.051, 0.06, 0.1, 0.3])),
}


@pytest.mark.parametrize("world", WORLDS)
def test_a_certificate_is_wrong_as_rarely_as_it_says(world):
    """In 1,000 draws of 400 prompts, half to choose and half to test; the point estimate is wrong far more often."""
    draw, risks = WORLDS[world]
    names, costs = [str(i) for i in range(len(risks))], {str(i): 10.0 - i / len(risks) for i in range(len(risks))}
    rng, wrong, chosen_wrong, cheaper = np.random.default_rng(1), 0, 0, 0
    for _ in range(1000):
        losses = dict(zip(names, draw(rng, risks, 400).astype(float), strict=True))
        seen = {name: float(of[:200].mean()) for name, of in losses.items()}
        order = choose_sequence(seen, costs, RISK, full_cost=11)
        fresh = {name: of[200:] for name, of in losses.items()}
        tested = fixed_sequence(order, fresh.__getitem__, RISK, DELTA, world != "fractions")
        certified = [test.setting for test in tested if test.p_value <= DELTA]
        wrong += any(risks[int(name)] > RISK for name in certified)
        cheaper += bool(certified) and risks[int(certified[-1])] > 0
        tempting = [name for name in names if losses[name].mean() <= RISK]
        chosen_wrong += bool(tempting) and risks[int(tempting[-1])] > RISK
    assert binomtest(wrong, 1000, DELTA, alternative="greater").pvalue > 0.01
    assert binomtest(chosen_wrong, 1000, DELTA, alternative="greater").pvalue < 1e-9
    assert (cheaper > 900) == (world != "many just above the risk")
