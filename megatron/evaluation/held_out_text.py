"""Held-out documents of a config's sources as text: never trained on by any stage or arm (megatron/data/holdout.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron.config.errors import ConfigError, DataError
from megatron.config.schema import RunConfig
from megatron.data.sources import OpenSource, TokenizerIdentity, open_sources
from megatron.tokenizers.base import Tokenizer

DOCUMENTS_A_SOURCE = 2000
TOKENS_A_DOCUMENT = 8192


@dataclass(frozen=True)
class HeldOutDocument:
    """A held-out document's beginning. tokens: ids, int64 [n], its end-of-document token among them where it is that
    short · learned: which of them the loss mask marks, bool [n]; None of a source without one."""

    number: int
    tokens: NDArray[np.int64]
    learned: NDArray[np.bool_] | None = None


def held_out_documents(
    config: RunConfig,
    tokenizer: Tokenizer,
    documents: int = DOCUMENTS_A_SOURCE,
    longest: int = TOKENS_A_DOCUMENT,
    tokens: int | None = None,
) -> dict[str, list[HeldOutDocument]]:
    """Held-out documents by source: the same for every run with the same data and fraction, whatever its seed.

    At most `documents` of a source, chosen by a hash of their number, of each its first `longest` tokens, until there
    are `tokens` together; no text twice. Sources that are planned by size alone are left out. Raises DataError for
    missing or broken files and where no source has held-out documents, ConfigError where the config holds none out.
    """
    if config.validation.fraction == 0:
        raise ConfigError("validation.fraction is 0, so no documents are held out: evaluation would be on trained text")
    sources = open_sources(
        config.sources,
        seed=config.run.seed,
        seq_length=config.model.seq_length,
        holdout_fraction=config.validation.fraction,
        cache_dir=None,
        tokenizer=TokenizerIdentity(tokenizer.name, tokenizer.fingerprint, tokenizer.vocab_size),
    )
    found = {
        name: list(_documents(source, tokenizer.eod_id, documents, longest, tokens))
        for name, source in sources.items()
        if source.order is not None
    }
    if not any(found.values()):
        raise DataError(
            f"no source of the config has held-out documents: raise validation.fraction "
            f"({config.validation.fraction}) before training"
        )
    return {name: rows for name, rows in found.items() if rows}


def held_out_tokens(
    config: RunConfig, tokenizer: Tokenizer, documents: int = DOCUMENTS_A_SOURCE, longest: int = TOKENS_A_DOCUMENT
) -> dict[str, list[list[int]]]:
    """Token ids of `held_out_documents` by source, without their end-of-document token."""
    found: dict[str, list[list[int]]] = {}
    for name, rows in held_out_documents(config, tokenizer, documents, longest).items():
        found[name] = [row.tokens[: _text_length(row.tokens, tokenizer.eod_id)].tolist() for row in rows]
    return found


def held_out_texts(config: RunConfig, tokenizer: Tokenizer) -> dict[str, list[str]]:
    """`held_out_tokens` as text."""
    return {name: [tokenizer.decode(row) for row in rows] for name, rows in held_out_tokens(config, tokenizer).items()}


def first_texts(source: OpenSource, tokenizer: Tokenizer) -> Iterator[str]:
    """What `held_out_texts` has of one opened source, document by document; the source's own fraction is held out."""
    for row in _documents(source, tokenizer.eod_id, DOCUMENTS_A_SOURCE, TOKENS_A_DOCUMENT, None):
        yield tokenizer.decode(row.tokens[: _text_length(row.tokens, tokenizer.eod_id)].tolist())


def _documents(
    source: OpenSource, eod_id: int, documents: int, longest: int, tokens: int | None
) -> Iterator[HeldOutDocument]:
    """Documents in an order that is no order of the corpus, so that the first few are a fair sample."""
    files = source.opened().files
    numbers = sorted(source.opened().held_out_documents().tolist(), key=_shuffled)
    masked = files.mask_checksum is not None
    seen: set[bytes] = set()
    left = tokens
    for number in numbers:
        if len(seen) == documents or left == 0:
            break
        end = min(longest, files.document_length(number), longest if left is None else left)
        ids = files.tokens(number, 0, end).astype(np.int64)
        digest = hashlib.sha256(ids.tobytes()).digest()
        if digest in seen or not _text_length(ids, eod_id):
            continue
        seen.add(digest)
        left = None if left is None else left - len(ids)
        yield HeldOutDocument(number, ids, files.learned(number, 0, end) if masked else None)


def _text_length(ids: NDArray[np.int64], eod_id: int) -> int:
    """Tokens without the end-of-document token."""
    return len(ids) - bool(len(ids) and ids[-1] == eod_id)


def _shuffled(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little")).digest()[:8]
