"""Held-out documents are a function of the file's content and the document's number alone."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from token_files import BACKENDS, backend

from megatron.data.holdout import hashes_below_twin, held_out, holdout_base, holdout_threshold
from megatron.data.permutation import GOLDEN, mix64


@pytest.mark.parametrize("name", BACKENDS)
def test_equals_the_hash_over_unbounded_integers(name: str) -> None:
    with backend(name):
        mask = held_out("content", 3000, Decimal("0.1"))
    base, threshold = holdout_base("content"), int(Fraction(1, 10) * 2**64)
    assert mask.tolist() == [mix64((base + (i + 1) * GOLDEN) % 2**64) < threshold for i in range(3000)]


@pytest.mark.parametrize("fraction", ["0.005", "0.1", "0.5", "0.99"])
def test_the_share_is_the_fraction(fraction: str) -> None:
    share, count = float(fraction), 200_000
    held = held_out("content", count, Decimal(fraction)).sum()
    assert abs(held - share * count) < 4 * (count * share * (1 - share)) ** 0.5


def test_a_larger_fraction_or_file_holds_out_the_same_documents_and_more() -> None:
    small, large = held_out("content", 50_000, Decimal("0.01")), held_out("content", 60_000, Decimal("0.02"))
    assert np.all(large[:50_000][small])
    assert np.array_equal(held_out("content", 60_000, Decimal("0.01"))[:50_000], small)


def test_files_are_independent_and_nothing_is_held_out_at_zero() -> None:
    one, other = held_out("one", 100_000, Decimal("0.1")), held_out("other", 100_000, Decimal("0.1"))
    assert 800 < np.sum(one & other) < 1200
    assert not held_out("one", 1000, 0).any()
    assert held_out("one", 0, Decimal("0.1")).shape == (0,)


def test_the_threshold_is_exact_beyond_the_digits_of_a_decimal_context() -> None:
    assert holdout_threshold(Decimal("0.5")) == 2**63
    assert holdout_threshold(Decimal("0." + "9" * 40)) == 2**64 - 1
    for wrong in (Decimal(1), Decimal("-0.1")):
        with pytest.raises(ValueError, match="fraction"):
            holdout_threshold(wrong)


def test_the_twin_is_the_same_across_its_chunks() -> None:
    mask = hashes_below_twin(5, (1 << 20) + 10, 2**62)
    again = [mix64((5 + (i + 1) * GOLDEN) % 2**64) < 2**62 for i in range((1 << 20) - 5, (1 << 20) + 10)]
    assert mask[-15:].tolist() == again
