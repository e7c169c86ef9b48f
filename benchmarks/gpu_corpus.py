"""Indexed corpora that `gpu.py` makes for itself: random letters, and this repository's own code and prose."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from gpu_setting import ROOT
from numpy.typing import NDArray

from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.tokenizers.byte_level import ByteTokenizer

_DOCUMENT = 1500
"""Letters of a random document, about."""


def write_random(prefix: Path, tokens: int, seed: int) -> None:
    """At least so many tokens in documents of very different lengths."""
    generator = np.random.default_rng(seed)

    def documents() -> Iterable[NDArray[np.integer]]:
        left = tokens
        while left > 0:
            length = 1 + int(generator.exponential(_DOCUMENT))
            left -= length + 1
            yield generator.integers(0, 256, size=length)

    _write(prefix, documents())


def write_repository(folder: Path) -> None:
    """`code`: the package's and the tests' Python files; `text`: the pages of prose. Each file a document."""
    suffixes = {"code": ("megatron/**/*.py", "tests/**/*.py"), "text": ("*.md", "docs/*.md", "benchmarks/*.md")}
    for name, patterns in suffixes.items():
        paths = sorted({path for pattern in patterns for path in ROOT.glob(pattern)})
        _write(folder / name, (np.frombuffer(path.read_bytes(), np.uint8) for path in paths if path.stat().st_size))


def _write(prefix: Path, documents: Iterable[NDArray[np.integer]]) -> None:
    """An indexed dataset with the byte tokenizer's manifest."""
    tokenizer = ByteTokenizer()
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for body in documents:
            writer.add_document(np.append(body.astype(np.uint16), np.uint16(tokenizer.eod_id)))
        writer.manifest_fields["tokenizer"] = {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        }
