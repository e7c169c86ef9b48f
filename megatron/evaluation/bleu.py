"""BLEU of a corpus (Papineni et al. 2002) over words between white space, from counts that a bootstrap can resample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ORDER = 4
Counts = NDArray[np.float64]


def bleu_counts(answer: str, reference: str) -> list[int]:
    """Of one answer: matching n-grams (n = 1 to 4, clipped), its n-grams, its length, the reference's length: [10]."""
    said, right = answer.split(), reference.split()
    matches, totals = [], []
    for order in range(1, ORDER + 1):
        ours, theirs = _grams(said, order), _grams(right, order)
        matches.append(sum((ours & theirs).values()))
        totals.append(sum(ours.values()))
    return [*matches, *totals, len(said), len(right)]


def bleu_of(sums: Counts) -> Counts:
    """BLEU between 0 and 1 of summed counts [..., 10]: geometric mean of the precisions times the brevity penalty.

    Matches and totals above single words count one more (Lin and Och 2004, "ORANGE"), so that short corpora have one.
    """
    matches, totals = sums[..., :ORDER], sums[..., ORDER : 2 * ORDER]
    more = np.array([0.0, *[1.0] * (ORDER - 1)])
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(matches + more) - np.log(totals + more)
        brevity = np.minimum(0.0, 1.0 - sums[..., -1] / sums[..., -2])
        found = np.exp(logs.mean(axis=-1) + brevity)
    return np.where((matches[..., 0] > 0) & (sums[..., -2] > 0), found, 0.0)


def _grams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[at : at + order]) for at in range(len(words) - order + 1))
