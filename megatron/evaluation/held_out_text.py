"""Held-out documents of a config's sources as text: never trained on by any stage or arm (megatron/data/holdout.py)."""

from __future__ import annotations

import hashlib

from megatron.config.errors import ConfigError, DataError
from megatron.config.schema import RunConfig
from megatron.data.sources import OpenSource, TokenizerIdentity, open_sources
from megatron.tokenizers.base import Tokenizer

DOCUMENTS_A_SOURCE = 2000
TOKENS_A_DOCUMENT = 8192


def held_out_tokens(
    config: RunConfig, tokenizer: Tokenizer, documents: int = DOCUMENTS_A_SOURCE, longest: int = TOKENS_A_DOCUMENT
) -> dict[str, list[list[int]]]:
    """Token ids of held-out documents by source, without their end-of-document token.

    At most `documents` of a source, chosen by a hash of their number, of each its first `longest` tokens; no text
    twice. Sources that are planned by size alone are left out. Raises DataError for missing or broken files and where
    no source has held-out documents, ConfigError where the config holds none out.
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
        name: _documents(source, tokenizer.eod_id, documents, longest)
        for name, source in sources.items()
        if source.order is not None
    }
    if not any(found.values()):
        raise DataError(
            f"no source of the config has held-out documents: raise validation.fraction "
            f"({config.validation.fraction}) before training"
        )
    return {name: rows for name, rows in found.items() if rows}


def held_out_texts(config: RunConfig, tokenizer: Tokenizer) -> dict[str, list[str]]:
    """`held_out_tokens` as text."""
    return {name: [tokenizer.decode(row) for row in rows] for name, rows in held_out_tokens(config, tokenizer).items()}


def _documents(source: OpenSource, eod_id: int, documents: int, longest: int) -> list[list[int]]:
    """Documents in an order that is no order of the corpus, so that the first few are a fair sample."""
    files = source.opened().files
    numbers = sorted(source.opened().held_out_documents().tolist(), key=_shuffled)
    rows: list[list[int]] = []
    seen: set[bytes] = set()
    for number in numbers:
        if len(rows) == documents:
            break
        ids = files.tokens(number, 0, min(longest, files.document_length(number)))
        digest = hashlib.sha256(ids.tobytes()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        row = ids.tolist()
        if row and row[-1] == eod_id:
            row.pop()
        if row:
            rows.append(row)
    return rows


def _shuffled(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little")).digest()[:8]
