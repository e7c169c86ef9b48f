"""Exact duplicates against a dictionary of texts."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.corpora.exact_duplicates import first_of_equals, sign_exact

TEXTS = st.lists(st.text("ab \n\t", max_size=4), max_size=40)


@given(TEXTS, st.sampled_from(["exact", "whitespace"]), st.lists(st.integers(0, 40), max_size=4))
def test_the_first_of_equal_texts_is_found_however_they_are_split(
    texts: list[str], normalisation: str, cuts: list[int]
) -> None:
    known: dict[str, int] = {}
    expected = [
        known.setdefault(text if normalisation == "exact" else " ".join(text.split()), number)
        for number, text in enumerate(texts)
    ]
    edges = [0, *sorted(min(cut, len(texts)) for cut in cuts), len(texts)]
    parts = [sign_exact(texts[begin:end], normalisation) for begin, end in zip(edges, edges[1:], strict=False)]
    assert first_of_equals(parts).tolist() == expected


def test_the_hash_is_blake2b_of_utf8() -> None:
    """So that other tools can compute it: 16 bytes, as two little-endian integers."""
    (row,) = sign_exact(["naïve 五"], "exact")
    assert row.astype("<u8").tobytes() == hashlib.blake2b("naïve 五".encode(), digest_size=16).digest()
    assert sign_exact(["\ud800"], "exact").shape == (1, 2)  # a lone surrogate is hashed, not refused


def test_both_halves_of_the_hash_count() -> None:
    rows = np.array([[1, 1], [1, 2], [2, 1], [1, 2], [1, 1], [2, 2]], np.uint64)
    assert first_of_equals([rows]).tolist() == [0, 1, 2, 1, 0, 5]
    assert first_of_equals([]).tolist() == []


@pytest.mark.parametrize("documents", [100_000])
def test_memory_stays_near_the_hashes_themselves(documents: int) -> None:
    import tracemalloc

    rows = np.random.default_rng(0).integers(0, 2**63, (documents, 2), np.uint64)
    tracemalloc.start()
    first_of_equals([rows])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * documents
