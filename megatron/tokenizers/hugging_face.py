"""Tokenizers kept in Hugging Face `tokenizer.json` files, read by the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
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
from megatron.tokenizers.continuation import SpecialRules
from megatron.tokenizers.hugging_face_plain_bpe import plain_bpe_of_json

_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class HuggingFaceTokenizer:
    """A tokenizer.json. Truncation, padding and post-processing in it are left out: text gives its ids, no more.

    Added tokens that look like markers count as special whatever the file says, and special tokens are never matched
    in a text (`encode_special_tokens`). Where the model's own vocabulary still gives one (Unigram models list
    `</s>` as a piece), the text is cut inside the token's name and encoded in parts.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        self._path, self._content = path, content
        self._tokenizer = _open(path, _read(path, content))
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{path}: the vocabulary is empty")
        self.name = path.name
        self.library = f"tokenizers {tokenizers.__version__}"
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod_id = _find_eod(path, vocabulary)
        self.fingerprint = fingerprint_of("tokenizers", content, self.eod_id)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special: dict[int, str] = {i: token.content for i, token in added.items() if token.special}
        self._special[self.eod_id] = next(name for name, i in vocabulary.items() if i == self.eod_id)
        self.special_ids: Mapping[str, int] = {name: i for i, name in self._special.items()}

    def encode(self, text: str) -> list[int]:
        utf8_of(text)
        ids = self._encode(text)
        return ids if self._special.keys().isdisjoint(ids) else self._encode_in_parts(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        plain = [int(i) for i in ids if int(i) not in self._special]
        return self._tokenizer.decode(plain, skip_special_tokens=False)

    def plain_bpe(self) -> PlainBpe:
        normalizer = self._tokenizer.normalizer
        return plain_bpe_of_json(_read(self._path, self._content), normalizer.normalize_str if normalizer else str)

    def files(self) -> list[Path]:
        return [self._path, *(p for name in _BESIDE if (p := self._path.parent / name).is_file())]

    def special_rules(self) -> SpecialRules:
        """How text beside special tokens is encoded, as the library does it where it matches them."""
        added = self._tokenizer.get_added_tokens_decoder()
        strips = {i: (added[i].lstrip, added[i].rstrip) for i in self._special if i in added}
        name = next((added[i].content for i in self._special if i in added), None)
        if name is None:
            return SpecialRules()
        self._tokenizer.encode_special_tokens = False
        try:
            behind = self._encode(f"{name}a")[1:]
        finally:
            self._tokenizer.encode_special_tokens = True
        return SpecialRules(behind == self._encode("a"), {i: rule for i, rule in strips.items() if any(rule)})

    def _encode(self, text: str) -> list[int]:
        # The batch call of one text skips the offsets, which cost as much as the ids.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _encode_in_parts(self, text: str) -> list[int]:
        parts = [text]
        for name in self._special.values():
            half = len(name) // 2
            for number in range(len(parts) - 1, -1, -1):
                pieces = parts[number].split(name)
                cut = [pieces[0]]
                for piece in pieces[1:]:
                    cut[-1] += name[:half]
                    cut.append(name[half:] + piece)
                parts[number : number + 1] = cut
        ids = [i for part in parts for i in self._encode(part)]
        if not self._special.keys().isdisjoint(ids):
            found = next(i for i in ids if i in self._special)
            raise DataError(
                f"{self._path}: the tokenizer turns text into its special token {self._special[found]!r} (id {found}), "
                "which would end or split documents: use another tokenizer, or remove the token's text from the corpus"
            )
        return ids


def _read(path: Path, content: bytes) -> dict[str, Any]:
    """The file's JSON, with every added token that looks like a marker made special."""
    try:
        described: dict[str, Any] = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}): the file was cut off or is no tokenizer.json") from None
    if not isinstance(described, dict) or not isinstance(described.get("model"), dict):
        raise DataError(f'{path}: no "model" in it: this is no Hugging Face tokenizer.json')
    if described["model"].get("type") == "WordPiece":
        raise DataError(
            f"{path}: a WordPiece tokenizer drops white space, so that no text comes back from it: use a BPE or "
            "Unigram tokenizer, or train one with train_tokenizer"
        )
    for token in described.get("added_tokens") or []:
        if isinstance(token, dict) and looks_like_marker(str(token.get("content"))):
            token["special"] = True
    return described


def _open(path: Path, described: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(described))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path}: the tokenizers library cannot read it: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _find_eod(path: Path, vocabulary: dict[str, int]) -> int:
    stated = stated_eos(path.parent)
    for name in (*EOD_NAMES, *([stated] if stated else [])):
        if name in vocabulary:
            return vocabulary[name]
    raise no_eod_error(path, EOD_NAMES)
