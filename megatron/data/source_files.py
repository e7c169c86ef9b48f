"""The documents of a source: its files in order, the slice it takes of them, the documents held out of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from hashlib import sha256
from itertools import accumulate
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron.config.errors import DataError
from megatron.data.document_stream import DocumentRule
from megatron.data.holdout import held_out, holdout_base, holdout_threshold
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.loss_mask import FIELD, LossMask, has_loss_mask
from megatron.data.native import native
from megatron.data.piece_table import PieceTable, make_piece_table

Share = Decimal | Fraction | int


class TokenFile(Protocol):
    """What a source asks of an opened indexed dataset."""

    @property
    def fingerprint(self) -> str:
        """Identifies the content: tokens and document bounds; not the name or the place."""

    @property
    def document_count(self) -> int:
        """Documents, empty ones counted."""

    def document_lengths(self) -> npt.NDArray[np.integer]:
        """Tokens of each document, its end-of-document token counted."""

    def tokens(self, document: int, start: int, end: int) -> npt.NDArray[np.integer]:
        """Ids [start, end) of a document."""


class SourceFiles:
    """The files of a source in order, with its slice by document position and its held-out fraction.

    Documents are numbered from 0 through all files in order, whatever the slice. The slice holds documents
    floor(start * documents) .. floor(end * documents) - 1. Raises DataError for no files, and where the slice holds
    the documents of one content twice.
    """

    def __init__(
        self, files: Sequence[TokenFile], document_slice: tuple[Share, Share], holdout_fraction: Share
    ) -> None:
        start, end = Fraction(document_slice[0]), Fraction(document_slice[1])
        if not 0 <= start <= end <= 1:
            raise ValueError(f"a slice needs 0 <= start <= end <= 1, not {document_slice[0]}, {document_slice[1]}")
        if not files:
            raise DataError("a source needs at least one file: set its data = [prefixes of .bin/.idx]")
        self.files = tuple(files)
        self.document_slice = (start, end)
        self.holdout_fraction = Fraction(holdout_fraction)
        self.file_fingerprints = tuple(file.fingerprint for file in self.files)
        counts = [file.document_count for file in self.files]
        self.file_starts = [0, *accumulate(counts)]
        self.document_count = self.file_starts[-1]
        self.first = int(start * self.document_count)
        self.last = int(end * self.document_count)
        self._lengths = [file.document_lengths() for file in self.files]
        self._loss_tokens: dict[tuple[bool, DocumentRule | None], int] = {}
        words = ["stagemix source 1", str(start), str(end), str(self.holdout_fraction), *self.file_fingerprints]
        self.fingerprint = sha256("".join(f"{len(word)}:{word}" for word in words).encode()).hexdigest()
        self._refuse_repeated_files()

    def _refuse_repeated_files(self) -> None:
        seen: dict[str, list[int]] = {}
        for number, fingerprint in enumerate(self.file_fingerprints):
            for other in seen.setdefault(fingerprint, []):
                if self.slice_of_file(other) & self.slice_of_file(number):
                    raise DataError(
                        f"data[{other}] and data[{number}] of one source have the same content, so that its documents "
                        "would be trained on twice an epoch: list it once, and raise max_epochs to repeat it"
                    )
            seen[fingerprint].append(number)

    def slice_of_file(self, number: int) -> DocumentRange:
        """The documents of a file that are in the slice, numbered within the file."""
        start, end = self.file_starts[number], self.file_starts[number + 1]
        return DocumentRange(max(self.first, start) - start, min(self.last, end) - start)

    def locate(self, document: int) -> tuple[int, int]:
        """(file, document within it) of a document numbered through the source. Raises IndexError."""
        if not 0 <= document < self.document_count:
            raise IndexError(f"document {document} is not among the source's {self.document_count}")
        number = bisect_right(self.file_starts, document) - 1
        return number, document - self.file_starts[number]

    def document_length(self, document: int) -> int:
        """Tokens of a document, held out or not."""
        number, local = self.locate(document)
        return int(self._lengths[number][local])

    def document_lengths(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of documents that are numbered through the source, int64 of the same length."""
        lengths = np.empty(len(documents), dtype=np.int64)
        numbers = np.searchsorted(self.file_starts, documents, side="right") - 1
        for number in np.unique(numbers):
            here = numbers == number
            lengths[here] = self._lengths[number][documents[here] - self.file_starts[number]]
        return lengths

    def kept_documents(self) -> npt.NDArray[np.int64]:
        """Numbers of the documents in the slice that are not held out, ascending, empty ones among them."""
        kept = np.ones(max(0, self.last - self.first), dtype=np.bool_)
        kept[self.held_out_documents() - self.first] = False
        return np.flatnonzero(kept) + self.first

    def tokens(self, document: int, start: int, end: int) -> npt.NDArray[np.integer]:
        """Ids start .. end - 1 of a document, fewer where it ends before."""
        number, local = self.locate(document)
        return self.files[number].tokens(local, start, min(end, int(self._lengths[number][local])))

    @cached_property
    def reader(self) -> object | None:
        """What the extension's `gather` reads documents with; None without it, or for files that are not mapped."""
        extension = native()
        if extension is None:
            return None
        arrays = [file.arrays for file in self.files if isinstance(file, IndexedDataset)]
        return extension.TokenFiles(arrays) if len(arrays) == len(self.files) else None

    @cached_property
    def masked_reader(self) -> object | None:
        """As `reader`, for samples whose targets are only those that the loss masks mark."""
        extension = native()
        if extension is None:
            return None
        arrays = [file.arrays for file in self.files if isinstance(file, IndexedDataset)]
        reader: object = extension.TokenFiles(arrays, [mask.packed for mask in self.masks])
        return reader

    @cached_property
    def masks(self) -> tuple[LossMask, ...]:
        """The loss mask of each file, opened and checked. Raises DataError where one is missing or damaged."""
        opened = []
        for file in self.files:
            if not isinstance(file, IndexedDataset):
                raise DataError("a source that is not of indexed files has no loss mask")
            opened.append(LossMask.open(file.prefix, file.manifest or {}))
        return tuple(opened)

    @cached_property
    def mask_checksum(self) -> str | None:
        """Identifies its loss masks as the manifests state them; None where a file has none."""
        manifests = [file.manifest for file in self.files if isinstance(file, IndexedDataset)]
        stated = [manifest[FIELD] for manifest in manifests if manifest is not None and has_loss_mask(manifest)]
        if len(stated) < len(self.files):
            return None
        words = [str(field.get("sha256")) if isinstance(field, dict) else "" for field in stated]
        return sha256("\n".join(["stagemix loss mask 1", *words]).encode()).hexdigest()

    def learned(self, document: int, start: int, end: int) -> npt.NDArray[np.bool_]:
        """Whether the masks mark tokens start .. end - 1 of a document, fewer where it ends before."""
        number, local = self.locate(document)
        file = self.files[number]
        assert isinstance(file, IndexedDataset)
        begin, length = file.document_start(local), int(self._lengths[number][local])
        return self.masks[number].bits(begin + start, begin + min(end, length))

    def targets_by_document(self, masked: bool, longest: int | None = None) -> npt.NDArray[np.int64]:
        """How many targets each document has, held out or not, int64 [documents]: every token but its first, or of
        these what the masks mark. longest: at most so many, those in front."""
        if not masked:
            targets = np.concatenate([lengths.astype(np.int64) for lengths in self._lengths]) - 1
            most = int(targets.max(initial=0)) if longest is None else longest
            counts: npt.NDArray[np.int64] = np.minimum(np.maximum(targets, 0), most)
            return counts
        parts = []
        for file, mask in zip(self.files, self.masks, strict=True):
            assert isinstance(file, IndexedDataset)
            parts.append(mask.targets_by_document(file.document_starts(), longest))
        return np.concatenate(parts)

    def loss_tokens(self, masked: bool, rule: DocumentRule | None = None) -> int:
        """Targets of one epoch that count, in the documents that are trained on: those that the masks mark, or all.

        rule: of a padded stage, which takes some of the documents, and of long ones the first tokens. Counted once.
        """
        if (masked, rule) not in self._loss_tokens:
            documents = self.kept_documents()
            if rule is not None:
                documents = documents[rule.takes(self.document_lengths(documents))]
            targets = self.targets_by_document(masked, rule.seq_length if rule is not None else None)
            self._loss_tokens[masked, rule] = int(targets[documents].sum())
        return self._loss_tokens[masked, rule]

    def held_out_documents(self) -> npt.NDArray[np.int64]:
        """Numbers of the held-out documents within the slice, ascending, empty documents among them."""
        found = [np.empty(0, dtype=np.int64)]
        for number, (fingerprint, start) in enumerate(zip(self.file_fingerprints, self.file_starts, strict=False)):
            inside = self.slice_of_file(number)
            mask = held_out(fingerprint, inside.end, self.holdout_fraction)[inside.start :] if inside else np.empty(0)
            found.append(np.flatnonzero(mask) + (start + inside.start))
        return np.concatenate(found)

    def piece_table(self, piece_tokens: int, threads: int) -> PieceTable:
        """The pieces of the slice's kept documents. Raises DataError where the lengths are impossible."""
        bases = [holdout_base(fingerprint) for fingerprint in self.file_fingerprints]
        threshold = holdout_threshold(self.holdout_fraction)
        try:
            return make_piece_table(self._lengths, bases, self.first, self.last, threshold, piece_tokens, threads)
        except ValueError as error:
            raise DataError(f"the document lengths of a source are impossible: {error}") from error


class DocumentRange:
    """Documents start .. end - 1 of a file; false where there are none."""

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = max(start, end)

    def __bool__(self) -> bool:
        return self.end > self.start

    def __and__(self, other: DocumentRange) -> DocumentRange:
        return DocumentRange(max(self.start, other.start), min(self.end, other.end))
