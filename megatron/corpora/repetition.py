"""Repeated n-grams of words, exactly and without a string for each: the arithmetic of the Gopher repetition filters.

Words get numbers, and an (n+1)-gram is a pair of n-grams that overlap by n - 1 words. Both members of a pair that
occurs twice occur twice themselves, so that each length looks only at what was repeated one length below. Most text
has few repeated 3-grams, and the work ends there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]

_FEW = 64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class RepeatedGrams:
    """The n-grams of a sequence of words that occur at least twice, n from 1 upwards."""

    def __init__(self, words: Sequence[str]) -> None:
        numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
        grams = np.fromiter(map(numbers.__getitem__, words), np.int64, len(words))
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        often = np.flatnonzero(np.bincount(grams, minlength=1)[grams] > 1)
        self._lengths = [(often, grams[often])]

    def at(self, n: int) -> tuple[Positions, Positions]:
        """Where repeated n-grams begin, ascending, and a number for each that tells which n-gram it is."""
        while len(self._lengths) < n:
            positions, grams = self._lengths[-1]
            if not len(positions):
                return positions, grams
            follows = np.flatnonzero(positions[1:] == positions[:-1] + 1)
            pairs = grams[follows] * (int(grams.max()) + 1) + grams[follows + 1]
            self._lengths.append(_repeated(positions[follows], pairs))
        return self._lengths[n - 1]

    def top_characters(self, n: int) -> int:
        """Characters in all occurrences of the most frequent n-gram, its words joined by one space; 0 if none repeats.

        Of several equally frequent ones it is the one that comes first.
        """
        positions, grams = self.at(n)
        if not len(positions):
            return 0
        _, first, counts = np.unique(grams, return_index=True, return_counts=True)
        count = int(counts.max())
        begin = int(positions[first[counts == count].min()])
        return count * (self._characters(begin, n) + n - 1)

    def duplicate_characters(self, n: int, enough: float) -> int:
        """Characters of n-grams that occurred before, none counted twice; exact where it exceeds `enough`.

        Reads the words from the left: an n-gram seen before is counted and passed over whole, any other is remembered
        and passed over by one word. Where even the union of all later occurrences has no more than `enough` characters,
        that union is the answer, an upper bound, and the reading is spared.
        """
        positions, grams = self.at(n)
        if not len(positions):
            return 0
        later = np.ones(len(positions), np.bool_)
        later[np.unique(grams, return_index=True)[1]] = False
        bound = self._union(positions[later], n)
        if bound <= enough:
            return bound
        seen: set[int] = set()
        characters, following = 0, 0
        for position, gram in zip(positions.tolist(), grams.tolist(), strict=True):
            if position < following:
                continue
            if gram in seen:
                characters += self._characters(position, n)
                following = position + n
            else:
                seen.add(gram)
        return characters

    def _characters(self, begin: int, n: int) -> int:
        return int(self._starts[begin + n] - self._starts[begin])

    def _union(self, positions: Positions, n: int) -> int:
        """Characters in words that any of the n-grams at ascending positions covers."""
        ends = positions + n
        begins = np.maximum(positions, np.concatenate([np.zeros(1, np.int64), ends[:-1]]))
        return int((self._starts[ends] - self._starts[begins]).sum())


def _repeated(positions: Positions, grams: Positions) -> tuple[Positions, Positions]:
    """Those positions whose gram occurs at least twice, with the grams numbered densely."""
    if len(grams) > _FEW:
        # A gram alone in its bucket occurs once. Sorting, which is what costs, is then for few.
        bits = len(grams).bit_length() + 1
        buckets = (grams.astype(np.uint64) * _GOLDEN >> np.uint64(64 - bits)).astype(np.int64)
        shared = np.bincount(buckets, minlength=1 << bits)[buckets] > 1
        positions, grams = positions[shared], grams[shared]
    _, inverse, counts = np.unique(grams, return_inverse=True, return_counts=True)
    numbers = np.cumsum(counts > 1) - 1
    kept = counts[inverse] > 1
    return positions[kept], numbers[inverse[kept]]
