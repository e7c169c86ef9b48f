"""The pieces inside a SentencePiece `.model` file, read without the protobuf package.

The file is a protocol buffer; field 1, repeated, is a piece: 1 its text, 2 its score (float), 3 its kind (enum, 1 where
absent), as sentencepiece_model.proto defines. Of the trainer's (2) and the normaliser's (3) settings only those are
read that say how text becomes pieces. Everything else in the file is skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.config.errors import DataError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_FLOAT = struct.Struct("<f")
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its position. `kind_at` is the byte offset of its kind in the file."""

    text: str
    score: float
    kind: int
    kind_at: int | None


def read_pieces(path: Path, content: bytes) -> list[Piece]:
    """All pieces in the order of their ids. Raises DataError where the content is no SentencePiece model."""
    try:
        pieces = [
            _read_piece(content, start, end)
            for field, wire, start, end in _fields(content, 0, len(content))
            if field == 1 and wire == _LENGTH
        ]
    except (ValueError, IndexError, struct.error):
        pieces = []
    if not pieces:
        raise DataError(f"{path}: neither a SentencePiece model nor a Hugging Face tokenizer.json, or it was cut off")
    return pieces


@dataclass(frozen=True)
class TextRules:
    """How a model treats text: its type (1 unigram, 2 BPE, 3 words, 4 characters), and what it does to white space.

    `rewrites` is true where it changes characters (NFKC and the like) or drops spaces before it looks for pieces;
    `maps_characters` and `drops_spaces` say which.
    """

    model_type: int
    rewrites: bool
    dummy_prefix: bool
    plain_spaces: bool
    maps_characters: bool
    drops_spaces: bool


def read_text_rules(content: bytes) -> TextRules:
    """The rules of a model whose pieces have been read (`read_pieces` finds damage)."""
    trainer, normalizer = _settings(content, 2), _settings(content, 3)
    maps, drops = normalizer.get(2, 0) > 0, normalizer.get(4, 1) != 0
    return TextRules(
        model_type=trainer.get(3, 1),
        rewrites=maps or drops,
        dummy_prefix=normalizer.get(3, 1) != 0,
        # spaces become U+2581 (normaliser's field 5), before the word rather than behind it (trainer's field 24)
        plain_spaces=normalizer.get(5, 1) != 0 and trainer.get(24, 0) == 0,
        maps_characters=maps,
        drops_spaces=drops,
    )


def _settings(content: bytes, message: int) -> dict[int, int]:
    """Numbers of a settings message by field; of a field of bytes its length."""
    found: dict[int, int] = {}
    for field, wire, start, end in _fields(content, 0, len(content)):
        if field == message and wire == _LENGTH:
            for inner, inner_wire, at, stop in _fields(content, start, end):
                found[inner] = _varint(content, at, stop)[0] if inner_wire == _VARINT else stop - at
    return found


def as_control(content: bytes, pieces: list[Piece]) -> bytes:
    """The file's content with these pieces marked as control pieces, which text never matches."""
    changed = bytearray(content)
    for piece in pieces:
        if piece.kind_at is None:
            raise ValueError(f"piece {piece.text!r} states no kind")
        changed[piece.kind_at] = CONTROL
    return bytes(changed)


def _read_piece(content: bytes, start: int, end: int) -> Piece:
    # As the library writes nearly every piece: text below 128 bytes, score, and a kind unless it is an ordinary one.
    after = start + 2 + content[start + 1]
    if content[start] == 0x0A and content[start + 1] < 0x80 and after + 5 <= end and content[after] == 0x15:
        (score,) = _FLOAT.unpack_from(content, after + 1)
        if after + 5 == end:
            return Piece(content[start + 2 : after].decode("utf-8"), score, NORMAL, None)
        if after + 7 == end and content[after + 5] == 0x18 and content[after + 6] < 0x80:
            return Piece(content[start + 2 : after].decode("utf-8"), score, content[after + 6], after + 6)
    return _read_any_piece(content, start, end)


def _read_any_piece(content: bytes, start: int, end: int) -> Piece:
    text, score, kind, kind_at = "", 0.0, NORMAL, None
    for field, wire, value_start, value_end in _fields(content, start, end):
        if field == 1 and wire == _LENGTH:
            text = content[value_start:value_end].decode("utf-8")
        elif field == 2 and wire == _FIXED32:
            (score,) = struct.unpack_from("<f", content, value_start)
        elif field == 3 and wire == _VARINT:
            kind, kind_at = content[value_start], value_start
    return Piece(text, score, kind, kind_at)


def _fields(content: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, start, end of its value) of each field of a message."""
    at = start
    while at < end:
        key, at = _varint(content, at, end)
        wire = key & 7
        if wire == _VARINT:
            stop = _varint(content, at, end)[1]
        elif wire == _FIXED64:
            stop = at + 8
        elif wire == _FIXED32:
            stop = at + 4
        elif wire == _LENGTH:
            length, at = _varint(content, at, end)
            stop = at + length
        else:
            raise ValueError("unknown wire type")
        if stop > end:
            raise ValueError("a field runs over the end")
        yield key >> 3, wire, at, stop
        at = stop


def _varint(content: bytes, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= end:
            break
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number runs over the end")
