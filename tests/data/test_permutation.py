"""The permutation against integers of Python's own, against the C++, and against chance."""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from math import factorial, isqrt

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from token_files import BACKENDS, backend, needs_native

from megatron.data.native import native
from megatron.data.permutation import derive_key, mix64, mix64_array, permute, permute_range, permute_twin

WORDS = st.integers(0, 2**64 - 1)
SIZES = st.one_of(st.integers(1, 70), st.integers(1, 70000), st.integers(1, 2**62), st.just(2**62))
MASK = 2**64 - 1


def permute_by_hand(index: int, n: int, key: int) -> int:
    """The cipher once more, over integers without width."""
    columns = isqrt(n - 1) + 1
    rows = -(-n // columns)
    rounds = 24 if n <= 256 else 12 if n <= 65536 else 6

    def amount(half: int, number: int, side: int) -> int:
        word = ((half ^ mix64((key + (number + 1) * 0x9E3779B97F4A7C15) & MASK)) * 0xFF51AFD7ED558CCD) & MASK
        word = ((word ^ word >> 32) * 0xC4CEB9FE1A85EC53) & MASK
        return (word >> 32) * side >> 32

    while True:
        row, column = divmod(index, columns)
        for number in range(0, rounds, 2):
            row = (row + amount(column, number, rows)) % rows
            column = (column + amount(row, number + 1, columns)) % columns
        index = row * columns + column
        if index < n:
            return index


@pytest.mark.parametrize("name", BACKENDS)
@settings(deadline=None, max_examples=150)
@given(n=SIZES, key=WORDS, draw=st.data())
def test_equals_the_cipher_over_unbounded_integers(name: str, n: int, key: int, draw: st.DataObject) -> None:
    start = draw.draw(st.integers(0, n - 1))
    count = min(n - start, 70)
    expected = [permute_by_hand(index, n, key) for index in range(start, start + count)]
    with backend(name):
        assert permute_range(start, count, n, key).tolist() == expected
        assert permute(np.arange(start, start + count), n, key).tolist() == expected
        assert permute(start, n, key) == expected[0]


@needs_native
@settings(deadline=None, max_examples=150)
@given(n=SIZES, key=WORDS, draw=st.data())
@example(n=2**62, key=MASK, draw=None).via("the largest order")
def test_native_equals_numpy_with_and_without_wide_registers(n: int, key: int, draw: st.DataObject | None) -> None:
    extension = native()
    assert extension is not None
    start = 0 if draw is None else draw.draw(st.integers(0, n - 1))
    count = min(n - start, 1000)
    twin = permute_twin(np.arange(start, start + count, dtype=np.uint64), n, key).view(np.int64)
    for portable in (False, True):
        assert np.array_equal(extension.permute_range(start, count, n, key, portable=portable), twin)
        back = extension.permute_range(start, count, n, key, inverse=True, portable=portable)
        assert np.array_equal(permute(back, n, key), np.arange(start, start + count))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 4096, 65535, 65536, 65537, 99991, 262144])
def test_is_a_bijection(name: str, n: int) -> None:
    with backend(name):
        assert np.array_equal(np.sort(permute_range(0, n, n, derive_key("bijection", n))), np.arange(n))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_every_permutation_of_a_tiny_order_is_as_likely(n: int) -> None:
    samples = 60 * factorial(n)
    seen = Counter(tuple(permute_range(0, n, n, derive_key("tiny", key)).tolist()) for key in range(samples))
    assert len(seen) == factorial(n)
    degrees = factorial(n) - 1
    chi_square = sum((count - 60) ** 2 / 60 for count in seen.values())
    # four standard deviations to either side; the keys are fixed, so that this never flickers
    assert abs(chi_square - degrees) < 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("n", [50, 1000, 70000])
def test_places_and_neighbours_look_random(n: int) -> None:
    cells = np.zeros((10, 10))
    steps = []
    for key in range(200):
        images = permute_range(0, n, n, derive_key("places", key))[:500]
        np.add.at(cells, (np.arange(len(images)) * 10 // len(images), images * 10 // n), 1)
        steps.append(np.abs(np.diff(images)).mean() / n)
    expected = cells.sum() / 100
    assert np.sum((cells - expected) ** 2 / expected) < 99 + 4 * (2 * 99) ** 0.5
    assert np.mean(steps) == pytest.approx((n + 1) / (3 * n), rel=0.02)


def test_keys_and_orders_are_independent() -> None:
    images = [permute_range(0, 1000, 1000, key) for key in range(40)]  # keys that differ in few bits
    fixed = [int(np.sum(one == other)) for i, one in enumerate(images) for other in images[:i]]
    assert np.mean(fixed) == pytest.approx(1, abs=0.2)  # two random permutations agree in one place on average
    assert max(fixed) < 10


def test_keeps_the_shape_and_refuses_what_is_outside() -> None:
    assert permute(np.zeros((2, 3), dtype=np.int32), 5, 1).shape == (2, 3)
    assert permute(np.zeros(0, dtype=np.int64), 5, 1).shape == (0,)
    for name in BACKENDS:
        with backend(name):
            for wrong in (-1, 5):
                with pytest.raises(ValueError, match="range"):
                    permute(wrong, 5, 1)
                with pytest.raises(ValueError, match="range"):
                    permute(np.array([0, wrong]), 5, 1)
            with pytest.raises(ValueError, match="range"):
                permute_range(3, 3, 5, 1)
            with pytest.raises(ValueError, match="2\\^62"):
                permute_range(0, 1, 2**62 + 1, 1)


def test_a_key_is_the_documented_digest_and_tells_all_lists_of_parts_apart() -> None:
    expected = int.from_bytes(blake2b(b"s6:pieces" + b"i2:-7" + b"s2:\xc3\xa4").digest()[:8], "little")
    assert derive_key("pieces", -7, "ä") == expected
    lists: list[tuple[int | str, ...]] = [
        (),
        ("",),
        ("", ""),
        (1,),
        ("1",),
        (12,),
        (1, 2),
        ("1i1:2",),
        ("a", "b"),
        ("ab",),
    ]
    assert len({derive_key(*parts) for parts in lists}) == len(lists)
    with pytest.raises(TypeError):
        derive_key(True)
    with pytest.raises(TypeError):
        derive_key(1.0)  # type: ignore[arg-type]


@given(word=WORDS)
def test_mix64_of_arrays_is_mix64(word: int) -> None:
    assert int(mix64_array(np.array([word], dtype=np.uint64))[0]) == mix64(word)
