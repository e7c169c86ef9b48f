"""Instruction data for tests: documents with a loss mask, without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.loss_mask import LossMaskWriter
from megatron.tokenizers.byte_level import ByteTokenizer

Document = tuple[Sequence[int], Sequence[int]]
"""Ids, and the bit of each."""


def write_masked(prefix: Path, documents: Sequence[Document], dtype: str = "uint16", longest: int = 2**31 - 1) -> Path:
    """An indexed dataset with its mask, made by the byte tokenizer as its manifest says."""
    tokenizer = ByteTokenizer()
    with IndexedDatasetWriter(prefix, dtype, overwrite=True, max_sequence_tokens=longest) as writer:
        writer.mask = LossMaskWriter(prefix)
        for ids, bits in documents:
            writer.add_document(np.array(ids, dtype=np.int64))
            writer.mask.add(np.array(bits, dtype=np.uint8))
        writer.manifest_fields["tokenizer"] = {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        }
    return prefix


def chats(seed: int, documents: int = 60, answered: float = 0.5, longest: int = 120) -> list[Document]:
    """Prompts, of which nothing is learned, and answers; few letters a document, so that there is something to learn.

    answered: of each document, the greatest share that is answer. A third of the documents have an answer of one
    token, the end of the document, so that rows of a batch differ much in their targets.
    """
    generator, made = np.random.default_rng(seed), []
    eod = ByteTokenizer().eod_id
    for number in range(documents):
        letters = generator.integers(0, 256, size=3)
        ids = np.append(letters[generator.integers(0, 3, size=int(generator.integers(5, longest)))], eod)
        answer = 1 if number % 3 == 0 else max(1, int(generator.uniform(0, answered) * len(ids)))
        made.append((ids.tolist(), [0] * (len(ids) - answer) + [1] * answer))
    return made
