"""Exact duplicates: documents whose text is the same, by 128-bit hash, the first in input order kept.

A 128-bit BLAKE2b hash [RFC 7693] stands for the text. Among n documents the chance of any two different ones sharing it
is below n^2 / 2^129: 1.5e-19 for ten billion documents. The hash does not depend on process, machine or Python version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

EXACT = "exact"  # the name of the array, and the first half of the reason in a manifest
NORMALISATIONS = ("exact", "whitespace")


def sign_exact(texts: Sequence[str], normalisation: str) -> NDArray[np.uint64]:
    """The hash of each text, uint64 [texts, 2].

    normalisation: "exact" hashes the UTF-8 bytes as they are; "whitespace" first makes every run of Unicode white space
    one space and strips the ends, so that indentation, line ends and trailing blanks make no difference.
    """
    content = bytearray()
    for text in texts:
        if normalisation == "whitespace":
            text = " ".join(text.split())
        content += hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return np.frombuffer(bytes(content), "<u8").astype(np.uint64, copy=False).reshape(-1, 2)


def first_of_equals(parts: Sequence[NDArray[np.uint64]]) -> NDArray[np.int64]:
    """For each document the number of the first one with the same hash, int64 [documents]; parts are [n, 2] each.

    Works by sorting one half of the hash, so that memory is below 30 bytes a document at its peak, beside the parts
    themselves, which may be memory-mapped.
    """
    first = _column(parts, 0)
    documents = len(first)
    order = np.argsort(first, kind="stable")
    sorted_first = first[order]
    del first
    repeated = np.zeros(documents, np.bool_)  # in sorted order: the first half is not alone
    equal = sorted_first[1:] == sorted_first[:-1]
    repeated[1:] |= equal
    repeated[:-1] |= equal
    members, halves = order[repeated], sorted_first[repeated]
    del order, sorted_first, repeated, equal
    # only these few need their other half; stable sorting leaves equal hashes in input order
    others = _column(parts, 1)[members]
    arrangement = np.lexsort((members, others, halves))
    members, halves, others = members[arrangement], halves[arrangement], others[arrangement]
    keep = np.arange(documents, dtype=np.int64)
    begins = np.ones(len(members), np.bool_)
    begins[1:] = (halves[1:] != halves[:-1]) | (others[1:] != others[:-1])
    keep[members] = members[np.maximum.accumulate(np.where(begins, np.arange(len(members)), 0))]
    return keep


def _column(parts: Sequence[NDArray[np.uint64]], number: int) -> NDArray[np.uint64]:
    return np.concatenate([part[:, number] for part in parts]) if parts else np.zeros(0, np.uint64)
