"""Reading Megatron's indexed datasets (`P.bin`, `P.idx`), with our manifest `P.json` beside them.

`indexed_format` has the layout and the checks. Nothing of a file is used before it has been checked.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from pathlib import Path
from threading import Thread
from threading import enumerate as running_threads
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.config.errors import DataError
from megatron.data.indexed_format import (
    CHUNK,
    HEADER,
    check_document_index,
    check_sequences,
    map_bin,
    map_file,
    path_of,
    read_header,
    refuse,
)
from megatron.data.processors import processors

_ALWAYS_SCANNED_TOKENS = 1 << 28
_FOREIGN_SUFFIX = "_text_document"
_WORTH_THREADS = 1 << 17  # sequences; fewer are checked, and hashed, in less time than a thread takes to be of use
_HASHED_AT_ONCE = 2
_DIGEST_THREAD = "index-digest"


FileArrays = tuple[NDArray[Any], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64] | None]
"""Tokens, sizes and pointers of the sequences, and the document index where documents are not one sequence each."""


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
        self._index_digest = _BackgroundDigest(self._index_map)
        threads = processors() if sequences >= _WORTH_THREADS else 1
        self._one_sequence_each = check_document_index(index_path, self._index, sequences, threads)
        token_bytes = check_sequences(index_path, self._sizes, self._pointers, self.dtype.itemsize, threads)
        self.token_count: int = token_bytes // self.dtype.itemsize
        self._bin_map = map_bin(path_of(self.prefix, ".bin"), index_path, token_bytes)
        self._tokens: NDArray[Any] = np.frombuffer(self._bin_map, self.dtype.newbyteorder("<"))
        self.manifest: dict[str, Any] | None = _read_manifest(self)
        self._fingerprint: str | None = None

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        return IndexedDataset, (str(self.prefix),)

    def __len__(self) -> int:
        return self.document_count

    def document_lengths(self) -> NDArray[np.int32] | NDArray[np.int64]:
        """Tokens of each document [documents]: where one sequence is one document, the mapped int32 sizes themselves
        (read-only, and not aligned); else a new int64 array.
        """
        return self._sizes if self._one_sequence_each else np.diff(self.document_starts())

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

    def document_start(self, document: int) -> int:
        """Token offset in `.bin` of one document, in constant time."""
        return self._document_range(document)[0]

    def tokens(self, document: int, start: int = 0, end: int | None = None) -> NDArray[Any]:
        """Ids [start, end) of a document: a read-only view of the mapped file in the file's own dtype."""
        first, last = self._document_range(document)
        stop = last - first if end is None else end
        if not 0 <= start <= stop <= last - first:
            raise IndexError(f"tokens {start}:{stop} of document {document}, which has {last - first} tokens")
        return self._tokens[first + start : first + stop]

    @property
    def arrays(self) -> FileArrays:
        """What the extension reads documents from, none of it a copy."""
        return self._tokens, self._sizes, self._pointers, None if self._one_sequence_each else self._index

    @property
    def fingerprint(self) -> str:
        """Identity of the content (hex sha256), whatever the files are called.

        Over the sha256 of `.idx` and the `.bin` sha256 that the manifest states; without a manifest over the size of
        `.bin` and 64 samples of 4 KiB spread over it, so that terabytes need not be read.
        """
        if self._fingerprint is None:
            index_sha256 = self._index_digest.hexdigest()
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


class _BackgroundDigest:
    """sha256 of a large mapped file, begun in a thread while the caller checks it; of a small one, when asked for.

    Hashing is the longest part of opening (10M documents: 0.1 s of one processor). A process that was forked
    meanwhile, or finds others at work, hashes when asked.
    """

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._digest: str | None = None
        self._thread: Thread | None = None
        others = sum(thread.name == _DIGEST_THREAD for thread in running_threads())
        if len(content) > 20 * _WORTH_THREADS and others < _HASHED_AT_ONCE:
            self._thread = Thread(target=self._run, name=_DIGEST_THREAD, daemon=True)
            self._thread.start()

    def hexdigest(self) -> str:
        if self._thread is not None:
            self._thread.join()
        if self._digest is None:
            self._digest = hashlib.sha256(self._content).hexdigest()
        return self._digest

    def _run(self) -> None:
        self._digest = hashlib.sha256(self._content).hexdigest()


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
