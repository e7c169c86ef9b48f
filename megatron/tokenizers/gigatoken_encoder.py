"""The fast backend: the gigatoken library, for tokenizers that are plain byte-pair encoding.

It looks up words it has met before in a cache that only grows (about 7 bytes for each byte of words never seen), so it
is opened again, which takes a twentieth of a second, when the process has grown by more than its allowance.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron.tokenizers.base import NotPlainBpe, PlainBpe, Tokenizer, utf8_of

# Another version may give other ids or read other files: it has to be proved anew before it is named here.
PROVED_VERSION = "0.10.0"

_CACHE_BYTES = 128 << 20
# Growth that is not the cache's must not make every call open the library again; where the process's size is unknown,
# it is opened again after this much text times ten.
_SHORTEST_RUN = 32 << 20


class GigatokenEncoder:
    """See `Encoder`. Every document is encoded on the calling thread; the library's thread pool is never started."""

    note = ""

    def __init__(self, tokenizer: Tokenizer, dtype: DTypeLike, cache_bytes: int = _CACHE_BYTES) -> None:
        """Raises NotPlainBpe where the library is not installed or cannot read the tokenizer, with the reason."""
        self._tokenizer, self._dtype, self._cache_bytes = tokenizer, np.dtype(dtype), cache_bytes
        self.backend = f"gigatoken {_installed_version()}"
        self._plain = tokenizer.plain_bpe()
        self._special = _special_ids(tokenizer)
        self._eod = np.array([tokenizer.eod_id], np.uint32)
        self._open()

    def encode_documents(self, texts: Sequence[str]) -> tuple[NDArray[np.integer[Any]], NDArray[np.int64]]:
        if not texts:
            return np.empty(0, self._dtype), np.empty(0, np.int64)
        parts: list[NDArray[np.uint32]] = []
        for text in texts:
            parts += (self._encode(text), self._eod)
        joined = self._joined(parts)
        if np.count_nonzero(self._special[joined]) != len(texts):  # more than the documents' ends
            for number, text in enumerate(texts):
                if self._special[parts[2 * number]].any():
                    parts[2 * number] = self._by_reference(text)
            joined = self._joined(parts)
        lengths = np.fromiter(map(len, parts[::2]), np.int64, len(texts)) + 1
        del parts
        self._encoded += sum(map(len, texts))
        self._open_again_if_grown()
        return joined, lengths

    def _joined(self, parts: list[NDArray[np.uint32]]) -> NDArray[np.integer[Any]]:
        # every id was checked to fit the dtype when the encoder was opened
        return np.concatenate(parts, dtype=self._dtype, casting="unsafe")

    def _encode(self, text: str) -> NDArray[np.uint32]:
        if self._plain.by_reference(text):
            return self._by_reference(text)
        try:
            ids: NDArray[np.uint32] = self._engine.encode(self._plain.prepare(text) if self._plain.prepare else text)
        except (TypeError, RuntimeError, UnicodeEncodeError):
            utf8_of(text)  # where a lone surrogate is the reason, it says where
            raise
        return ids

    def _by_reference(self, text: str) -> NDArray[np.uint32]:
        return np.array(self._tokenizer.encode(text), np.uint32)

    def _open(self) -> None:
        self._engine: Any = None  # the old one's memory is free before the new one takes its own
        self._engine = _engine(self._plain)
        self._encoded, self._size = 0, _process_bytes()

    def _open_again_if_grown(self) -> None:
        if self._encoded < _SHORTEST_RUN:
            return
        size = _process_bytes()
        known = size is not None and self._size is not None
        if size - self._size > self._cache_bytes if known else self._encoded > 10 * _SHORTEST_RUN:  # type: ignore[operator]
            self._open()


def _special_ids(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Which ids text must never give, bool [vocab_size]."""
    special = np.zeros(tokenizer.vocab_size, np.bool_)
    special[[*tokenizer.special_ids.values(), tokenizer.eod_id]] = True
    return special


def _installed_version() -> str:
    try:
        found = version("gigatoken")
    except PackageNotFoundError:
        raise NotPlainBpe(f"gigatoken is not installed: pip install gigatoken=={PROVED_VERSION}") from None
    if found != PROVED_VERSION:
        raise NotPlainBpe(f"gigatoken {found} is installed, and {PROVED_VERSION} is the version that was proved equal")
    return found


def _engine(plain: PlainBpe) -> Any:
    import gigatoken

    try:
        if plain.rank_file is not None:
            opened = gigatoken.Tokenizer.from_tiktoken(plain.rank_file, plain.pattern_name, {})
        else:
            opened = gigatoken.Tokenizer.from_json(plain.description)
    except Exception as error:  # the library raises what its Rust parts raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise NotPlainBpe(f"gigatoken cannot read it: {reason}") from None
    return opened.backend


def _process_bytes() -> int | None:
    """Resident memory of this process; None where the system does not say (only Linux does, here)."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
