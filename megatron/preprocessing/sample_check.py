"""A small sample of every block is encoded by the tokenizer itself as well, and must give the same ids."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from megatron.preprocessing.parts import PartKey
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.encoder import Encoder, check_sample

SHARE = 0.0005  # the reference is fifty times slower than the fast encoder: this costs it a fortieth
MOST_CHARACTERS = 1 << 20


class SampleCheck:
    """Watches the batches of one block. Which documents it takes depends on the block and on the documents only.

    Up to SHARE of the block's characters, and at least one document of it, unless all are longer than
    MOST_CHARACTERS. An encoder that is the tokenizer itself is not checked.
    """

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, key: PartKey) -> None:
        self._encoder, self._tokenizer = encoder, tokenizer
        self._needed = encoder.backend != tokenizer.library
        self._seed = zlib.crc32(key.name.encode())
        self._budget = 0.0
        self._any = False

    def look_at(self, texts: Sequence[str]) -> None:
        """Check some of the texts of a batch. Raises EncoderMismatch."""
        if not self._needed:
            return
        self._budget += SHARE * sum(map(len, texts))
        self._seed = zlib.crc32(self._seed.to_bytes(4, "little"))
        first = self._seed % len(texts)
        # one text a batch: calling the reference costs more than what is in a small text
        fitting = (texts[(first + n) % len(texts)] for n in range(len(texts)))
        taken = next((text for text in fitting if len(text) <= self._budget), None)
        if taken is None and not self._any:
            smallest = min(texts, key=len)
            taken = smallest if len(smallest) <= MOST_CHARACTERS else None
        if taken is not None:
            self._any = True
            self._budget -= len(taken)
            check_sample(self._encoder, self._tokenizer, [taken])
