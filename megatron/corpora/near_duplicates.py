"""Near duplicates: documents that share most of their n-grams, found by MinHash and locality-sensitive hashing.

A document is the set of hashes of its n-grams of words. Its MinHash signature [Broder 1997] has bands x rows numbers,
and two documents agree in each with a probability of their Jaccard similarity s (n-grams in common over n-grams of
both). Two documents that agree in all rows of one band or more are neighbours, with a probability of

    1 - (1 - s^rows)^bands   [Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, section 3.4],

a steep S around (1/bands)^(1/rows). The default, 14 bands of 8 rows over 5-grams, is FineWeb's [Penedo et al. 2024,
arXiv 2406.17557]: the middle is at 0.72, and a pair of similarity 0.6 / 0.7 / 0.8 / 0.9 is found with probability
0.21 / 0.56 / 0.92 / 1.00.

Neighbours of neighbours form a cluster, and the first document of each cluster in input order is kept. Candidates are
not compared again, so that no text is needed to decide.

The only file that imports rensa, which computes the signatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.config.errors import UnavailableError
from megatron.corpora.word_hashes import Hashes, identifiers_of, mix, segments, window_hashes, words_of

NEAR = "near"  # the name of the array, and the first half of the reason in a manifest
UNITS = {"words": words_of, "identifiers": identifiers_of}
_REMEDY = "install it: pip install 'stagemix[near-dedup]' (or pip install 'rensa>=0.5')"
_WORDS_AT_ONCE = 1 << 17
_WORDS_REMEMBERED = 1 << 17


@dataclass(frozen=True, slots=True)
class NearOptions:
    """How near duplicates are found.

    units: "words" compares lower-case words, for prose; "identifiers" compares runs of letters, digits and underscores
    with their case, for source code. n: how many of them make an n-gram. shortest: a document of fewer units, at
    least n, has no near duplicates.
    """

    bands: int = 14
    rows: int = 8
    n: int = 5
    units: str = "words"
    shortest: int = 5
    seed: int = 1

    def to_json(self) -> dict[str, Any]:
        """All options, and the library whose signatures they are. Raises UnavailableError where it is missing."""
        return asdict(self) | {"library": library()}

    @property
    def threshold(self) -> float:
        """The similarity around which a pair begins to be found: (1/bands)^(1/rows)."""
        return float((1 / self.bands) ** (1 / self.rows))


def library() -> str:
    """The signature library and its version, such as "rensa 0.5.0"."""
    try:
        return f"rensa {metadata.version('rensa')}"
    except metadata.PackageNotFoundError:
        raise UnavailableError(f"near-duplicate removal needs the package rensa: {_REMEDY}") from None


class NearSigner:
    """Computes band keys. Raises UnavailableError where rensa is missing."""

    def __init__(self, options: NearOptions) -> None:
        try:
            from rensa import RMinHash
        except ImportError as error:
            raise UnavailableError(f"near-duplicate removal needs the package rensa ({error}): {_REMEDY}") from None
        self._options = options
        self._library = RMinHash
        self._units = UNITS[options.units]
        self._known: dict[str, int] = {}

    def sign(self, texts: Sequence[str]) -> NDArray[np.uint64]:
        """The band keys of each text, uint64 [texts, bands]; a row of zeros for a text that is too short."""
        keys = np.zeros((len(texts), self._options.bands), np.uint64)
        begin, pieces, lengths = 0, [], []  # hashes of words, and how many of them each text from `begin` on has
        waiting = 0
        for number, text in enumerate(texts):
            hashes = [self._hashes(self._units(segment)) for segment in segments(text)]
            pieces += hashes
            lengths.append(sum(map(len, hashes)))
            waiting += lengths[-1]
            if waiting > _WORDS_AT_ONCE or number + 1 == len(texts):
                keys[begin : number + 1] = self._keys(np.concatenate(pieces), np.array(lengths, np.int64))
                begin, pieces, lengths, waiting = number + 1, [], [], 0
        return keys

    def _hashes(self, words: list[str]) -> Hashes:
        """The library's hash of each word. Those met before are remembered, since few make up most of a corpus."""
        known = self._known
        try:
            return np.fromiter(map(known.__getitem__, words), np.uint64, len(words))
        except KeyError:
            if len(known) > _WORDS_REMEMBERED:
                known.clear()
            new = [word for word in dict.fromkeys(words) if word not in known]
            known.update(zip(new, self._library.hash_token_sets([new])[0], strict=True))
            return np.fromiter(map(known.__getitem__, words), np.uint64, len(words))

    def _keys(self, hashes: Hashes, lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Band keys of texts whose words' hashes follow each other, uint64 [texts, bands]."""
        options = self._options
        keys = np.zeros((len(lengths), options.bands), np.uint64)
        long = lengths >= max(options.shortest, options.n)
        if not long.any():
            return keys
        # n-grams within one text: the last n - 1 windows of each run into the next one, short texts are skipped whole
        ends = np.cumsum(lengths)
        inside = np.repeat(long, lengths)
        for back in range(1, options.n):
            inside[np.maximum(ends - back, 0)[long]] = False
        grams = window_hashes(hashes, options.n)
        grams = grams[inside[: len(grams)]]
        offsets = np.cumsum([0, *(lengths[long] - options.n + 1)]).astype(np.uint64)
        matrix = self._library.digest_matrix_from_flat_token_hashes(
            grams, offsets, options.bands * options.rows, options.seed
        )
        rows = np.array(matrix.to_rows(), np.uint64).reshape(-1, options.bands, options.rows)
        band_keys = np.zeros(rows.shape[:2], np.uint64)
        for row in range(options.rows):
            band_keys = mix(band_keys ^ rows[:, :, row])
        keys[long] = np.maximum(band_keys, np.uint64(1))  # zero says that a document has no keys
        return keys


def first_of_clusters(parts: Sequence[NDArray[np.uint64]]) -> NDArray[np.int64]:
    """For each document the number of the first one in its cluster, int64 [documents]; parts are [n, bands] each.

    Two documents with the same key in one band are in one cluster. Bands are read one at a time; memory is about 35
    bytes a document at its peak, beside what the parts themselves hold.
    """
    documents = sum(map(len, parts))
    label = np.arange(documents, dtype=np.int64)
    for band in range(parts[0].shape[1] if parts else 0):
        column = np.concatenate([part[:, band] for part in parts])
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        del column
        same = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] != 0))
        del ordered
        # a run of equal keys is a chain of neighbouring pairs
        _unite(label, order[same], order[same + 1])
    return label


def _unite(label: NDArray[np.int64], one: NDArray[np.int64], other: NDArray[np.int64]) -> None:
    """Join the clusters of pairs, in place: label[i] stays the smallest member of i's cluster.

    Union-find over whole arrays: of every pair of different clusters the larger label is hooked to the smaller one,
    labels are followed to their ends, and pairs that have become one cluster fall away.
    """
    while len(one):
        one, other = label[one], label[other]
        different = one != other
        one, other = one[different], other[different]
        if not len(one):
            return
        np.minimum.at(label, np.maximum(one, other), np.minimum(one, other))
        while True:
            followed = label[label]
            if np.array_equal(followed, label):
                break
            label[:] = followed
