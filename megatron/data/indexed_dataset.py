"""Reading and writing Megatron's indexed datasets (`P.bin`, `P.idx`), with our manifest `P.json` beside them.

`indexed_format` has the layout and the checks. Nothing of a file is used before it has been checked.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron.config.errors import ConfigError, DataError
from megatron.data.indexed_format import (
    CHUNK,
    CODE_OF_DTYPE,
    HEADER,
    MAGIC,
    VERSION,
    check_document_index,
    check_sequences,
    map_bin,
    map_file,
    path_of,
    read_header,
    refuse,
)
from megatron.data.indexed_format import dtype_for_vocab as dtype_for_vocab

_ALWAYS_SCANNED_TOKENS = 1 << 28
_FOREIGN_SUFFIX = "_text_document"


class IndexedDataset:
    """One `.bin/.idx` pair, memory-mapped, checked when opened. Holds no copy of anything in the files.

    `tokens()` gives views. Documents count their end-of-document token. Pickles as its prefix (opened anew).
    Raises DataError where a file is missing, damaged, empty, or contradicts itself or its manifest `P.json`.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix: Path = _resolve_prefix(Path(prefix))
        index_path = path_of(self.prefix, ".idx")
        self._index_map = map_file(index_path)
        self.dtype, sequences, document_entries = read_header(index_path, self._index_map)
        offset = HEADER.size
        self._sizes: NDArray[np.int32] = np.frombuffer(self._index_map, "<i4", sequences, offset)
        offset += 4 * sequences
        self._pointers: NDArray[np.int64] = np.frombuffer(self._index_map, "<i8", sequences, offset)
        offset += 8 * sequences
        self._index: NDArray[np.int64] = np.frombuffer(self._index_map, "<i8", document_entries, offset)
        self.document_count: int = document_entries - 1
        self._one_sequence_each = check_document_index(index_path, self._index, sequences)
        token_bytes = check_sequences(index_path, self._sizes, self._pointers, self.dtype.itemsize)
        self.token_count: int = token_bytes // self.dtype.itemsize
        self._bin_map = map_bin(path_of(self.prefix, ".bin"), index_path, token_bytes)
        self._tokens: NDArray[Any] = np.frombuffer(self._bin_map, self.dtype.newbyteorder("<"))
        self.manifest: dict[str, Any] | None = _read_manifest(self)
        self._fingerprint: str | None = None

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        return IndexedDataset, (str(self.prefix),)

    def __len__(self) -> int:
        return self.document_count

    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 [documents]: a new array at each call (10M documents: ~20 ms, 80 MB)."""
        if self._one_sequence_each:
            return self._sizes.astype(np.int64)
        return np.diff(self.document_starts())

    def document_starts(self) -> NDArray[np.int64]:
        """Token offset in `.bin` of each document and of the end, int64 [documents + 1], a new array."""
        starts = np.empty(self.document_count + 1, dtype=np.int64)
        if self._one_sequence_each:
            starts[:-1] = self._pointers
        else:
            ends = np.append(self._pointers, np.int64(self.token_count * self.dtype.itemsize))
            starts[:] = ends[self._index]
        starts //= self.dtype.itemsize
        starts[-1] = self.token_count
        return starts

    def document_length(self, document: int) -> int:
        """Tokens of one document, in constant time."""
        start, end = self._document_range(document)
        return end - start

    def tokens(self, document: int, start: int = 0, end: int | None = None) -> NDArray[Any]:
        """Ids [start, end) of a document: a read-only view of the mapped file in the file's own dtype."""
        first, last = self._document_range(document)
        stop = last - first if end is None else end
        if not 0 <= start <= stop <= last - first:
            raise IndexError(f"tokens {start}:{stop} of document {document}, which has {last - first} tokens")
        return self._tokens[first + start : first + stop]

    @property
    def fingerprint(self) -> str:
        """Identity of the content (hex sha256), whatever the files are called.

        Over the sha256 of `.idx` and the `.bin` sha256 that the manifest states; without a manifest over the size of
        `.bin` and 64 samples of 4 KiB spread over it, so that terabytes need not be read.
        """
        if self._fingerprint is None:
            index_sha256 = hashlib.sha256(self._index_map).hexdigest()
            if self.manifest is not None:
                if index_sha256 != self.manifest["idx_sha256"]:
                    refuse(
                        path_of(self.prefix, ".json"), "idx_sha256", self.manifest["idx_sha256"],
                        f"{path_of(self.prefix, '.idx')} has sha256 {index_sha256}: the manifest is of other files. "
                        "Preprocess again, or remove the manifest if the .bin/.idx pair is the one you want",
                    )  # fmt: skip
                content = f"sha256:{self.manifest['bin_sha256']}"
            else:
                content = f"sampled:{_sampled_digest(self._bin_map)}"
            self._fingerprint = hashlib.sha256(f"stagemix-dataset-1\n{index_sha256}\n{content}".encode()).hexdigest()
        return self._fingerprint

    def _document_range(self, document: int) -> tuple[int, int]:
        if not 0 <= document < self.document_count:
            raise IndexError(f"document {document} of {self.prefix}, which has {self.document_count} documents")
        if self._one_sequence_each:
            first = int(self._pointers[document]) // self.dtype.itemsize
            return first, first + int(self._sizes[document])
        return self._sequence_start(int(self._index[document])), self._sequence_start(int(self._index[document + 1]))

    def _sequence_start(self, sequence: int) -> int:
        if sequence == len(self._pointers):
            return self.token_count
        return int(self._pointers[sequence]) // self.dtype.itemsize


def check_vocab(dataset: IndexedDataset, vocab_size: int) -> None:
    """Raise DataError, naming file, document, position and id, where an id is negative or >= vocab_size.

    Files beyond 2^28 tokens whose manifest states `max_token_id` are believed; all others are read through once.
    """
    limits = np.iinfo(dataset.dtype)
    if limits.min >= 0 and limits.max < vocab_size:
        return
    stated = None if dataset.manifest is None else dataset.manifest.get("max_token_id")
    if isinstance(stated, int) and stated < vocab_size and dataset.token_count > _ALWAYS_SCANNED_TOKENS:
        return
    ids = dataset._tokens
    for begin in range(0, len(ids), CHUNK * 4):
        chunk = ids[begin : begin + CHUNK * 4]
        if int(chunk.max()) < vocab_size and (limits.min >= 0 or int(chunk.min()) >= 0):
            continue
        place = begin + int(np.argmax((chunk < 0) | (chunk >= vocab_size)))
        starts = dataset.document_starts()
        document = int(np.searchsorted(starts, place, side="right")) - 1
        raise DataError(
            f"{path_of(dataset.prefix, '.bin')}: document {document}, position {place - int(starts[document])}: "
            f"token id {int(ids[place])} is outside the vocabulary 0..{vocab_size - 1}. "
            "The data were made with another tokenizer: preprocess them again with the one in [tokenizer] path, or "
            "set [tokenizer] path to the one they were made with"
        )


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
        self._sizes, self._index = array("i"), array("q", [0])
        self._max_sequence_tokens = max_sequence_tokens
        self._digest = hashlib.sha256()
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

    @property
    def document_count(self) -> int:
        return len(self._index) - 1

    def add_document(self, ids: NDArray[Any] | Sequence[int]) -> None:
        """One document, its end-of-document token included. Ids outside the dtype are a DataError."""
        tokens = np.asarray(ids)
        self.add_documents(tokens, [len(tokens)])

    def add_documents(self, ids: NDArray[Any], lengths: Sequence[int] | NDArray[Any]) -> None:
        """Several documents, their ids one after another in one array, and the length of each."""
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
            self.max_token_id = max(self.max_token_id, high)
        if sum(int(length) for length in lengths) != len(ids):
            raise ValueError("the documents' lengths do not add up to the ids given")
        content = ids.astype(self.dtype.newbyteorder("<"), copy=False).tobytes()
        self._file.write(content)
        self._digest.update(content)
        self.token_count += len(ids)
        for length in lengths:
            left = int(length)
            while left > self._max_sequence_tokens:
                self._sizes.append(self._max_sequence_tokens)
                left -= self._max_sequence_tokens
            self._sizes.append(left)
            self._index.append(len(self._sizes))

    def finish(self) -> dict[str, Any]:
        """Publish, and give the manifest. Raises DataError where nothing was added."""
        if self.token_count == 0:
            raise DataError(f"{self.prefix}: no tokens were added: an empty dataset is not written")
        self._file.flush()
        os.fsync(self._file.fileno())
        index_partial = path_of(self.prefix, ".idx.partial")
        index_sha256 = self._write_index(index_partial)
        manifest = {
            "format": 1,
            "documents": self.document_count,
            "tokens": self.token_count,
            "dtype": self.dtype.name,
            "bin_sha256": self._digest.hexdigest(),
            "idx_sha256": index_sha256,
            "bin_bytes": self.token_count * self.dtype.itemsize,
            "max_token_id": self.max_token_id,
            **self.manifest_fields,
        }
        manifest_partial = path_of(self.prefix, ".json.partial")
        with manifest_partial.open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, ensure_ascii=False)
            file.write("\n")
            _sync_and_close(file)
        # The old .idx goes first, so that at no moment an .idx stands beside a .bin that is not its own.
        path_of(self.prefix, ".idx").unlink(missing_ok=True)
        os.replace(self._partial, path_of(self.prefix, ".bin"))
        os.replace(manifest_partial, path_of(self.prefix, ".json"))
        _sync_folder(self.prefix.parent)
        os.replace(index_partial, path_of(self.prefix, ".idx"))
        _sync_folder(self.prefix.parent)
        self._finished = True
        self._file.close()
        return manifest

    def abandon(self) -> None:
        """Remove what was written so far. Nothing that was published is touched."""
        self._file.close()
        if not self._finished:
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
        index = np.frombuffer(self._index, np.int64)
        digest = hashlib.sha256()
        with path.open("wb") as file:

            def put(content: bytes) -> None:
                file.write(content)
                digest.update(content)

            put(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[self.dtype.name], len(sizes), len(index)))
            put(sizes.astype("<i4").tobytes())
            pointer = 0
            for begin in range(0, len(sizes), CHUNK):
                lengths = sizes[begin : begin + CHUNK].astype(np.int64) * self.dtype.itemsize
                ends = np.cumsum(lengths) + pointer
                put((ends - lengths).astype("<i8").tobytes())
                pointer = int(ends[-1])
            put(index.astype("<i8").tobytes())
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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _resolve_prefix(prefix: Path) -> Path:
    if prefix.suffix in (".bin", ".idx") and prefix.is_file():
        raise DataError(f"{prefix}: give the prefix without its suffix: {str(prefix)[:-4]}")
    for candidate in (prefix, Path(f"{prefix}{_FOREIGN_SUFFIX}")):
        if path_of(candidate, ".idx").is_file():
            return candidate
    missing = path_of(prefix, ".idx")
    where = f"(nor {prefix}{_FOREIGN_SUFFIX}.idx)"
    if path_of(prefix, ".bin").exists() or path_of(prefix, ".bin.partial").exists():
        raise DataError(
            f"{missing}: no such file {where}, though a .bin is there: preprocessing did not finish. Run it again"
        )
    raise DataError(f"{missing}: no such file {where}. Make it with preprocess_data, or correct the path")


def _read_manifest(dataset: IndexedDataset) -> dict[str, Any] | None:
    path = path_of(dataset.prefix, ".json")
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: the manifest is not JSON ({error}): preprocess again, or remove the manifest"
        ) from None
    remedy = "preprocess again, or remove the manifest if the .bin/.idx pair is the one you want"
    if not isinstance(manifest, dict) or manifest.get("format") != 1:
        raise DataError(f"{path}: not a manifest of format 1: {remedy}")
    expected: dict[str, object] = {
        "documents": dataset.document_count,
        "tokens": dataset.token_count,
        "dtype": dataset.dtype.name,
        "bin_bytes": dataset.token_count * dataset.dtype.itemsize,
    }
    for field, value in expected.items():
        if manifest.get(field) != value:
            refuse(path, field, manifest.get(field), f"the .idx beside it says {value!r}: {remedy}")
    for field in ("bin_sha256", "idx_sha256"):
        if not isinstance(manifest.get(field), str):
            refuse(path, field, manifest.get(field), f"a checksum is needed: {remedy}")
    return manifest


def _sampled_digest(content: mmap.mmap, samples: int = 64, sample_bytes: int = 4096) -> str:
    digest = hashlib.sha256(str(len(content)).encode())
    last_start = max(0, len(content) - sample_bytes)
    for start in sorted({last_start * i // (samples - 1) for i in range(samples)}):
        digest.update(content[start : start + sample_bytes])
    return digest.hexdigest()
