"""Tokenizers kept in SentencePiece `.model` files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import sentencepiece

from megatron.config.errors import DataError
from megatron.tokenizers.base import (
    EOD_NAMES,
    PlainBpe,
    fingerprint_of,
    looks_like_marker,
    no_eod_error,
    stated_eos,
    utf8_of,
)
from megatron.tokenizers.fim_tokens import CODE_LLAMA
from megatron.tokenizers.sentencepiece_model import BYTE, CONTROL, NORMAL, USER_DEFINED, Piece, as_control, read_pieces
from megatron.tokenizers.sentencepiece_plain_bpe import describe_sentencepiece, prepared_text

# SentencePiece writes a space as this character, and so reads the character back as a space.
_SPACE_MARK = "\u2581"


class SentencePieceTokenizer:
    """A SentencePiece model of any type. Models with byte fallback and no normalisation give every text back exactly.

    Two departures from the library, both so that text stays text: user-defined pieces that look like markers (`<sep>`)
    are never matched, and U+2581 in a text is encoded as its three bytes where the model has bytes.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        self._path, self._content = path, content
        self._pieces = pieces = read_pieces(path, content)
        markers = [p for p in pieces if _marks(p)]
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(as_control(content, markers) if markers else content)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path}: SentencePiece cannot read the model: {error}") from None
        self.name = path.name
        self.library = f"sentencepiece {sentencepiece.__version__}"
        self.vocab_size = len(pieces)
        self.eod_id = self._find_eod({p.text: i for i, p in enumerate(pieces) if p.kind in (CONTROL, USER_DEFINED)})
        self.fingerprint = fingerprint_of("sentencepiece", content, self.eod_id)
        byte_ids = {p.text: i for i, p in enumerate(pieces) if p.kind == BYTE}
        mark_bytes = [byte_ids.get(f"<0x{byte:02X}>", -1) for byte in _SPACE_MARK.encode()]
        adds_prefix = self._processor.EncodeAsPieces("a")[0].startswith(_SPACE_MARK)
        self._mark_ids: list[int] | None = None if adds_prefix or -1 in mark_bytes else mark_bytes
        special = {p.text: i for i, p in enumerate(pieces) if p.kind == CONTROL or _marks(p) or self._is_sentinel(p, i)}
        self.special_ids: Mapping[str, int] = {**special, pieces[self.eod_id].text: self.eod_id}

    def encode(self, text: str) -> list[int]:
        if self._mark_ids is not None and _SPACE_MARK in text:
            first, *others = text.split(_SPACE_MARK)
            ids = self._encode(first)
            for part in others:
                ids += self._mark_ids
                ids += self._encode(part)
            return ids
        return self._encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._mark_ids is not None and any(_SPACE_MARK in text for text in texts):
            return [self.encode(text) for text in texts]
        found: list[list[int]] = self._processor.encode([utf8_of(text) for text in texts], num_threads=1)
        # A dummy prefix alone would be a piece; an empty text has none.
        return [ids if text else [] for ids, text in zip(found, texts, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode([int(i) for i in ids]))

    def plain_bpe(self) -> PlainBpe:
        description, rules = describe_sentencepiece(self._pieces, self._content)
        splits_at_mark = self._mark_ids is not None
        return PlainBpe(
            description=description,
            prepare=prepared_text(self._processor, rules),
            by_reference=lambda text: splits_at_mark and _SPACE_MARK in text,
        )

    def files(self) -> list[Path]:
        config = self._path.parent / "tokenizer_config.json"
        return [self._path, *([config] if config.is_file() else [])]

    def _encode(self, text: str) -> list[int]:
        return self._processor.encode(utf8_of(text), out_type=int) if text else []

    def _is_sentinel(self, piece: Piece, piece_id: int) -> bool:
        """CodeLlama's file may list its sentinels among ordinary pieces; no merge leads to them."""
        ordinary = piece.kind == NORMAL and piece.text in CODE_LLAMA.required
        return ordinary and piece_id not in self.encode(f" {piece.text.removeprefix(_SPACE_MARK)} ")

    def _find_eod(self, special: dict[str, int]) -> int:
        if (eos := self._processor.eos_id()) >= 0:
            return int(eos)
        stated = stated_eos(self._path.parent)
        for name in (*EOD_NAMES, *([stated] if stated else [])):
            if name in special:
                return special[name]
        raise no_eod_error(self._path, ("the model's eos", *EOD_NAMES))


def _marks(piece: Piece) -> bool:
    return piece.kind == USER_DEFINED and looks_like_marker(piece.text)
