"""Tokenizers kept in tiktoken rank files, as OpenAI (`cl100k_base.tiktoken`), Llama 3 and Qwen publish them.

A rank file holds the vocabulary and nothing else. How text is cut into words before it is encoded, and the special
tokens, are known for the published files by name; for others they stand in a small JSON file beside it:

    my.tiktoken.json    {"pattern": "cl100k_base", "special_tokens": {"<|endoftext|>": 100256}}

`pattern` is a known name or a regular expression; `special_tokens` are ids by name (left out: those of the known name,
or <|endoftext|> after the last rank); `normalization` is "NFC" or "" (left out: that of the known name).
"""

from __future__ import annotations

import base64
import binascii
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.config.errors import DataError, UnavailableError
from megatron.tokenizers.base import EOD_NAMES, NotPlainBpe, PlainBpe, fingerprint_of, no_eod_error, stated_eos, utf8_of
from megatron.tokenizers.tiktoken_patterns import KNOWN, RANK_LINE


@dataclass(frozen=True)
class _Rules:
    pattern: str
    special: dict[str, int]
    normalization: str
    fast_name: str


class TiktokenTokenizer:
    """A rank file read by the `tiktoken` library. Names of special tokens in a text are encoded as text."""

    def __init__(self, path: Path, content: bytes) -> None:
        try:
            import tiktoken
        except ImportError:
            raise UnavailableError(
                f"{path}: a tiktoken file needs the tiktoken package: pip install tiktoken"
            ) from None
        ranks = _read_ranks(path, content)
        self._path, self._rules = path, _rules(path, len(ranks))
        self.ranks: Mapping[bytes, int] = ranks
        self.pattern, self.normalization = self._rules.pattern, self._rules.normalization
        if clash := sorted(set(self._rules.special.values()) & set(ranks.values())):
            raise DataError(
                f"{path}: special token id {clash[0]} is the rank of a piece of text: correct {_beside(path)}"
            )
        try:
            self._encoding: Any = tiktoken.Encoding(
                path.name, pat_str=self._rules.pattern, mergeable_ranks=ranks, special_tokens=self._rules.special
            )
        except Exception as error:  # the library raises what its Rust parts raise
            raise DataError(f"{path}: tiktoken cannot read it: {error}: check the pattern in {_beside(path)}") from None
        self.name = path.name
        self.library = f"tiktoken {tiktoken.__version__}"
        self.vocab_size = max(*ranks.values(), *self._rules.special.values()) + 1
        self.special_ids: Mapping[str, int] = self._rules.special
        self.eod_id = self._find_eod()
        kind = f"tiktoken {json.dumps(asdict(self._rules), sort_keys=True)}"
        self.fingerprint = fingerprint_of(kind, content, self.eod_id)
        self._dense = sorted(ranks.values()) == list(range(len(ranks)))
        self._special_set = frozenset(self._rules.special.values())

    def encode(self, text: str) -> list[int]:
        utf8_of(text)
        ids: list[int] = self._encoding.encode_ordinary(_nfc(text) if self._rules.normalization else text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        plain = [int(i) for i in ids if int(i) not in self._special_set]
        content: bytes = self._encoding.decode_bytes(plain)
        return content.decode("utf-8", errors="replace")

    def plain_bpe(self) -> PlainBpe:
        if not self._rules.fast_name:
            raise NotPlainBpe(f"its pattern is none of {', '.join(KNOWN)}")
        if not self._dense:
            raise NotPlainBpe("its ranks are not 0, 1, 2, … without gaps")
        prepare = _nfc if self._rules.normalization else None
        return PlainBpe(rank_file=self._path, pattern_name=self._rules.fast_name, prepare=prepare)

    def files(self) -> list[Path]:
        beside = [_beside(self._path), self._path.parent / "tokenizer_config.json"]
        return [self._path, *(path for path in beside if path.is_file())]

    def _find_eod(self) -> int:
        stated = stated_eos(self._path.parent)
        for name in (*EOD_NAMES, *([stated] if stated else [])):
            if name in self.special_ids:
                return self.special_ids[name]
        raise no_eod_error(self._path, EOD_NAMES)


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        if not RANK_LINE.fullmatch(line):
            raise DataError(
                f"{path}: line {number}: {line[:40]!r} is no base64 token with its rank: the file is damaged, "
                "or no tiktoken rank file"
            )
        token, rank = line.split()
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except binascii.Error as error:
            raise DataError(f"{path}: line {number}: {line[:40]!r}: {error}: the file is damaged") from None
    if len(set(ranks.values())) != len(ranks):
        raise DataError(f"{path}: two tokens have one rank: the file is damaged")
    if missing := next((byte for byte in range(256) if bytes([byte]) not in ranks), None):
        raise DataError(f"{path}: no token for the byte 0x{missing:02x}: the file was cut off")
    return ranks


def _rules(path: Path, ranks: int) -> _Rules:
    """The pattern and special tokens of a rank file: from the JSON beside it, or by its name."""
    stated = _read_beside(_beside(path))
    name = stated.get("pattern") or next((known for known in KNOWN if path.name.startswith(known)), None)
    if name is None:
        raise DataError(
            f"{path}: a rank file does not say how text is cut into words, and its name is none of "
            f"{', '.join(f'{known}.tiktoken' for known in KNOWN)}: rename it, or write {_beside(path)} with "
            '{"pattern": "NAME"}, such as "llama3" for Llama 3'
        )
    known = KNOWN.get(name)
    after = known.special if known else {"<|endoftext|>": 0}
    return _Rules(
        pattern=known.pattern if known else name,
        special=stated.get("special_tokens") or {token: ranks + offset for token, offset in after.items()},
        normalization=stated.get("normalization", known.normalization if known else ""),
        fast_name=known.fast_name if known else "",
    )


def _read_beside(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        stated = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(stated, dict):
        raise DataError(f"{path}: an object is expected")
    if unknown := sorted(set(stated) - {"pattern", "special_tokens", "normalization"}):
        raise DataError(f"{path}: field {unknown[0]!r} is unknown: pattern, special_tokens and normalization are known")
    if not isinstance(stated.get("pattern", ""), str):
        raise DataError(f"{path}: pattern {stated['pattern']!r} is no string: give a known name or an expression")
    special = stated.get("special_tokens", {})
    if not isinstance(special, dict) or any(type(i) is not int or not 0 <= i < 2**31 for i in special.values()):
        raise DataError(f'{path}: special_tokens: ids by name are expected, such as {{"<|endoftext|>": 100257}}')
    if stated.get("normalization", "") not in ("", "NFC"):
        raise DataError(f'{path}: normalization {stated["normalization"]!r}: "NFC" and "" are known')
    return stated
