"""A SentencePiece BPE model as a `tokenizers` BPE: the same pieces, the same ids, merges in the order of the scores.

SentencePiece joins the neighbouring pair whose joined piece scores highest, the leftmost of equals. `tokenizers` joins
the pair whose merge ranks lowest, the leftmost of equals. So every way to cut a piece in two other pieces is a merge,
ranked by the piece's score. Byte fallback covers the rest. What cannot be translated is refused with its name; that
the translation is equal is checked on text by the caller (tokenizer_files.check_equal).

Pieces are written with the space itself where SentencePiece writes U+2581 for it: then a U+2581 in a text is no space,
and nothing has to rewrite the text. Models with a dummy prefix keep U+2581, as their space before a text needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError
from megatron.tokenizers.base import looks_like_marker
from megatron.tokenizers.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Piece, read_pieces
from megatron.tokenizers.sentencepiece_plain_bpe import merges_by_score

SPACE = "\u2581"
_PROBES = ("\ufb01 \u2460 \uff21", "e\u0301", "  two  spaces ", "tab\tand\r\nlines\n\n", "a\u00a0b\u200b")


def convert_sentencepiece(path: Path) -> tuple[Any, str]:
    """A `tokenizers.Tokenizer` equal to the model file, and the name of its unknown piece.

    Raises ConfigError for models that are not BPE with byte fallback, or that rewrite the text, DataError for files
    that are no SentencePiece models.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    pieces = read_pieces(path, path.read_bytes())
    prefix = _dummy_prefix(sentencepiece.SentencePieceProcessor(model_file=str(path)), path)
    _check_kinds(pieces, path)
    space = SPACE if prefix else " "
    names = [piece.text.replace(SPACE, space) if piece.kind == NORMAL else piece.text for piece in pieces]
    unknown = next(piece.text for piece in pieces if piece.kind == UNKNOWN)
    bpe = BPE(
        vocab={name: number for number, name in enumerate(names)},
        merges=merges_by_score({n: p.score for n, p in zip(names, pieces, strict=True) if p.kind == NORMAL}),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    first, last = [decoders.ByteFallback(), decoders.Fuse()], []
    if prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        first, last = [decoders.Replace(SPACE, " "), *first], [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([*first, *last])
    tokenizer.add_special_tokens([AddedToken(p.text, normalized=False, special=True) for p in pieces if _control(p)])
    # A piece with a plain space is never matched by SentencePiece, which has written U+2581 for it before it looks.
    matched = [p for p in pieces if p.kind == USER_DEFINED and not _control(p) and " " not in p.text]
    tokenizer.add_tokens([AddedToken(piece.text.replace(SPACE, " "), normalized=False) for piece in matched])
    return tokenizer, unknown


def _control(piece: Piece) -> bool:
    """Pieces that text never matches, as our own tokenizer has it."""
    return piece.kind in (CONTROL, UNKNOWN) or (piece.kind == USER_DEFINED and looks_like_marker(piece.text))


def _dummy_prefix(model: Any, path: Path) -> bool:
    """Whether the model puts a space before every text. Raises ConfigError where it rewrites text in other ways."""
    prefix: bool = model.normalize("a") == SPACE + "a"
    for probe in _PROBES:
        wanted = (SPACE if prefix else "") + probe.replace(" ", SPACE)
        if (found := model.normalize(probe)) != wanted:
            raise ConfigError(
                f"{path}: this SentencePiece model normalises text ({probe!r} becomes {found!r}), which a BPE "
                "tokenizer.json does not. Train the tokenizer with normalization_rule_name=identity, "
                "remove_extra_whitespaces=False and add_dummy_prefix=False (stagemix train_tokenizer does)"
            )
    return prefix


def _check_kinds(pieces: list[Piece], path: Path) -> None:
    """Refuses models whose pieces are not BPE pieces with all 256 bytes."""
    if (count := sum(piece.kind == BYTE for piece in pieces)) != 256:
        raise ConfigError(
            f"{path}: {count} byte pieces instead of 256: only SentencePiece BPE models with byte fallback can be "
            "exported. Train the tokenizer with byte_fallback=True (stagemix train_tokenizer does)"
        )
    scores = [piece.score for piece in pieces if piece.kind == NORMAL]
    if any(score != -rank for rank, score in enumerate(scores)):
        raise ConfigError(
            f"{path}: the pieces' scores are not the ranks of merges, so this is not a SentencePiece BPE model "
            "(a unigram model?). Train the tokenizer with model_type=bpe (stagemix train_tokenizer does)"
        )
