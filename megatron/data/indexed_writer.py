"""Writing Megatron's indexed datasets (`P.bin`, `P.idx`), with our manifest `P.json` beside them.

`indexed_format` has the layout. A dataset is published whole or not at all, its `.idx` last.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron.config.durable_files import sync_path
from megatron.config.errors import ConfigError, DataError
from megatron.data.indexed_format import CHUNK, CODE_OF_DTYPE, HEADER, MAGIC, VERSION, path_of
from megatron.data.loss_mask import FIELD as MASK_FIELD
from megatron.data.loss_mask import SUFFIX as MASK_SUFFIX
from megatron.data.loss_mask import LossMaskWriter


class IndexedDatasetWriter:
    """Writes a dataset document by document, and publishes it whole or not at all.

    Tokens stream to `P.bin.partial`. `finish()` (or leaving the `with` block without an error) fsyncs and renames
    `.bin`, the manifest `P.json`, and `.idx` last, so that a reader never sees a part. An error leaves nothing behind.
    A dataset of that name that exists already is refused unless `overwrite`. One writer a prefix at a time.
    """

    def __init__(
        self,
        prefix: str | Path,
        dtype: DTypeLike,
        *,
        overwrite: bool = False,
        max_sequence_tokens: int = 2**31 - 1,
    ) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype.kind not in "iu" or self.dtype.name not in CODE_OF_DTYPE:
            raise DataError(f"{prefix}: token ids cannot be stored as {self.dtype.name}: use uint16 or int32")
        self.token_count = 0
        self.max_token_id = -1
        self.manifest_fields: dict[str, Any] = {}
        self.mask: LossMaskWriter | None = None  # published with the rest; a dataset has none unless one is set
        self.document_count = 0
        self._sizes = array("i")
        self._split: list[tuple[int, int]] = []  # documents of several sequences: number, and sequences beyond one
        self._described_tokens = 0
        self._max_sequence_tokens = max_sequence_tokens
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)
        self._finished = False
        refuse_existing(self.prefix, overwrite)
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._partial = path_of(self.prefix, ".bin.partial")
        self._file = self._partial.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A writer that finished meanwhile has renamed this very file: it is published and must not be truncated.
            if os.fstat(self._file.fileno()).st_ino != self._partial.stat().st_ino:
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            self._file.close()
            raise DataError(f"{self._partial}: another process is writing this dataset now") from None
        self._file.truncate(0)

    def add_document(self, ids: NDArray[Any] | Sequence[int]) -> None:
        """One document, its end-of-document token included. Ids outside the dtype are a DataError."""
        tokens = np.asarray(ids)
        self.add_documents(tokens, [len(tokens)])

    def add_documents(self, ids: NDArray[Any], lengths: Sequence[int] | NDArray[Any]) -> None:
        """Several documents, their ids one after another in one array, and the length of each."""
        high = -1
        if len(ids):
            if ids.dtype.kind not in "iu":
                raise DataError(
                    f"{self.prefix}: document {self.document_count}: ids are {ids.dtype}, not whole numbers"
                )
            low, high, limit = int(ids.min()), int(ids.max()), int(np.iinfo(self.dtype).max)
            if low < 0 or high > limit:
                raise DataError(
                    f"{self.prefix}: documents from {self.document_count} on: token id {low if low < 0 else high} does "
                    f"not fit 0..{limit} ({self.dtype.name})"
                )
        given = np.asarray(lengths, np.int64)
        if int(given.sum()) != len(ids):
            raise ValueError("the documents' lengths do not add up to the ids given")
        self.write_tokens(ids.astype(self.dtype, copy=False), high)
        self.end_documents(given)

    def write_tokens(self, ids: NDArray[Any], highest_id: int) -> None:
        """Ids of the writer's dtype, known to be in 0..highest_id; `end_documents` says where documents end in them."""
        content = np.ascontiguousarray(ids, self.dtype.newbyteorder("<")).view(np.uint8).data
        hashed = self._hasher.submit(self._digest.update, content)  # both leave the GIL
        self._file.write(content)
        hashed.result()
        self.token_count += len(ids)
        self.max_token_id = max(self.max_token_id, highest_id)

    def end_documents(self, lengths: NDArray[np.int64]) -> None:
        """The lengths of the next documents, whose tokens are written before or after. One longer than a sequence can
        be (2^31 - 1 tokens) becomes several sequences of one document."""
        limit = self._max_sequence_tokens
        sizes = lengths
        long = np.flatnonzero(lengths > limit)
        if len(long):
            counts = np.maximum(1, -(-lengths // limit))
            sizes = np.full(int(counts.sum()), limit, np.int64)
            sizes[np.cumsum(counts) - 1] = lengths - (counts - 1) * limit
            self._split.extend((self.document_count + int(d), int(counts[d]) - 1) for d in long)
        self._sizes.frombytes(sizes.astype(np.int32).tobytes())
        self.document_count += len(lengths)
        self._described_tokens += int(lengths.sum())

    def finish(self) -> dict[str, Any]:
        """Publish, and give the manifest. Raises DataError where nothing was added."""
        if self.token_count == 0:
            raise DataError(f"{self.prefix}: no tokens were added: an empty dataset is not written")
        if self._described_tokens != self.token_count:
            raise ValueError(f"documents have {self._described_tokens} tokens, and {self.token_count} were written")
        self._file.flush()
        os.fsync(self._file.fileno())
        index_partial = path_of(self.prefix, ".idx.partial")
        index_sha256 = self._write_index(index_partial)
        mask = self._finish_mask()
        manifest = {
            "format": 1,
            "documents": self.document_count,
            "tokens": self.token_count,
            "dtype": self.dtype.name,
            "bin_sha256": self._digest.hexdigest(),
            "idx_sha256": index_sha256,
            "bin_bytes": self.token_count * self.dtype.itemsize,
            "max_token_id": self.max_token_id,
            **mask,
            **self.manifest_fields,
        }
        manifest_partial = path_of(self.prefix, ".json.partial")
        with manifest_partial.open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.write("\n")
            _sync_and_close(file)
        # The old .idx goes first, so that at no moment an .idx stands beside a .bin that is not its own.
        path_of(self.prefix, ".idx").unlink(missing_ok=True)
        os.replace(self._partial, path_of(self.prefix, ".bin"))
        if self.mask is not None:
            self.mask.publish()
        else:
            path_of(self.prefix, MASK_SUFFIX).unlink(missing_ok=True)  # of a dataset that this one replaces
        os.replace(manifest_partial, path_of(self.prefix, ".json"))
        sync_path(self.prefix.parent)
        os.replace(index_partial, path_of(self.prefix, ".idx"))
        sync_path(self.prefix.parent)
        self._finished = True
        self._file.close()
        return manifest

    def _finish_mask(self) -> dict[str, Any]:
        if self.mask is None:
            return {}
        if self.mask.token_count != self.token_count:
            raise ValueError(f"the loss mask has {self.mask.token_count} bits for {self.token_count} tokens")
        return {MASK_FIELD: self.mask.finish()}

    def abandon(self) -> None:
        """Remove what was written so far. Nothing that was published is touched."""
        self._hasher.shutdown()
        with suppress(OSError):  # on a full disk, closing tries once more to write what is buffered
            self._file.close()
        if not self._finished:
            if self.mask is not None:
                self.mask.abandon()
            for suffix in (".bin.partial", ".idx.partial", ".json.partial"):
                path_of(self.prefix, suffix).unlink(missing_ok=True)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._finished:
                self.finish()
        finally:
            self.abandon()

    def _write_index(self, path: Path) -> str:
        sizes = np.frombuffer(self._sizes, np.int32)
        documents = self.document_count
        split = np.array(self._split, np.int64).reshape(-1, 2)
        extra = np.concatenate([[0], np.cumsum(split[:, 1])])
        digest = hashlib.sha256()
        with path.open("wb") as file:

            def put(content: bytes) -> None:
                file.write(content)
                digest.update(content)

            put(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[self.dtype.name], len(sizes), documents + 1))
            for begin in range(0, len(sizes), CHUNK):
                put(sizes[begin : begin + CHUNK].astype("<i4").tobytes())
            pointer = 0
            for begin in range(0, len(sizes), CHUNK):
                lengths = sizes[begin : begin + CHUNK].astype(np.int64) * self.dtype.itemsize
                ends = np.cumsum(lengths) + pointer
                put((ends - lengths).astype("<i8").tobytes())
                pointer = int(ends[-1])
            for begin in range(0, documents + 1, CHUNK):
                numbers = np.arange(begin, min(begin + CHUNK, documents + 1), dtype=np.int64)
                # the first sequence of a document: one for each before it, and what split ones have beyond one
                numbers += extra[np.searchsorted(split[:, 0], numbers)] if len(split) else 0
                put(numbers.astype("<i8").tobytes())
            _sync_and_close(file)
        return digest.hexdigest()


def refuse_existing(prefix: Path, overwrite: bool) -> None:
    """Raise ConfigError where a dataset of this name is there and may not be replaced."""
    existing = [path for suffix in (".idx", ".bin", ".json") if (path := path_of(prefix, suffix)).exists()]
    if existing and not overwrite:
        raise ConfigError(f"{existing[0]}: exists already: give another output prefix, or --overwrite to replace it")


def _sync_and_close(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
