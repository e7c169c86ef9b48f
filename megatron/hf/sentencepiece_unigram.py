"""The unigram model of a SentencePiece file in the words of `tokenizers`: the best path by the pieces' scores.

SentencePiece looks for ordinary pieces alone; `tokenizers` for every entry of its vocabulary, so that text could become
a control token or the name of a byte. Those entries are therefore given a score that no path with them can win, as long
as their own characters are pieces. The same score would move that of unknown characters, which both count from the
lowest score there is: without effect where every character of a piece is a piece itself, as SentencePiece trains them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError
from megatron.tokenizers.base import looks_like_marker
from megatron.tokenizers.sentencepiece_model import NORMAL, UNKNOWN, USER_DEFINED, Piece

_NEVER = -1e6
"""Below what the characters of a control token's name score together."""


def unigram_model(pieces: Sequence[Piece], names: Sequence[str], in_bytes: bool, path: Path) -> Any:
    """A `tokenizers` Unigram. names: of the pieces, as they stand in its vocabulary. in_bytes: unknown characters
    become their bytes.

    Raises ConfigError where a character of some piece is no piece by itself.
    """
    from tokenizers.models import Unigram

    ordinary = [name for name, piece in zip(names, pieces, strict=True) if piece.kind == NORMAL]
    characters = {name for name in ordinary if len(name) == 1}
    for name, piece in zip(names, pieces, strict=True):
        if piece.kind == USER_DEFINED and not looks_like_marker(piece.text):
            continue  # found in a text before the model sees it
        wanted = set(name) if piece.kind == NORMAL else set(piece.text.replace("\u2581", ""))
        if missing := sorted(wanted - characters):
            raise ConfigError(
                f"{path}: the character {missing[0]!r} of piece {piece.text!r} is no piece itself, so that a "
                "tokenizer.json would choose other pieces around it: train the tokenizer with required_chars that has "
                "it, or with model_type=bpe (stagemix train_tokenizer does)"
            )
    scored = [
        (name, piece.score if piece.kind == NORMAL else _NEVER) for name, piece in zip(names, pieces, strict=True)
    ]
    unknown = next(number for number, piece in enumerate(pieces) if piece.kind == UNKNOWN)
    return Unigram(scored, unk_id=unknown, byte_fallback=in_bytes)
