"""Keyed permutations that are computed, not stored, and the keys they are keyed by.

A permutation of range(n) is a generalised Feistel cipher (Black and Rogaway, "Ciphers with arbitrary finite domains",
2002, section 5): an index is written as (left, right) on the smallest near-square grid of at least n places, the
rounds add to each half in turn a keyed hash of the other, and the few places past n are walked over. A power of two
as the domain would walk up to twice as far, and could not reach the odd permutations of 16 or more elements.

The functions whose name ends in `_twin` define the results; the C++ extension equals them bit for bit.
"""

from __future__ import annotations

from hashlib import blake2b
from math import isqrt
from typing import overload

import numpy as np
import numpy.typing as npt

from megatron.data.native import native

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15
LARGEST_ORDER = 2**62
_MASK = 2**64 - 1


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from integers and strings: the first 8 bytes, little endian, of blake2b over their encoding.

    The encoding is canonical: no two different lists of parts have the same one.
    """
    digest = blake2b()
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"a key is derived from integers and strings, not from {part!r}")
        text = str(part).encode()
        digest.update(b"%c%d:" % (b"i" if isinstance(part, int) else b"s", len(text)) + text)
    return int.from_bytes(digest.digest()[:8], "little")


def mix64(word: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def mix64_array(words: Words) -> Words:
    """`mix64` of every element."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _rounds(n: int) -> int:
    # A small order has few round functions to choose from, so that it takes more of them to reach all
    # permutations evenly; the counts were set by the chi-square tests of n = 2 to 6.
    if n <= 256:
        return 24
    return 12 if n <= 65536 else 6


def _checked(n: int, key: int) -> tuple[int, int]:
    if not 1 <= n <= LARGEST_ORDER:
        raise ValueError(f"a permutation needs 1 <= n <= 2^62, not {n}")
    if not 0 <= key <= _MASK:
        raise ValueError(f"a key is a 64-bit word, not {key}")
    right = isqrt(n - 1) + 1
    return -(-n // right), right


def _shift(half: Words, key: int, side: int) -> Words:
    word = (half ^ np.uint64(key)) * np.uint64(0xFF51AFD7ED558CCD)
    word ^= word >> np.uint64(32)
    word *= np.uint64(0xC4CEB9FE1A85EC53)
    return ((word >> np.uint64(32)) * np.uint64(side)) >> np.uint64(32)


def permute_twin(indices: Words, n: int, key: int) -> Words:
    """The images of a flat array of indices below n; the definition that the C++ equals."""
    left_side, right_side = _checked(n, key)
    rounds = _rounds(n)
    keys = [mix64((key + (i + 1) * GOLDEN) & _MASK) for i in range(rounds)]
    images = indices.copy()
    walking = np.arange(len(images))
    while len(walking):
        left, right = np.divmod(images[walking], np.uint64(right_side))
        for i in range(0, rounds, 2):
            left = (left + _shift(right, keys[i], left_side)) % np.uint64(left_side)
            right = (right + _shift(left, keys[i + 1], right_side)) % np.uint64(right_side)
        found = left * np.uint64(right_side) + right
        images[walking] = found
        walking = walking[found >= np.uint64(n)]
    return images


@overload
def permute(index: int, n: int, key: int) -> int: ...
@overload
def permute(index: npt.NDArray[np.integer], n: int, key: int) -> Integers: ...
def permute(index: int | npt.NDArray[np.integer], n: int, key: int) -> int | Integers:
    """The image of an index, or of every element of an array (same shape, int64), under the permutation of range(n)
    with this 64-bit key. 1 <= n <= 2^62. Raises ValueError for an index outside range(n).
    """
    extension = native()
    if isinstance(index, int):
        if not 0 <= index < n:
            raise ValueError(f"{index} is not in range({n})")
        if extension is not None:
            return int(extension.permute_one(index, n, key))
        return int(permute_twin(np.array([index], dtype=np.uint64), n, key)[0])
    if index.size and not (index.min() >= 0 and index.max() < n):
        raise ValueError(f"an index is not in range({n})")
    flat = np.ascontiguousarray(index, dtype=np.uint64).reshape(-1)
    images = permute_twin(flat, n, key) if extension is None else extension.permute(flat, n, key)
    result: Integers = images.view(np.int64).reshape(index.shape)
    return result


def permute_range(start: int, count: int, n: int, key: int) -> Integers:
    """The images of start .. start + count - 1 under the permutation of range(n), int64 [count]."""
    if not 0 <= start <= start + count <= n:
        raise ValueError(f"{start} .. {start + count} is not within range({n})")
    extension = native()
    if extension is not None:
        images: Integers = extension.permute_range(start, count, n, key)
        return images
    return permute_twin(np.arange(start, start + count, dtype=np.uint64), n, key).view(np.int64)
