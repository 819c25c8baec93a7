"""
Which of several settings keep a risk below a bound, with a given certainty: Learn then Test (Angelopoulos et al. 2021,
arXiv 2110.01052). Everything here is about losses from 0 to 1 of independent prompts, and knows no model.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np


def least_prompts(risk: float, delta: float) -> int:
    """How many prompts, none of which fails, show with certainty `1 - delta` that the risk is at most `risk`."""
    return math.ceil(math.log(delta) / math.log1p(-risk))


def p_value(losses: np.ndarray, risk: float, zero_one: bool) -> float:
    """
    P-value of the hypothesis that the expected loss is above `risk`: where it is, the value falls below any `u` with a
    probability of at most `u`.

    Args:
        losses (`np.ndarray` of shape `(num_prompts,)`): From 0 to 1, of independent prompts.
        risk (`float`): The bound, between 0 and 1.
        zero_one (`bool`):
            Whether a loss can only be 0 or 1. Then the binomial tail is exact; else the bound is that of Hoeffding and
            Bentkus (arXiv 2110.01052, section 3.1), which holds for all losses from 0 to 1.
    """
    from scipy.special import rel_entr
    from scipy.stats import binom

    n, mean = len(losses), float(losses.mean())
    tail = float(binom.cdf(math.ceil(losses.sum()), n, risk))
    if zero_one:
        return tail
    lower = min(mean, risk)
    hoeffding = math.exp(-n * (rel_entr(lower, risk) + rel_entr(1 - lower, 1 - risk)))
    return min(hoeffding, math.e * tail, 1.0)


def choose_sequence(
    risks: Mapping[str, float], costs: Mapping[str, float], risk: float, full_cost: float
) -> list[str]:
    """
    The settings to test, from the safest to the cheapest: those that no other is both safer and cheaper than, as far
    as they cost less than full depth and looked safe enough; of those that look as safe, the dearest comes first. It
    may depend on nothing of the prompts of the test.
    """
    order: list[str] = []
    cheapest = full_cost
    for name in sorted(risks, key=lambda name: (risks[name], -costs[name])):
        if risks[name] <= risk and costs[name] < cheapest:
            order.append(name)
            cheapest = costs[name]
    return order


class Tested(NamedTuple):
    """What a test found of a setting."""

    setting: str
    mean_loss: float
    p_value: float


def fixed_sequence(
    order: Iterable[str], losses_of: Callable[[str], np.ndarray], risk: float, delta: float, zero_one: bool
) -> list[Tested]:
    """
    Test settings in order, each at level `delta`, up to the first that is not significant, which is the last of the
    list. With probability `1 - delta` all that are significant keep the risk: it takes a lucky test of the first that
    does not to reach those behind it. `losses_of` gives a setting's losses, when it is its turn.
    """
    tested: list[Tested] = []
    for name in order:
        losses = losses_of(name)
        tested.append(Tested(name, float(losses.mean()), p_value(losses, risk, zero_one)))
        if tested[-1].p_value > delta:
            break
    return tested
