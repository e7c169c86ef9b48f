"""What published tiktoken rank files leave to be known: how text is cut into words, and the special tokens.

The patterns are those of the files' publishers: OpenAI's tiktoken_ext/openai_public.py, Meta's llama3 tokenizer.py,
Qwen's tokenization_qwen.py. A pattern decides ids, so it is written as published, not as it could be simplified.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?")

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"

_LLAMA3_NAMES = (
    *("begin_of_text", "end_of_text", *(f"reserved_special_token_{n}" for n in range(4))),
    *("start_header_id", "end_header_id", "reserved_special_token_4", "eot_id"),
    *(f"reserved_special_token_{n}" for n in range(5, 251)),
)


@dataclass(frozen=True)
class Known:
    """What a published rank file leaves to be known. Special tokens count from the number of its ranks."""

    pattern: str
    special: Mapping[str, int]
    normalization: str = ""
    fast_name: str = ""  # gigatoken's name for the pattern


_OPENAI = {"<|endoftext|>": 0}
KNOWN: Mapping[str, Known] = {
    "gpt2": Known(_GPT2, _OPENAI, fast_name="gpt2"),
    "r50k_base": Known(_GPT2, _OPENAI, fast_name="gpt2"),
    # cl100k_base has 100,256 ranks and leaves the id after them free; so does o200k_base, of 199,998, two further on
    "cl100k_base": Known(
        _CL100K,
        {f"<|{name}|>": n for n, name in enumerate(("endoftext", "fim_prefix", "fim_middle", "fim_suffix"), start=1)}
        | {"<|endofprompt|>": 20},
        fast_name="gpt4",
    ),
    "o200k_base": Known(_O200K, {"<|endoftext|>": 1, "<|endofprompt|>": 20}, fast_name="o200k"),
    "llama3": Known(_LLAMA3, {f"<|{name}|>": n for n, name in enumerate(_LLAMA3_NAMES)}, fast_name="gpt4"),
    "qwen2": Known(
        _QWEN2, {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}, normalization="NFC", fast_name="qwen2"
    ),
}


def looks_like_ranks(content: bytes) -> bool:
    """Whether the file's first line is a base64 token and its rank."""
    return RANK_LINE.fullmatch(content[: content.find(b"\n") if b"\n" in content[:4096] else 4096]) is not None
