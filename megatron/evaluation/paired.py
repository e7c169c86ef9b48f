"""Is one model better than another on the same items? A paired bootstrap (Efron and Tibshirani 1993, chapter 13).

Both models answered the same items, so what is resampled is the item with both answers: what is hard for one is mostly
hard for the other, and that common part cancels. Intervals and p-values come from the same resamples, so that p < 0.05
says the same as an interval of 95 % without 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# sums of items' counts [..., columns] to figures [...]
Statistic = Callable[[Array], Array]
RESAMPLES = 10_000
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
    return summary(float(statistic(b.sum(axis=0)) - statistic(a.sum(axis=0))), drawn)


def summary(value: float, resampled: Array) -> Difference:
    """The interval and p-value of a difference from its resamples.

    p is twice the smaller share of resamples on either side of 0, those at 0 counting on both, with one added to both
    counts (Davison and Hinkley 1997, 4.2), so that it never is 0 for want of resamples.
    """
    low, high = np.quantile(resampled, [0.025, 0.975])
    below, above = int((resampled <= 0).sum()), int((resampled >= 0).sum())
    return Difference(value, float(low), float(high), min(1.0, 2 * (1 + min(below, above)) / (1 + len(resampled))))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values for a whole table (Holm 1979): one false find among all its rows has at most the stated chance."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
