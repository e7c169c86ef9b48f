"""The built-in tokenizer: one id a byte, for tests and for studies that want no vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.tokenizers.base import NotPlainBpe, PlainBpe, fingerprint_of, utf8_of


class ByteTokenizer:
    """Ids 0..255 are the bytes of the text's UTF-8, 256 ends a document."""

    name = "bytes"
    library = "stagemix bytes"
    vocab_size = 257
    eod_id = 256
    special_ids: Mapping[str, int] = {"<|endoftext|>": 256}
    fingerprint = fingerprint_of("bytes", b"", 256)

    def encode(self, text: str) -> list[int]:
        return list(utf8_of(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def plain_bpe(self) -> PlainBpe:
        raise NotPlainBpe("bytes need no other library")

    def files(self) -> list[Path]:
        return []
