"""Is one model better than another on the same items? A paired bootstrap (Efron and Tibshirani 1993, chapter 13).

Both models answered the same items, so what is resampled is the item with both answers: what is hard for one is mostly
hard for the other, and that common part cancels. Intervals and p-values come from the same resamples, so that p < 0.05
says the same as an interval of 95 % without 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# sums of items' counts [..., columns] to figures [...]
Statistic = Callable[[Array], Array]
RESAMPLES = 10_000
FEW_ITEMS = 50
"""Below about so many items a percentile interval is too narrow."""
_ELEMENTS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Difference:
    """B minus A. low, high: 95 % percentile interval. p: two-sided, never 0."""

    value: float
    low: float
    high: float
    p: float


def resampled_differences(a: Array, b: Array, statistic: Statistic, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """`statistic` of B's summed items minus that of A's, [resamples], over the same resamples of items.

    a, b: [items, columns], the same items in the same order. Raises ValueError for other shapes, or no items.
    """
    if a.shape != b.shape or a.ndim != 2 or not len(a):
        raise ValueError(f"paired items of shapes {a.shape} and {b.shape}")
    items, columns = a.shape
    both = np.concatenate([a, b], axis=1)
    varying = np.flatnonzero((both != both[0]).any(axis=0))  # a column of ones, as of shares, needs no drawing
    drawn = np.ascontiguousarray(both[:, varying])
    generator = np.random.default_rng(seed)
    found = np.empty(resamples)
    step = max(1, _ELEMENTS_AT_ONCE // (items * (1 + len(varying))))
    for first in range(0, resamples, step):
        count = min(step, resamples - first)
        chosen = generator.integers(0, items, size=(count, items), dtype=np.int32)
        sums = np.tile(items * both[0], (count, 1))
        sums[:, varying] = drawn[chosen].sum(axis=1)
        found[first : first + count] = statistic(sums[:, columns:]) - statistic(sums[:, :columns])
    return found


def difference(a: Array, b: Array, statistic: Statistic, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """B minus A with its interval and p-value. ValueError as above."""
    drawn = resampled_differences(a, b, statistic, resamples, seed)
    return summary(float(statistic(b.sum(axis=0)) - statistic(a.sum(axis=0))), drawn, differing_items(a, b))


def differing_items(a: Array, b: Array) -> int:
    """How many items the two answered differently; the others say nothing about which is better."""
    return int((a != b).any(axis=1).sum())


def summary(value: float, resampled: Array, differing: int) -> Difference:
    """The interval and p-value of a difference from its resamples.

    p is twice the smaller share of resamples on either side of 0, those at 0 counting on both, with one added to both
    counts (Davison and Hinkley 1997, 4.2), so that it never is 0 for want of resamples. Nor is it below
    2 * 2^-differing, the least that so many differing items allow (all signs alike, of all that chance could give
    them): resamples of one item are all that item. Where that is above 0.05 the interval reaches to 0, as p says.
    """
    low, high = np.quantile(resampled, [0.025, 0.975])
    least = min(1.0, 2.0 ** (1 - differing))
    if least >= 0.05:
        low, high = min(low, 0.0), max(high, 0.0)
    below, above = int((resampled <= 0).sum()), int((resampled >= 0).sum())
    p = min(1.0, 2 * (1 + min(below, above)) / (1 + len(resampled)))
    return Difference(value, float(low), float(high), max(p, least))


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p-value of a fair coin; ties are left out (Conover, Practical Nonparametric Statistics, 3.4).

    It may round to 0 where it is below every float.
    """
    thrown, fewer = wins + losses, min(wins, losses)
    term = ways = 1  # of exactly, and of at most, `done` wins
    for done in range(fewer):
        term = term * (thrown - done) // (done + 1)
        ways += term
    return min(1.0, float(Fraction(2 * ways, 2**thrown)))


def exact_interval(successes: float, trials: int) -> tuple[float, float]:
    """The exact 95 % interval of a share (Clopper and Pearson 1934), (0, 1) of no trials.

    successes: halves, as ties give them, are rounded to the side that makes the interval wider.
    """
    lower, upper = math.floor(successes), math.ceil(successes)
    return _lower_bound(lower, trials), 1 - _lower_bound(trials - upper, trials)


def _lower_bound(successes: int, trials: int) -> float:
    """The share under which so many successes or more have a chance of 0.025."""
    if successes <= 0:
        return 0.0
    counts = np.arange(successes, trials + 1)
    logs = np.array([-math.lgamma(n + 1) - math.lgamma(trials - n + 1) for n in counts]) + math.lgamma(trials + 1)
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        if share in (low, high):
            break
        tail = np.exp(logs + counts * math.log(share) + (trials - counts) * math.log1p(-share)).sum()
        low, high = (share, high) if tail < 0.025 else (low, share)
    return (low + high) / 2


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values for a whole table (Holm 1979): one false find among all its rows has at most the stated chance."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
