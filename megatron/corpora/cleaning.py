"""Cleaning a corpus: which documents are kept out of a dataset, for a reason with a name.

Three steps, each of them optional, in this order:

1. `Cleaner`, in the workers, before tokenizing: quality filters and decontamination look at one document alone.
2. `Signer`, in the workers: the arrays by which duplicates are found (16 bytes a document for exact ones, 8 bytes a
   band for near ones).
3. `Decider`, once, where all parts meet: which documents repeat an earlier one. The first in input order is kept.

No result depends on how the documents were spread over workers and parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.corpora.decontamination import DecontaminationOptions, EvaluationSet
from megatron.corpora.document import Document
from megatron.corpora.exact_duplicates import EXACT, first_of_equals, sign_exact
from megatron.corpora.filters import ChosenFilter, DocumentFilter
from megatron.corpora.near_duplicates import NEAR, NearOptions, NearSigner, first_of_clusters


@dataclass(frozen=True, slots=True)
class CleaningOptions:
    """What cleans a corpus; the default cleans nothing. Frozen and picklable: workers get it as it is.

    filters: in the order in which they are tried; the first that rejects a document gives its name as the reason.
    exact: "" for no exact deduplication, else the normalisation before hashing: "exact" or "whitespace".
    near: near-duplicate removal; None for none.
    decontamination: evaluation sets to keep out; None for none.
    """

    filters: tuple[ChosenFilter, ...] = ()
    exact: str = ""
    near: NearOptions | None = None
    decontamination: DecontaminationOptions | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything that decides which documents are kept, for manifests and the fingerprint of a resumable job.

        The same choice gives the same value on every machine: evaluation files count by their content, not their path.
        Reads the evaluation files when `prepare` has not. Raises DataError for one that cannot be read.
        """
        return {
            "filters": [chosen.to_json() for chosen in self.filters],
            "exact_duplicates": self.exact or None,
            "near_duplicates": None if self.near is None else self.near.to_json(),
            "decontamination": None if self.decontamination is None else self.decontamination.to_json(),
        }

    @property
    def finds_duplicates(self) -> bool:
        """Whether `Signer` gives arrays and `Decider` has something to decide."""
        return bool(self.exact) or self.near is not None


def prepare(options: CleaningOptions, folder: Path) -> CleaningOptions:
    """Read the evaluation sets once, write their n-grams below `folder`, and give the options that open them from
    there.

    Call it in the main process before workers start, with a folder that they all see; each then maps the same file.
    Its work is kept: called again with the same sets and the same folder, it reads what is there. Without
    decontamination the options come back as they are and nothing is written. Raises DataError for a bad evaluation
    file.
    """
    if options.decontamination is None:
        return options
    return replace(options, decontamination=options.decontamination.prepared(folder))


class Cleaner:
    """Judges documents one at a time: `Cleaner(options).reject(document)`."""

    def __init__(self, options: CleaningOptions) -> None:
        self._filter = DocumentFilter(options.filters)
        self._evaluation = None if options.decontamination is None else EvaluationSet.open(options.decontamination)

    def reject(self, document: Document) -> str | None:
        """The name of the filter that rejects a document, "decontamination", or None for one to keep."""
        reason = self._filter(document)
        if reason is None and self._evaluation is not None and self._evaluation.contaminates(document.text):
            return "decontamination"
        return reason


class Signer:
    """Signs documents for `Decider`. Raises UnavailableError where near duplicates need a library that is missing."""

    def __init__(self, options: CleaningOptions) -> None:
        self._exact = options.exact
        self._near = None if options.near is None else NearSigner(options.near)

    def sign(self, texts: Sequence[str]) -> dict[str, NDArray[np.uint64]]:
        """Arrays with one row a text: "exact" [texts, 2] and "near" [texts, bands], those that were asked for."""
        arrays: dict[str, NDArray[np.uint64]] = {}
        if self._exact:
            arrays[EXACT] = sign_exact(texts, self._exact)
        if self._near is not None:
            arrays[NEAR] = self._near.sign(texts)
        return arrays


class Decider:
    """Finds the documents that repeat an earlier one, from the arrays of all documents in input order."""

    def __init__(self, options: CleaningOptions) -> None:
        self._names = [EXACT] * bool(options.exact) + [NEAR] * (options.near is not None)
        self._parts: dict[str, list[NDArray[np.uint64]]] = {name: [] for name in self._names}
        self._documents = 0

    def add(self, arrays: Mapping[str, NDArray[np.uint64]]) -> None:
        """Take the arrays of the next documents, as `Signer.sign` gave them.

        They are kept, not copied: give memory-mapped arrays, and the signatures stay on disk.
        """
        rows = {len(arrays[name]) for name in self._names}
        if len(rows) > 1:
            raise ValueError(f"arrays of one part have different lengths: {sorted(rows)}")
        for name in self._names:
            self._parts[name].append(arrays[name])
        self._documents += next(iter(rows), 0)

    def finish(self) -> tuple[NDArray[np.bool_], dict[str, int]]:
        """Which documents to drop, bool [documents], and how many by reason ("exact-duplicate", "near-duplicate").

        An exact duplicate counts as such alone. Nothing asked for: an empty array and no counts.
        """
        dropped = np.zeros(self._documents, np.bool_)
        counts: dict[str, int] = {}
        for name, keeper in ((EXACT, first_of_equals), (NEAR, first_of_clusters)):
            if name in self._names:
                repeats = keeper(self._parts[name]) != np.arange(self._documents)
                counts[f"{name}-duplicate"] = int(np.count_nonzero(repeats & ~dropped))
                dropped |= repeats
        return dropped, counts
