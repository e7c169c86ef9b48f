"""A tiktoken rank file as a byte-level BPE of `tokenizers`: the same words, the same merges, the same ids.

tiktoken takes a word that is in the file whole, and else joins the neighbouring pair whose joined bytes rank lowest,
the leftmost of equals. So every way to cut a token in two others is a merge, ranked by the token, and words are looked
up before (`ignore_merges`). Bytes are written with GPT-2's printable characters (openai/gpt-2, encoder.py,
bytes_to_unicode). That the translation is equal is checked on text by the caller (tokenizer_check.check_equal).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from megatron.config.errors import ConfigError
from megatron.tokenizers.tiktoken_tokenizer import TiktokenTokenizer

RESERVED = "<|reserved_id_{}|>"
"""Fills ids between special tokens that the rank file leaves free."""


def convert_tiktoken(tokenizer: TiktokenTokenizer) -> Any:
    """A `tokenizers.Tokenizer` equal to the rank file with its pattern and special tokens.

    Raises ConfigError for ranks with gaps, and for patterns that the regular expressions of tokenizers do not read.
    """
    from tokenizers import Tokenizer

    ranks = tokenizer.ranks
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ConfigError(
            f"{tokenizer.name}: its ranks are not 0, 1, 2, … without gaps, so that a tokenizer.json cannot have its ids"
        )
    letters = byte_letters()
    words = {token: "".join(letters[byte] for byte in token) for token in ranks}
    by_id = {number: name for name, number in tokenizer.special_ids.items()}
    added = [
        {"id": number, "content": by_id.get(number, RESERVED.format(number)), "special": True}
        for number in range(len(ranks), tokenizer.vocab_size)
    ]
    same = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token | same for token in added],
        "normalizer": {"type": tokenizer.normalization} if tokenizer.normalization else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": in_oniguruma(tokenizer.pattern)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {words[token]: rank for token, rank in ranks.items()},
            "merges": [[words[left], words[right]] for left, right in merges_by_rank(ranks)],
        },
    }
    try:
        return Tokenizer.from_str(json.dumps(described))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{tokenizer.name}: tokenizers cannot read what it says: {error}") from None


def merges_by_rank(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every way to cut a token in two others, by the token's rank, then by the ranks of its parts."""
    found = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                found.append((rank, ranks[left], ranks[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def byte_letters() -> list[str]:
    """The printable character that stands for each byte, by the byte's number."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    letters |= {byte: chr(0x100 + number) for number, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def in_oniguruma(pattern: str) -> str:
    """A pattern of tiktoken's in the words of tokenizers' library.

    Two things mean something else there: `$` is also before a line's end, and `{1,3}+` repeats what is repeated.
    tiktoken means the end of the text, and a repetition that gives nothing back: an atomic group. Raises ConfigError
    for such a repetition of a group.
    """
    if _GROUP_TIMES.search(pattern):
        raise ConfigError(f"pattern {pattern!r}: a possessive repetition of a group is not translated: write (?>…)")
    return _PART.sub(_translated, pattern)


_PART = re.compile(
    r"(?P<atom>\\[pP]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]|[^\\\[\]()|?*+{}$])(?P<times>\{\d+(?:,\d*)?\}\+)?|(?P<end>\$)",
    re.S,
)
_GROUP_TIMES = re.compile(r"(?<!\\)\)\{\d+(?:,\d*)?\}\+")


def _translated(part: re.Match[str]) -> str:
    if part["end"]:
        return r"\z"
    return f"(?>{part['atom']}{part['times'][:-1]})" if part["times"] else part[0]
