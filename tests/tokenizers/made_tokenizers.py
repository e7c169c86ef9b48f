"""Tiny tokenizer files of every kind, made by the libraries that define them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "def add(left, right):\n    # The sum of two numbers.\n    return left + right\n\n\nclass Thing:\n\tpass\n",
    "It was a bright cold day in April, and the clocks were striking thirteen; don't we'll I'm.\n",
    "if x == 12345:\n        print('naïve café, 你好, привет, e\u0301')\n",
] * 8
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def write_sentencepiece(path: Path, **options: Any) -> Path:
    """A SentencePiece model; options are the library's, over BPE with byte fallback and nothing normalised."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **(settings | options))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path


def write_byte_level(path: Path, pattern: str | None = LLAMA3, **changes: Any) -> Path:
    """A byte-level BPE tokenizer.json, cut by the pattern (None: GPT-2's); `changes` are put into its JSON."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        cut = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(json.loads(tokenizer.to_str()) | changes))
    return path


def write_ranks(path: Path, ranks: dict[bytes, int] | None = None) -> Path:
    """A tiktoken rank file: the 256 bytes and a few words of English and Python."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ranks = ranks or made_ranks()
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


def made_ranks() -> dict[bytes, int]:
    tokens = [bytes([byte]) for byte in range(256)]
    for word in (b" the", b" return", b"    ", b"def", b"\n\n", b"123", b" \xd0\xbf\xd1\x80", b"'ll"):
        tokens += [word[:end] for end in range(2, len(word) + 1) if word[:end] not in tokens]
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
