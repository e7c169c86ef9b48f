"""Which tokenizer.json files are plain byte-pair encoding, and what of them the fast library is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from megatron.tokenizers.base import NotPlainBpe, PlainBpe

_SPACE = "\u2581"
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}


def plain_bpe_of_json(described: dict[str, Any], normalize: Callable[[str], str]) -> PlainBpe:
    """The tokenizer of a tokenizer.json whose special tokens are marked as such; `normalize` is its own normalizer.

    Two families are known to come out equal: byte-level BPE (GPT-2 to Qwen), with NFC or without; and SentencePiece BPE
    with byte fallback whose only rule is to write spaces as U+2581 (Llama 2). Raises NotPlainBpe for all others.
    """
    model = described["model"]
    if (kind := model.get("type", "BPE")) != "BPE":
        raise NotPlainBpe(f"its model is {kind}: the fast library reads BPE models")
    if model.get("dropout"):
        raise NotPlainBpe(f"its model drops merges at random (dropout {model['dropout']})")
    for field in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise NotPlainBpe(f"its model has a {field}")
    if model.get("byte_fallback"):
        nfc = False
        if _steps(described.get("normalizer")) not in ([], [_SPACES], [_PREPEND, _SPACES]):
            raise NotPlainBpe("its normalizer does more than write spaces as U+2581")
        if described.get("pre_tokenizer"):
            raise NotPlainBpe("it has byte fallback and a pre_tokenizer")
    else:
        nfc = _is_nfc(described.get("normalizer"))
    kept = [token for token in described.get("added_tokens") or [] if not token.get("special")]
    for token in kept:
        if token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
            raise NotPlainBpe(f"its added token {token.get('content')!r} is matched by more than its text")
    plain = {**described, "added_tokens": kept, "post_processor": None, "truncation": None, "padding": None}
    if not nfc:
        return PlainBpe(description=json.dumps(plain, ensure_ascii=False))
    if kept:
        raise NotPlainBpe(
            f"it has NFC and the added token {kept[0].get('content')!r}, which cuts texts before NFC does"
        )
    # The reference's NFC in place of the fast library's: they follow different versions of Unicode.
    description = json.dumps(plain | {"normalizer": None}, ensure_ascii=False)
    return PlainBpe(description=description, prepare=lambda text: text if text.isascii() else normalize(text))


def _is_nfc(normalizer: Any) -> bool:
    steps = _steps(normalizer)
    if any(step != {"type": "NFC"} for step in steps):
        names = ", ".join(str(step.get("type")) for step in steps)
        raise NotPlainBpe(f"its normalizer ({names}) is another than NFC")
    return bool(steps)


def _steps(normalizer: Any) -> list[Any]:
    if not normalizer:
        return []
    if normalizer.get("type") == "Sequence":
        return [step for inner in normalizer.get("normalizers") or [] for step in _steps(inner)]
    return [normalizer]
