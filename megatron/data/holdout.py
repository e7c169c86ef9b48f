"""Which documents are held out for validation: by a keyed hash of the document, the same in every run.

The hash sees the file's content fingerprint and the document's number in it, and nothing else: no seed, training
stage, arm, source name or path. So no arm of a study trains on what another validates with.
"""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from megatron.data.native import native
from megatron.data.permutation import GOLDEN, derive_key, mix64_array

_SALT = "stagemix held-out documents 1"
_CHUNK = 1 << 20


def holdout_base(dataset_fingerprint: str) -> int:
    """The 64-bit word from which the hashes of a file's documents count on."""
    return derive_key(_SALT, dataset_fingerprint)


def holdout_threshold(fraction: Decimal | Fraction | int) -> int:
    """The 64-bit word below which a document's hash holds it out: floor(fraction * 2^64). 0 <= fraction < 1."""
    exact = Fraction(fraction)
    if not 0 <= exact < 1:
        raise ValueError(f"a held-out fraction is at least 0 and below 1, not {fraction}")
    return int(exact * 2**64)


def hashes_below_twin(base: int, count: int, threshold: int) -> npt.NDArray[np.bool_]:
    """Whether mix64(base + (i + 1) * GOLDEN) is below the threshold, for i in range(count); the C++ equals it."""
    below = np.empty(count, dtype=np.bool_)
    for start in range(0, count, _CHUNK):
        numbers = np.arange(start + 1, min(start + _CHUNK, count) + 1, dtype=np.uint64)
        hashes = mix64_array(numbers * np.uint64(GOLDEN) + np.uint64(base))
        below[start : start + _CHUNK] = hashes < np.uint64(threshold)
    return below


def held_out(
    dataset_fingerprint: str, document_count: int, fraction: Decimal | Fraction | int
) -> npt.NDArray[np.bool_]:
    """For each document of a file, whether it is held out: bool [document_count]."""
    base, threshold = holdout_base(dataset_fingerprint), holdout_threshold(fraction)
    extension = native()
    if extension is None:
        return hashes_below_twin(base, document_count, threshold)
    mask: npt.NDArray[np.bool_] = extension.hashes_below(base, document_count, threshold)
    return mask
