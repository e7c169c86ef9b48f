"""`P.mask` beside an indexed dataset: which tokens the loss is on.

One bit a token in the order of `.bin`, the first in the lowest bit of the first byte (numpy.packbits, little bit
order), 1 where the token is a target of the loss: predicting this token counts. Bits behind the last token are 0. Its
checksum and counts stand in `P.json` under "loss_mask"; a dataset has a mask where its manifest says so.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.config.errors import DataError
from megatron.data.indexed_format import path_of, refuse

SUFFIX, FIELD = ".mask", "loss_mask"
_FORMAT = 1
_CHUNK_BYTES = 1 << 24
_COUNTED_AT_ONCE = 1 << 24


def has_loss_mask(manifest: Mapping[str, Any] | None) -> bool:
    """Whether a dataset's manifest (None: it has none) says that it has a mask."""
    return manifest is not None and manifest.get(FIELD) is not None


class LossMask:
    """A mask, memory-mapped, checked when opened. Pickles as its prefix and manifest (opened anew).

    `token_count` bits, of which `target_count` are 1.
    """

    def __init__(self, prefix: Path, manifest: Mapping[str, Any], packed: NDArray[np.uint8]) -> None:
        self.prefix, self._manifest = prefix, manifest
        self.packed = packed
        self.token_count = int(manifest["tokens"])
        self.target_count = int(manifest[FIELD]["target_tokens"])

    @classmethod
    def open(cls, prefix: str | Path, manifest: Mapping[str, Any]) -> LossMask:
        """The mask of a dataset, given its manifest (`IndexedDataset.manifest`). Reads the file through once.

        Raises DataError where the manifest has no mask, or the file is missing, cut off, or not the manifest's.
        """
        path, stated = path_of(prefix, SUFFIX), manifest.get(FIELD)
        if stated is None:
            raise DataError(f"{path_of(prefix, '.json')}: no {FIELD!r} in it: the dataset has no loss mask")
        tokens = _checked(path_of(prefix, ".json"), stated, manifest)
        packed = _mapped(path, -(-tokens // 8))
        digest, targets = hashlib.sha256(), 0
        for begin in range(0, len(packed), _CHUNK_BYTES):
            chunk = packed[begin : begin + _CHUNK_BYTES]
            digest.update(chunk.data)
            targets += int(np.bitwise_count(chunk).sum(dtype=np.int64))
        remedy = f"{path_of(prefix, '.bin')} and its mask are not a pair, or the file is damaged: preprocess again"
        if digest.hexdigest() != stated["sha256"]:
            refuse(path, "sha256", digest.hexdigest(), f"the manifest says {stated['sha256']}: {remedy}")
        if targets != stated["target_tokens"]:
            refuse(path, "bits that are 1", targets, f"the manifest says {stated['target_tokens']}: {remedy}")
        return cls(Path(prefix), manifest, packed)

    def __reduce__(self) -> tuple[Any, tuple[Path, Mapping[str, Any]]]:
        return LossMask.open, (self.prefix, self._manifest)

    def __len__(self) -> int:
        return self.token_count

    def bits(self, start: int, end: int) -> NDArray[np.bool_]:
        """Whether tokens start … end - 1 of `.bin` are targets, bool [end - start], a new array.

        Only the bytes that hold them are read. Raises IndexError outside the dataset.
        """
        if not 0 <= start <= end <= self.token_count:
            raise IndexError(f"tokens {start}:{end} of {self.prefix}, which has {self.token_count} tokens")
        first = start // 8
        unpacked = np.unpackbits(self.packed[first : -(-end // 8)], bitorder="little").view(np.bool_)
        return unpacked[start - first * 8 : end - first * 8]

    def targets_by_document(self, starts: NDArray[np.int64], longest: int | None = None) -> NDArray[np.int64]:
        """How many targets each document has that are marked, int64 [documents]; its first token is no target.

        starts: offset of each document and of the end, `IndexedDataset.document_starts`. longest: of each document only
        so many targets are looked at, from its second token on. Reads the mask through once.
        """
        counts = np.zeros(len(starts) - 1, np.int64)
        lengths = np.diff(starts)
        held = np.flatnonzero(lengths > 1)
        begins = starts[held] + 1
        ends = begins + np.minimum(lengths[held] - 1, lengths.max(initial=0) if longest is None else longest)
        first = 0
        while first < len(held):
            last = max(first + 1, int(np.searchsorted(ends, begins[first] + _COUNTED_AT_ONCE, side="right")))
            origin, end = int(begins[first]), int(ends[last - 1])
            marked = np.append(self.bits(origin, end).view(np.uint8), np.uint8(0))
            edges = np.column_stack((begins[first:last], ends[first:last])).ravel() - origin
            counts[held[first:last]] = np.add.reduceat(marked, edges, dtype=np.int64)[::2]
            first = last
        return counts

    def count(self, start: int, end: int) -> int:
        """How many of tokens start … end - 1 are targets."""
        return int(np.count_nonzero(self.bits(start, end)))


class LossMaskWriter:
    """Writes `P.mask.partial` as tokens come; `finish` gives what the manifest says of it, `publish` renames it."""

    def __init__(self, prefix: str | Path) -> None:
        self._prefix = Path(prefix)
        self._partial = path_of(prefix, f"{SUFFIX}.partial")
        self._file = self._partial.open("wb")
        self._digest = hashlib.sha256()
        self._left = np.zeros(0, np.uint8)  # bits that do not fill a byte yet
        self.token_count = self.target_count = 0

    def add(self, bits: NDArray[Any]) -> None:
        """The bits of the next tokens, 0 and 1 or bool."""
        together = np.concatenate([self._left, bits.astype(np.uint8, copy=False)])
        whole = len(together) // 8 * 8
        self._write(together[:whole])
        self._left = together[whole:]
        self.token_count += len(bits)
        self.target_count += int(np.count_nonzero(bits))

    def finish(self) -> dict[str, Any]:
        """Put what is left, and the file, on the disk. Gives the manifest's "loss_mask"."""
        self._write(self._left)
        self._left = self._left[:0]
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {
            "format": _FORMAT,
            "bits": self.token_count,
            "bytes": -(-self.token_count // 8),
            "sha256": self._digest.hexdigest(),
            "target_tokens": self.target_count,
        }

    def publish(self) -> None:
        """Give the finished file its name. The dataset's `.idx` must not be there yet, or no more."""
        os.replace(self._partial, path_of(self._prefix, SUFFIX))

    def abandon(self) -> None:
        """Remove what was not published."""
        with suppress(OSError):
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def _write(self, bits: NDArray[np.uint8]) -> None:
        content = np.packbits(bits, bitorder="little").tobytes()
        self._file.write(content)
        self._digest.update(content)


def _checked(path: Path, stated: Any, manifest: Mapping[str, Any]) -> int:
    """Tokens of the dataset, when what the manifest says of the mask goes with them."""
    remedy = "preprocess again"
    tokens = manifest.get("tokens")
    if not isinstance(tokens, int) or not isinstance(stated, dict) or stated.get("format") != _FORMAT:
        raise DataError(f"{path}: {FIELD}: not a loss mask of format {_FORMAT}: {remedy}")
    for field, value in (("bits", tokens), ("bytes", -(-tokens // 8))):
        if stated.get(field) != value:
            refuse(path, f"{FIELD}.{field}", stated.get(field), f"the dataset's {tokens} tokens need {value}: {remedy}")
    if not isinstance(stated.get("sha256"), str) or not isinstance(stated.get("target_tokens"), int):
        raise DataError(f"{path}: {FIELD}: sha256 and target_tokens are needed: {remedy}")
    return tokens


def _mapped(path: Path, size: int) -> NDArray[np.uint8]:
    remedy = "the loss mask belongs to the dataset, as its manifest says: copy it too, or preprocess again"
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                refuse(
                    path, "file size", found, f"the manifest needs {size} bytes: it was cut off or is another: {remedy}"
                )
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: {remedy}") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a directory, not a file") from None
    except PermissionError:
        raise DataError(f"{path}: no permission to read it") from None
