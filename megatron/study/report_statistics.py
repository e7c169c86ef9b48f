"""What the figures of arms say, with how much noise: means over seeds, relative changes, differences with intervals.

The difference of two arms has two sources of noise. *Items*: another set of questions of the same kind. All models
answered the same items, so items are resampled for all of them together (paired bootstrap; Efron and Tibshirani 1993,
chapter 13). *Seeds*: the same arm trained again. Arms of one seed have the same initial weights and the same order of
data as far as they share it, so what is looked at is the difference of each seed, d_s.

With S seeds a resample of the difference is

    D* = mean over s of d_s(items*)  +  T* · sd(d) / sqrt(S),     T* of Student's t with S - 1 degrees of freedom

where items* are drawn with replacement and sd(d) is the standard deviation of the d_s over seeds (S - 1 below). Both
are drawn in each resample, as in the bootstrap of two crossed factors (Owen 2007, "The pigeonhole bootstrap", Annals of
Applied Statistics 1). Seeds are drawn from what a normal law with unknown variance gives (Student 1908), not from the
few there are: drawing two to five values again gives intervals that are far too narrow (Hesterberg 2015, "What Teachers
Should Know About the Bootstrap", The American Statistician 69). What items and seeds do together is in both terms, so
intervals are rather too wide. With one seed the second term is missing, and the interval is of items alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from megatron.evaluation.paired import Array, Difference, Statistic, summary

_ELEMENTS_AT_ONCE = 8_000_000
_ROUNDING = 1e-13


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and the standard deviation with n - 1 below; None of a single value. ValueError of none."""
    if not values:
        raise ValueError("no values")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def relative_change(value: float, baseline: float, higher_is_better: bool) -> float | None:
    """Percent of the baseline, with + for better: 100 (x - b) / |b|, and its negative where lower is better.

    None where the baseline is 0.
    """
    if baseline == 0:
        return None
    change = 100 * (value - baseline) / abs(baseline)
    return change if higher_is_better else 0.0 - change


def resampled_figures(counts: Array, statistic: Statistic, resamples: int, seed: int) -> Array:
    """`statistic` of each model's summed items, [models, resamples], over the same resamples of items for all models.

    counts: [models, items, columns]. Raises ValueError where there is no item.
    """
    models, items, columns = counts.shape
    if not items:
        raise ValueError("no items to resample")
    flat = counts.transpose(1, 0, 2).reshape(items, models * columns)
    varying = np.flatnonzero((flat != flat[0]).any(axis=0))  # a column of ones, as of shares, needs no drawing
    drawn = np.ascontiguousarray(flat[:, varying])
    generator = np.random.default_rng(seed)
    found = np.empty((models, resamples))
    step = max(1, _ELEMENTS_AT_ONCE // (items + models * columns))
    for first in range(0, resamples, step):
        count = min(step, resamples - first)
        chosen = generator.integers(0, items, size=(count, items))
        chosen += np.arange(count)[:, None] * items
        times = np.bincount(chosen.ravel(), minlength=count * items).reshape(count, items).astype(np.float64)
        sums = np.tile(items * flat[0], (count, 1))
        sums[:, varying] = times @ drawn
        found[:, first : first + count] = statistic(sums.reshape(count, models, columns)).T
    return found


def seed_draws(seeds: int, resamples: int, seed: int) -> Array:
    """Draws of Student's t with seeds - 1 degrees of freedom, over the root of seeds; zeros of one seed."""
    if seeds < 2:
        return np.zeros(resamples)
    return np.random.default_rng([seed, seeds]).standard_t(seeds - 1, size=resamples) / math.sqrt(seeds)


def contrast(
    values: Mapping[int, float],
    baseline: Mapping[int, float],
    draws: Mapping[int, Array],
    baseline_draws: Mapping[int, Array],
    differing: int,
    resamples: int,
    seed: int = 0,
) -> Difference | None:
    """The difference of two arms by seed, with its interval and p-value, as the head of this file says.

    values, baseline: figures by seed; the seeds that both have are compared · draws, baseline_draws: resampled figures
    by seed, [resamples], of the same items; empty where no items were kept · differing: items that some seed's two
    models answered differently. None where nothing is known of the noise: one seed without items, or no seed in common.
    """
    seeds = sorted({*values} & {*baseline})
    if not seeds:
        return None
    by_seed = [values[one] - baseline[one] for one in seeds]
    middle, spread = mean_and_sd(by_seed)
    if spread is not None and spread < _ROUNDING * max(map(abs, [*values.values(), *baseline.values()])):
        spread = None  # rounding of equal differences is no spread
    known = all(one in draws and one in baseline_draws for one in seeds)
    if not known and spread is None:
        return None
    resampled = np.full(resamples, middle)
    if known:
        resampled = np.mean([draws[one] - baseline_draws[one] for one in seeds], axis=0)
    if spread is not None:
        resampled = resampled + spread * seed_draws(len(seeds), resamples, seed)
    # of seeds alone there is no number of items that bounds the p-value from below
    return summary(middle, resampled, differing if known else resamples)
