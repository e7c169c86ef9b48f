"""Statistics of a study's report against enumeration, published tables and definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.evaluation.bleu import bleu_of
from megatron.evaluation.paired import resampled_differences
from megatron.study.report_score_plots import front_of
from megatron.study.report_statistics import contrast, mean_and_sd, relative_change, resampled_figures, seed_draws

RESAMPLES = 60_000
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 10: 2.262}
"""Two-sided 95 % points of Student's t by the number of seeds, from the published table (n - 1 degrees of freedom)."""


def ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def items(marks: list[float]) -> np.ndarray:
    return np.array([[mark, 1.0] for mark in marks])


def enumerated(counts: np.ndarray) -> dict[tuple[float, ...], float]:
    """The exact distribution of all models' figures over every resample of the items: N^N of them."""
    total = counts.shape[1]
    found: dict[tuple[float, ...], float] = {}
    for chosen in itertools.product(range(total), repeat=total):
        figures = tuple(round(float(ratio(counts[m, list(chosen)].sum(axis=0))), 9) for m in range(len(counts)))
        found[figures] = found.get(figures, 0) + total**-total
    return found


def test_resamples_have_the_exact_distribution_of_all_models_together() -> None:
    counts = np.stack([items([1, 0, 1, 1]), items([0, 0, 1, 0]), items([1, 1, 0, 0])])
    drawn = resampled_figures(counts, ratio, RESAMPLES, seed=3)
    exact = enumerated(counts)
    seen: dict[tuple[float, ...], int] = {}
    for figures in map(tuple, np.round(drawn.T, 9)):
        seen[figures] = seen.get(figures, 0) + 1
    assert set(seen) == set(exact)
    for figures, chance in exact.items():
        error = math.sqrt(chance * (1 - chance) / RESAMPLES)
        assert abs(seen[figures] / RESAMPLES - chance) < 5 * error


def test_items_of_unlike_sizes_weigh_as_in_the_ratio_of_sums() -> None:
    counts = np.array([[[6.0, 2], [1, 1], [12, 8]], [[5.0, 2], [1, 1], [16, 8]]])
    drawn = resampled_figures(counts, ratio, RESAMPLES, seed=1)
    exact = enumerated(counts)
    for model in range(2):
        mean = sum(figures[model] * chance for figures, chance in exact.items())
        spread = math.sqrt(sum((figures[model] - mean) ** 2 * chance for figures, chance in exact.items()))
        assert drawn[model].mean() == pytest.approx(mean, abs=5 * spread / math.sqrt(RESAMPLES))
        assert drawn[model].std() == pytest.approx(spread, rel=0.02)


def test_interval_and_p_of_one_seed_are_those_of_the_multinomial_law() -> None:
    """A is right and B wrong at 8 of 12 items, the reverse at 1: a resample's difference is (wins - losses) / 12."""
    a, b = items([1] * 8 + [0] + [1, 0, 0]), items([0] * 8 + [1] + [1, 0, 0])
    drawn = resampled_figures(np.stack([a, b]), ratio, RESAMPLES, seed=5)
    found = contrast({1: 9 / 12}, {1: 2 / 12}, {1: drawn[0]}, {1: drawn[1]}, 9, RESAMPLES)
    assert found is not None
    exact: dict[int, float] = {}
    for wins in range(13):
        for losses in range(13 - wins):
            ways = math.comb(12, wins) * math.comb(12 - wins, losses)
            exact[wins - losses] = (
                exact.get(wins - losses, 0) + ways * 8**wins * 1**losses * 3 ** (12 - wins - losses) / 12**12
            )
    below = sum(chance for x, chance in exact.items() if x <= 0)
    assert found.p == pytest.approx(max(2 * below, 2 ** (1 - 9)), rel=0.15)
    for quantile, side in ((0.025, found.low), (0.975, found.high)):
        cumulated = np.cumsum([exact[x] for x in sorted(exact)])
        assert side == pytest.approx(sorted(exact)[int(np.searchsorted(cumulated, quantile))] / 12)


def test_few_differing_items_never_tell() -> None:
    """Five of five items better is p = 2 / 2^5, as in `compare`: more than 0.05, so the interval reaches to 0."""
    drawn = resampled_figures(np.stack([items([1] * 5), items([0] * 5)]), ratio, 1000, seed=0)
    found = contrast({1: 1.0}, {1: 0.0}, {1: drawn[0]}, {1: drawn[1]}, 5, 1000)
    assert found is not None
    assert found.p == 2 ** (1 - 5)
    assert found.low == 0


def test_one_seed_agrees_with_the_paired_bootstrap_of_compare() -> None:
    generator = np.random.default_rng(0)
    a = items(list(generator.integers(0, 2, 300).astype(float)))
    b = np.where(generator.random(300)[:, None] < 0.3, items([1.0] * 300), a)
    drawn = resampled_figures(np.stack([a, b]), ratio, 20_000, seed=0)
    other = resampled_differences(a, b, ratio, 20_000, seed=9)
    mine = drawn[1] - drawn[0]
    assert np.quantile(mine, [0.025, 0.5, 0.975]) == pytest.approx(np.quantile(other, [0.025, 0.5, 0.975]), abs=2e-3)


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 10])
def test_without_noise_of_items_the_interval_is_students(seeds: int) -> None:
    generator = np.random.default_rng(seeds)
    differences = generator.normal(0.3, 0.1, seeds)
    values = {seed: 1 + float(d) for seed, d in enumerate(differences)}
    base = dict.fromkeys(range(seeds), 1.0)
    found = contrast(values, base, {}, {}, 0, 400_000)
    assert found is not None
    half = T_975[seeds] * differences.std(ddof=1) / math.sqrt(seeds)
    assert found.value == pytest.approx(differences.mean())
    # the draws are a sample: of two seeds their tails are very long
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05 if seeds == 2 else 0.02)
    assert found.value - found.low == pytest.approx(half, rel=0.06 if seeds == 2 else 0.02)


def test_p_says_the_same_as_the_interval_over_seeds() -> None:
    """t = 4.303 with two degrees of freedom is p = 0.05, by the table."""
    spread = np.array([-1.0, 0.0, 1.0])
    mean = T_975[3] * spread.std(ddof=1) / math.sqrt(3)
    values = {seed: float(mean + x) for seed, x in enumerate(spread)}
    found = contrast(values, dict.fromkeys(range(3), 0.0), {}, {}, 0, 400_000)
    assert found is not None
    assert found.p == pytest.approx(0.05, abs=0.003)
    assert found.low == pytest.approx(0, abs=0.1)


def test_noise_of_items_and_of_seeds_add_up() -> None:
    """Variances of independent parts add: that of items / 200, and that of seeds / 10 by Student's t (x 9/7)."""
    generator = np.random.default_rng(2)
    difficulty = generator.random(200)
    marks = {
        seed: items([float(x) for x in difficulty < 0.5 + 0.05 * z])
        for seed, z in enumerate(generator.normal(0, 1, 10))
    }
    base = items([0.0] * 200)
    counts = np.stack([*marks.values(), base])
    drawn = resampled_figures(counts, ratio, RESAMPLES, seed=4)
    values = {seed: float(ratio(one.sum(axis=0))) for seed, one in marks.items()}
    found = contrast(
        values,
        dict.fromkeys(values, 0.0),
        dict(enumerate(drawn[:10])),
        dict.fromkeys(values, drawn[10]),
        200,
        RESAMPLES,
    )
    assert found is not None
    mean = np.mean([one[:, 0] for one in marks.values()], axis=0)
    of_items = mean.var() / 200
    of_seeds = np.var(list(values.values()), ddof=1) / 10 * 9 / 7
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * math.sqrt(of_items + of_seeds), rel=0.06)


def test_intervals_over_seeds_and_items_hold_the_truth_about_as_often_as_they_say() -> None:
    """Two recipes without a difference: normal seeds, questions of all difficulties. At least 95 %, less chance."""
    generator = np.random.default_rng(11)
    hits, tries = 0, 250
    for _ in range(tries):
        difficulty = generator.normal(0, 1, 60)
        draws: list[dict[int, np.ndarray]] = []
        values: list[dict[int, float]] = []
        counts = []
        for _arm in range(2):
            for _seed in range(3):
                counts.append(
                    items([float(x) for x in generator.normal(0, 0.3) > difficulty + generator.normal(0, 0.5, 60)])
                )
        drawn = resampled_figures(np.stack(counts), ratio, 1000, seed=1)
        for arm in range(2):
            draws.append({seed: drawn[3 * arm + seed] for seed in range(3)})
            values.append({seed: float(ratio(counts[3 * arm + seed].sum(axis=0))) for seed in range(3)})
        found = contrast(values[0], values[1], draws[0], draws[1], 60, 1000)
        assert found is not None
        hits += found.low <= 0 <= found.high
    assert hits / tries > 0.95 - 3 * math.sqrt(0.95 * 0.05 / tries)


def test_nothing_is_said_where_noise_is_not_known() -> None:
    assert contrast({1: 0.5}, {1: 0.4}, {}, {}, 0, 1000) is None  # one seed without items
    assert contrast({1: 0.5}, {2: 0.4}, {}, {}, 0, 1000) is None  # no seed in common
    assert contrast({1: 0.5, 2: 0.6}, {1: 0.4, 2: 0.52}, {}, {}, 0, 1000) is not None
    assert contrast({1: 0.5, 2: 0.6}, {1: 0.4, 2: 0.5}, {}, {}, 0, 1000) is None  # no spread, so no noise is known


def test_only_seeds_that_both_have_are_compared() -> None:
    found = contrast({1: 5.0, 2: 6.0, 3: 99.0}, {1: 4.0, 2: 4.5}, {}, {}, 0, 1000)
    assert found is not None
    assert found.value == pytest.approx(1.25)


def test_seeds_are_paired() -> None:
    """What a seed does to both arms alike cancels: the interval is of the differences."""
    common = np.random.default_rng(0).normal(0, 5, 4)
    a = {seed: float(x + 1 + 0.001 * seed) for seed, x in enumerate(common)}
    b = {seed: float(x) for seed, x in enumerate(common)}
    found = contrast(a, b, {}, {}, 0, 10_000)
    assert found is not None
    assert found.low > 0.99
    assert found.high < 1.01


def test_the_same_seed_gives_the_same_draws() -> None:
    counts = np.stack([items([1, 0, 1]), items([0, 0, 1])])
    assert (resampled_figures(counts, ratio, 500, 7) == resampled_figures(counts, ratio, 500, 7)).all()
    assert (seed_draws(3, 500, 0) == seed_draws(3, 500, 0)).all()
    assert not seed_draws(1, 10, 0).any()


def test_a_statistic_of_several_columns_is_that_of_summed_columns() -> None:
    counts = np.random.default_rng(0).integers(1, 9, (2, 5, 10)).astype(float)
    drawn = resampled_figures(counts, bleu_of, 200, 0)
    chosen = np.random.default_rng(0).integers(0, 5, size=(200, 5))
    assert drawn[1][7] == pytest.approx(float(bleu_of(counts[1][chosen[7]].sum(axis=0))))


def test_relative_change_by_hand() -> None:
    assert relative_change(41.2, 30.1, True) == pytest.approx(36.877, abs=1e-3)  # as papers print: +36.9 %
    assert relative_change(2.7, 3.0, False) == pytest.approx(10.0)  # a loss that falls by a tenth is +10 %
    assert relative_change(3.3, 3.0, False) == pytest.approx(-10.0)
    assert relative_change(-2.0, -4.0, True) == pytest.approx(50.0)
    assert relative_change(1.0, 0.0, True) is None
    assert math.copysign(1, relative_change(3.0, 3.0, False) or 0.0) == 1  # no "-0.0 %"


@given(st.floats(0.01, 1e3), st.floats(0.01, 1e3), st.booleans())
def test_relative_change_is_positive_exactly_for_better(value: float, base: float, higher: bool) -> None:
    change = relative_change(value, base, higher)
    assert change is not None
    assert (change > 0) == ((value > base) == higher and value != base) or abs(value - base) < 1e-9 * base


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_mean_and_sd_are_the_sums_of_their_definitions(values: list[float]) -> None:
    mean, sd = mean_and_sd(values)
    assert mean == pytest.approx(sum(values) / len(values), abs=1e-6)
    if len(values) == 1:
        assert sd is None
    else:
        assert sd == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1)), abs=1e-5)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12), st.booleans(), st.booleans())
def test_front_is_what_no_other_dominates(points: list[tuple[int, int]], higher_x: bool, higher_y: bool) -> None:
    front = set(front_of(points, higher_x, higher_y))

    def as_good(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return (a[0] >= b[0] if higher_x else a[0] <= b[0]) and (a[1] >= b[1] if higher_y else a[1] <= b[1])

    for at, point in enumerate(points):
        dominated = any(as_good(other, point) and not as_good(point, other) for other in points)
        assert (at in front) == (not dominated)
