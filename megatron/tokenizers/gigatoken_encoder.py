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
        self._special = _SpecialIds(tokenizer)
        self._eod = np.array([tokenizer.eod_id], np.uint32)
        self._open()

    def encode_documents(self, texts: Sequence[str]) -> tuple[NDArray[np.integer[Any]], NDArray[np.int64]]:
        lengths = np.empty(len(texts), np.int64)
        parts: list[NDArray[np.uint32]] = []
        for number, text in enumerate(texts):
            ids = self._encode(text)
            lengths[number] = len(ids) + 1
            parts += (ids, self._eod)
            self._encoded += len(text)
        # every id was checked to fit the dtype when the encoder was opened
        joined = np.concatenate(parts, dtype=self._dtype, casting="unsafe") if parts else np.empty(0, self._dtype)
        del parts
        self._open_again_if_grown()
        return joined, lengths

    def _encode(self, text: str) -> NDArray[np.uint32]:
        if not self._plain.by_reference(text):
            try:
                ids: NDArray[np.uint32] = self._engine.encode(
                    self._plain.prepare(text) if self._plain.prepare else text
                )
            except (TypeError, RuntimeError, UnicodeEncodeError):
                utf8_of(text)  # where a lone surrogate is the reason, it says where
                raise
            if not self._special.any_in(ids):
                return ids
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


class _SpecialIds:
    """Finds ids that text must never give; most lie at the ends of the vocabulary, where two comparisons find them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = np.zeros(tokenizer.vocab_size, np.bool_)
        special[list(tokenizer.special_ids.values())] = True
        plain = np.flatnonzero(~special)
        self._first, self._last = (int(plain[0]), int(plain[-1])) if len(plain) else (1, 0)
        self._inner = np.flatnonzero(special[self._first : self._last + 1]) + self._first

    def any_in(self, ids: NDArray[np.uint32]) -> bool:
        if not len(ids):
            return False
        if int(ids.min()) < self._first or int(ids.max()) > self._last:
            return True
        return bool(len(self._inner)) and bool(np.isin(ids, self._inner).any())


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
