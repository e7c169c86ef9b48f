"""Many documents to one array of ids: what preprocessing asks of a tokenizer.

The reference backend is the tokenizer itself, document by document. The fast one is another library that must give the
same ids, which is proved when it is opened and can be checked again on samples of the corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron.config.errors import ConfigError, UnavailableError
from megatron.tokenizers.base import NotPlainBpe, Tokenizer
from megatron.tokenizers.encoder_proof import hard_texts
from megatron.tokenizers.gigatoken_encoder import GigatokenEncoder

Backend = Literal["auto", "fast", "reference"]


class Encoder(Protocol):
    """Encodes documents in batches, on the calling thread's core."""

    @property
    def backend(self) -> str:
        """Library and version that does the work, such as "sentencepiece 0.2.3"."""

    @property
    def note(self) -> str:
        """Why the fast backend is not used; empty where it is, or was not asked for."""

    def encode_documents(self, texts: Sequence[str]) -> tuple[NDArray[np.integer[Any]], NDArray[np.int64]]:
        """Ids of all texts one after another, each text followed by `eod_id`; and how many ids each text has with it.

        Shapes [sum of lengths] and [number of texts]; ids are of the dtype given at opening. The ids are those of
        `Tokenizer.encode`. Raises DataError where a text is not Unicode (a lone surrogate).
        """


class EncoderMismatch(Exception):
    """An encoder and its tokenizer disagree. Says which document of the sample, where in it, and both ids."""

    def __init__(self, document: int, position: int, encoded: int | None, expected: int | None) -> None:
        self.document, self.position, self.encoded, self.expected = document, position, encoded, expected
        super().__init__(
            f"document {document} of the sample: id number {position} is {_shown(encoded)}, and the reference "
            f"tokenizer gives {_shown(expected)}"
        )


def _shown(token_id: int | None) -> str:
    return "missing" if token_id is None else str(token_id)


class ReferenceEncoder:
    """The tokenizer itself, batch by batch."""

    def __init__(self, tokenizer: Tokenizer, dtype: DTypeLike, note: str = "") -> None:
        self._tokenizer, self._dtype, self.note = tokenizer, np.dtype(dtype), note
        self.backend = tokenizer.library

    def encode_documents(self, texts: Sequence[str]) -> tuple[NDArray[np.integer[Any]], NDArray[np.int64]]:
        eod = [self._tokenizer.eod_id]
        lists = self._tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, lists), np.int64, count=len(lists)) + 1
        closed = chain.from_iterable(chain(ids, eod) for ids in lists)
        return np.fromiter(closed, self._dtype, count=int(lengths.sum())), lengths


def open_encoder(
    tokenizer: Tokenizer, dtype: DTypeLike, backend: Backend = "auto", proof: tuple[int, int] | None = (0, 1)
) -> Encoder:
    """The encoder of a tokenizer, with ids of `dtype`.

    "reference" is the tokenizer itself. "fast" is gigatoken, or an UnavailableError that says why it cannot be.
    "auto" is fast where gigatoken is installed, reads this kind of file and passes the start-up proof; else the
    reference, with the reason in `note`. Raises ConfigError where the ids do not fit the dtype.

    proof: (i, n) for the i-th of n shares of the start-up proof, for processes that share it out; None for no proof,
    where another process has given it.
    """
    kind = np.dtype(dtype)
    if kind.kind not in "iu" or tokenizer.vocab_size - 1 > np.iinfo(kind).max:
        raise ConfigError(f"{tokenizer.name}: ids up to {tokenizer.vocab_size - 1} do not fit {kind.name}: take int32")
    if backend == "reference":
        return ReferenceEncoder(tokenizer, kind)
    try:
        fast = GigatokenEncoder(tokenizer, kind)
        if proof is not None:
            number, shares = proof
            check_sample(fast, tokenizer, list(hard_texts(tokenizer))[number::shares])
        return fast
    except NotPlainBpe as error:
        reason = str(error)
    except EncoderMismatch as error:
        reason = f"it fails the start-up proof: {error}"
    if backend == "fast":
        raise UnavailableError(
            f"{tokenizer.name}: the fast encoder is not available: {reason}. Take the reference encoder, or auto"
        )
    return ReferenceEncoder(tokenizer, kind, reason)


def check_sample(encoder: Encoder, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Encode the texts with both, and raise EncoderMismatch at the first id that differs."""
    ids, lengths = encoder.encode_documents(texts)
    expected = tokenizer.encode_batch(texts)
    start = 0
    for number, length in enumerate(lengths.tolist()):
        given = ids[start : start + length]
        wanted = np.array([*expected[number], tokenizer.eod_id], given.dtype)
        start += length
        if not np.array_equal(given, wanted):
            common = min(len(given), len(wanted))
            at = next((i for i in range(common) if given[i] != wanted[i]), common)
            raise EncoderMismatch(
                number,
                at,
                int(given[at]) if at < len(given) else None,
                int(wanted[at]) if at < len(wanted) else None,
            )
