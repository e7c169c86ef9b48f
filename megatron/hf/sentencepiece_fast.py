"""A SentencePiece model, BPE or unigram, as a `tokenizers` tokenizer: the same pieces, the same ids.

What cannot be translated is refused with its name; that the translation is equal is checked on text by the caller
(tokenizer_check.check_equal). Models that map characters (nmt_nfkc, SentencePiece's default) are among it: the
`Precompiled` normaliser of tokenizers loses combining marks behind characters that the map changes.

Pieces are written with the space itself where SentencePiece writes U+2581 for it: then a U+2581 in a text is no space,
and nothing has to rewrite the text. Models with a dummy prefix keep U+2581, as their space before a text needs it, and
so do models without byte fallback, which read a U+2581 in a text as a space.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError
from megatron.hf.sentencepiece_bpe import bpe_model
from megatron.hf.sentencepiece_unigram import unigram_model
from megatron.tokenizers.base import looks_like_marker
from megatron.tokenizers.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    TextRules,
    read_pieces,
    read_text_rules,
)

SPACE = "\u2581"
_UNIGRAM, _BPE = 1, 2
_PROBES = ("\ufb01 \u2460 \uff21", "e\u0301", "  two  spaces ", "tab\tand\r\nlines\n\n", "a\u00a0b\u200b")
_REMEDY = (
    "Train the tokenizer with normalization_rule_name=identity, remove_extra_whitespaces=False and "
    "add_dummy_prefix=False (stagemix train_tokenizer does)"
)


def convert_sentencepiece(path: Path) -> tuple[Any, str]:
    """A `tokenizers.Tokenizer` equal to the model file, and the name of its unknown piece.

    Raises ConfigError for models that are neither BPE with byte fallback nor unigram, or that map characters, DataError
    for files that are no SentencePiece models.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders

    content = path.read_bytes()
    pieces = read_pieces(path, content)
    rules = read_text_rules(content)
    _check_text(sentencepiece.SentencePieceProcessor(model_file=str(path)), rules, path)
    in_bytes = sum(piece.kind == BYTE for piece in pieces) == 256
    space = SPACE if rules.dummy_prefix or not in_bytes else " "
    names = [_name(piece, space) for piece in pieces]
    if rules.model_type == _BPE:
        model = bpe_model(pieces, names, path)
    elif rules.model_type == _UNIGRAM:
        model = unigram_model(pieces, names, in_bytes, path)
    else:
        raise ConfigError(f"{path}: this SentencePiece model is neither BPE nor unigram, so that it is not exported")
    tokenizer = Tokenizer(model)
    if (normalizer := _normalizer(rules, space)) is not None:
        tokenizer.normalizer = normalizer
    steps: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
    if space == SPACE:
        steps = [decoders.Replace(SPACE, " "), *steps, *([decoders.Strip(" ", 1, 0)] if rules.dummy_prefix else [])]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(p.text, normalized=False, special=True) for p in pieces if _control(p)])
    # A piece with a plain space is never matched by SentencePiece, which has written U+2581 for it before it looks.
    matched = [p for p in pieces if p.kind == USER_DEFINED and not _control(p) and " " not in p.text]
    tokenizer.add_tokens([AddedToken(piece.text.replace(SPACE, " "), normalized=False) for piece in matched])
    return tokenizer, next(piece.text for piece in pieces if piece.kind == UNKNOWN)


def _name(piece: Piece, space: str) -> str:
    return piece.text.replace(SPACE, space) if piece.kind == NORMAL else piece.text


def _control(piece: Piece) -> bool:
    """Pieces that text never matches, as our own tokenizer has it."""
    return piece.kind in (CONTROL, UNKNOWN) or (piece.kind == USER_DEFINED and looks_like_marker(piece.text))


def _normalizer(rules: TextRules, space: str) -> Any:
    """What the text goes through before the model; None where it stays as it is."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if rules.drops_spaces:
        # \A and \z are the text's ends; ^ and $ would be those of a line.
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    if space == SPACE:
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps) if steps else None


def _check_text(model: Any, rules: TextRules, path: Path) -> None:
    """Raises ConfigError where the model rewrites text in a way that `_normalizer` does not."""
    if not rules.plain_spaces:
        raise ConfigError(f"{path}: this SentencePiece model writes spaces behind words, or not at all. {_REMEDY}")
    for probe in _PROBES:
        wanted = " ".join(part for part in probe.split(" ") if part) if rules.drops_spaces else probe
        wanted = ((SPACE if rules.dummy_prefix else "") + wanted).replace(" ", SPACE)
        if (found := model.normalize(probe)) != wanted:
            raise ConfigError(
                f"{path}: this SentencePiece model normalises text ({probe!r} becomes {found!r}), which no "
                f"tokenizer.json does in quite the same way. {_REMEDY}"
            )
