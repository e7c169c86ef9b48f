"""The BPE of a SentencePiece model in the words of `tokenizers`: merges in the order of the scores.

SentencePiece joins the neighbouring pair whose joined piece scores highest, the leftmost of equals. `tokenizers` joins
the pair whose merge ranks lowest, the leftmost of equals. So every way to cut a piece in two other pieces is a merge,
ranked by the piece's score. Byte fallback covers the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError
from megatron.tokenizers.sentencepiece_model import BYTE, NORMAL, UNKNOWN, Piece
from megatron.tokenizers.sentencepiece_plain_bpe import merges_by_score


def bpe_model(pieces: Sequence[Piece], names: Sequence[str], path: Path) -> Any:
    """A `tokenizers` BPE. names: of the pieces, as they stand in its vocabulary.

    Raises ConfigError where the pieces are not BPE pieces with all 256 bytes.
    """
    from tokenizers.models import BPE

    _check_kinds(pieces, path)
    return BPE(
        vocab={name: number for number, name in enumerate(names)},
        merges=merges_by_score({n: p.score for n, p in zip(names, pieces, strict=True) if p.kind == NORMAL}),
        unk_token=next(piece.text for piece in pieces if piece.kind == UNKNOWN),
        fuse_unk=True,
        byte_fallback=True,
    )


def _check_kinds(pieces: Sequence[Piece], path: Path) -> None:
    if (count := sum(piece.kind == BYTE for piece in pieces)) != 256:
        raise ConfigError(
            f"{path}: {count} byte pieces instead of 256: only SentencePiece BPE models with byte fallback can be "
            "exported. Train the tokenizer with byte_fallback=True (stagemix train_tokenizer does)"
        )
    scores = [piece.score for piece in pieces if piece.kind == NORMAL]
    if any(score != -rank for rank, score in enumerate(scores)):
        raise ConfigError(
            f"{path}: the pieces' scores are not the ranks of merges, so the order of its merges is not written down. "
            "Train the tokenizer with model_type=bpe (stagemix train_tokenizer does)"
        )
