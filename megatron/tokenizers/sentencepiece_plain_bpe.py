"""A SentencePiece BPE model in the words of a Hugging Face tokenizer.json, for the fast library.

SentencePiece joins the neighbouring pair whose joined piece scores highest, the leftmost of equals; a tokenizer.json
lists pairs in the order in which they are joined. So every way to cut a piece in two other pieces becomes a merge, in
the order of the pieces' scores. What cannot be said this way is refused with its name. Special pieces stay in the
vocabulary, so that ids stay, and no merge leads to them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from megatron.tokenizers.base import NotPlainBpe, looks_like_marker
from megatron.tokenizers.sentencepiece_model import (
    BYTE,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    TextRules,
    read_text_rules,
)

_BPE = 2
_TYPE_NAMES = {1: "unigram", 3: "word", 4: "character"}


def describe_sentencepiece(pieces: list[Piece], content: bytes) -> tuple[str, TextRules]:
    """The text of a tokenizer.json equal to the model, and the rules that are not in it: see `prepared_text`.

    Raises NotPlainBpe for models that are not BPE with byte fallback, or that have pieces or white space rules of a
    kind that plain BPE lacks.
    """
    rules = read_text_rules(content)
    if rules.model_type != _BPE:
        raise NotPlainBpe(f"it is a {_TYPE_NAMES.get(rules.model_type, '')} model: the fast library reads BPE models")
    if sum(piece.kind == BYTE for piece in pieces) != 256:
        raise NotPlainBpe("the model has no byte fallback, which the fast library needs")
    if not rules.plain_spaces:
        raise NotPlainBpe("the model writes spaces behind words or not at all, which the fast library cannot")
    for piece in pieces:
        if piece.kind == UNUSED or (piece.kind == USER_DEFINED and not looks_like_marker(piece.text)):
            kind = "an unused" if piece.kind == UNUSED else "a user-defined"
            raise NotPlainBpe(f"the model has {kind} piece, {piece.text!r}, which is not known to be treated alike")
    scores = [piece.score for piece in pieces if piece.kind == NORMAL]
    if len(set(scores)) != len(scores):
        raise NotPlainBpe("pieces of the model have equal scores, so that the order of its merges is not written down")
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(piece.text for piece in pieces if piece.kind == UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {piece.text: number for number, piece in enumerate(pieces)},
        "merges": merges_by_score({piece.text: piece.score for piece in pieces if piece.kind == NORMAL}),
    }
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prefix = {"type": "Prepend", "prepend": "\u2581"}
    steps = [] if rules.rewrites else [*([prefix] if rules.dummy_prefix else []), spaces]
    described: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    return json.dumps(described, ensure_ascii=False), rules


def prepared_text(processor: Any, rules: TextRules) -> Callable[[str], str] | None:
    """What a text goes through first: the model's own normaliser where it rewrites characters, else nothing.

    Other libraries' NFKC tables and rules for combining marks are close to SentencePiece's, not equal.
    """
    return processor.normalize if rules.rewrites else None


def merges_by_score(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to cut a piece in two others, in the order in which SentencePiece joins them: by the piece's score."""
    ranked: list[tuple[float, int, str, str]] = []
    for text, score in scores.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in scores and right in scores:
                # Of several cuts of one piece the longer left part first: runs of spaces are joined from the left.
                ranked.append((-score, -cut, left, right))
    return [(left, right) for _, _, left, right in sorted(ranked)]
