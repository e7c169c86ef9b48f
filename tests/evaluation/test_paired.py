"""The paired bootstrap: it sees a planted difference, and holds its level where there is none."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron.evaluation.paired import difference, exact_interval, holm, resampled_differences, sign_test

Array = NDArray[np.float64]


def mean(sums: Array) -> Array:
    return np.asarray(sums[..., 0] / sums[..., 1])


def items(values: Array) -> Array:
    return np.stack([values, np.ones_like(values)], axis=1)


def test_a_planted_difference_is_seen() -> None:
    generator = np.random.default_rng(1)
    a = (generator.random(500) < 0.5).astype(float)
    b = np.where(generator.random(500) < 0.1, 1.0, a)  # one item in ten is put right
    found = difference(items(a), items(b), mean)
    assert found.value == pytest.approx(b.mean() - a.mean()) and 0 < found.low < found.value < found.high
    assert found.p < 0.001
    back = difference(items(b), items(a), mean)
    assert back.value == pytest.approx(-found.value) and back.high < 0 and back.p < 0.001


def test_the_level_is_held_where_both_are_equally_good() -> None:
    """Of 400 pairs of equally good models about one in twenty may look different at 5 %, and one in ten at 10 %."""
    generator = np.random.default_rng(7)
    p_values = []
    for trial in range(400):
        hardness = generator.random(150)  # what is hard for one is hard for the other
        a, b = ((generator.random(150) < hardness).astype(float) for _ in range(2))
        p_values.append(difference(items(a), items(b), mean, resamples=500, seed=trial).p)
    below = np.array(p_values)
    # three standard errors of a share of 400: 0.033 and 0.045
    assert (below < 0.05).mean() <= 0.05 + 0.033
    assert 0.10 - 0.06 <= (below < 0.10).mean() <= 0.10 + 0.045


def test_the_interval_is_the_normal_one_for_many_items() -> None:
    generator = np.random.default_rng(3)
    a = generator.normal(2.0, 1.0, 4000)
    b = a + generator.normal(0.05, 0.5, 4000)
    found = difference(items(a), items(b), mean, resamples=4000)
    error = (b - a).std(ddof=1) / 4000**0.5
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.15 * error)


def test_pairing_is_what_makes_it_sharp() -> None:
    generator = np.random.default_rng(5)
    a = generator.normal(0, 5, 400)
    b = a + generator.normal(0.2, 0.2, 400)
    paired = difference(items(a), items(b), mean)
    apart = difference(items(a), items(generator.permutation(b)), mean)
    assert paired.p < 0.001 and apart.p > 0.2
    assert (paired.high - paired.low) * 10 < apart.high - apart.low


def test_bits_a_byte_are_resampled_as_a_ratio_of_sums() -> None:
    """Against resamples drawn here, one by one."""
    generator = np.random.default_rng(9)
    sizes = generator.integers(10, 4000, 60).astype(float)
    a, b = (np.stack([sizes * generator.normal(level, 0.3, 60), sizes], axis=1) for level in (1.0, 1.1))
    drawn = resampled_differences(a, b, mean, resamples=3000)
    plain = []
    for _ in range(3000):
        chosen = generator.integers(0, 60, 60)
        plain.append(b[chosen, 0].sum() / b[chosen, 1].sum() - a[chosen, 0].sum() / a[chosen, 1].sum())
    assert np.quantile(drawn, [0.025, 0.5, 0.975]) == pytest.approx(np.quantile(plain, [0.025, 0.5, 0.975]), abs=0.03)


def test_the_seed_decides_and_chunks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = items(np.arange(40.0) % 2), items(np.arange(40.0) % 3)
    assert difference(a, b, mean, 500, seed=4) == difference(a, b, mean, 500, seed=4)
    assert not np.array_equal(*(resampled_differences(a, b, mean, 500, seed) for seed in (4, 5)))
    whole = resampled_differences(a, b, mean, 500, 4)
    monkeypatch.setattr("megatron.evaluation.paired._ELEMENTS_AT_ONCE", 1000)
    assert np.array_equal(whole, resampled_differences(a, b, mean, 500, 4))


def test_no_difference_has_p_one_and_p_is_never_zero() -> None:
    same = items(np.array([0.0, 1.0, 1.0, 0.0]))
    found = difference(same, same, mean, 200)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert difference(items(np.zeros(50)), items(np.ones(50)), mean, 200).p == pytest.approx(2 / 201)
    with pytest.raises(ValueError):
        difference(same, same[:3], mean)
    with pytest.raises(ValueError):
        difference(same[:0], same[:0], mean)


def test_holm_by_its_definition() -> None:
    p_values = [0.01, 0.04, 0.03, 0.005]
    assert holm(p_values) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_the_sign_test_counts_all_falls_of_the_coin() -> None:
    for wins, losses in ((0, 0), (1, 0), (5, 0), (6, 0), (2, 7), (4, 4), (7, 3)):
        falls = [sum(fall) for fall in itertools.product((0, 1), repeat=wins + losses)]
        extreme = sum(min(ones, wins + losses - ones) <= min(wins, losses) for ones in falls)
        assert sign_test(wins, losses) == sign_test(losses, wins) == pytest.approx(extreme / len(falls))
    assert sign_test(5200, 4800) == pytest.approx(6.6e-5, rel=0.02)  # the normal one, with its correction: z = 3.99


def test_the_exact_interval_leaves_a_fortieth_on_either_side() -> None:
    for right, trials in ((1, 3), (3, 10), (25, 50), (380, 400)):
        low, high = (Fraction(bound) for bound in exact_interval(right, trials))
        above = sum(comb(trials, n) * low**n * (1 - low) ** (trials - n) for n in range(right, trials + 1))
        below = sum(comb(trials, n) * high**n * (1 - high) ** (trials - n) for n in range(right + 1))
        assert float(above) == pytest.approx(0.025, rel=1e-6) and float(below) == pytest.approx(0.025, rel=1e-6)
    assert exact_interval(0, 0) == (0, 1) and exact_interval(0.5, 1) == (0, 1)
    assert exact_interval(1, 1) == pytest.approx((0.025, 1)) and exact_interval(0, 1) == pytest.approx((0, 0.975))


def test_p_is_never_below_what_the_items_allow() -> None:
    for count, least in ((1, 1.0), (5, 2 / 32), (6, 2 / 64)):
        a = np.zeros(20)
        b = np.where(np.arange(20) < count, 1.0, a)  # the items that both answer alike say nothing
        found = difference(items(a[:count]), items(b[:count]), mean)
        assert found.p == pytest.approx(least) and (found.low <= 0) == (least >= 0.05)
        assert difference(items(a), items(b), mean).p >= least
