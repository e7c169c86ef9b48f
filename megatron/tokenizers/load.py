"""Opens any tokenizer by its path; the file's content decides its kind."""

from __future__ import annotations

from pathlib import Path

from megatron.config.errors import DataError
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.byte_level import ByteTokenizer
from megatron.tokenizers.tiktoken_patterns import looks_like_ranks

_IN_A_FOLDER = ("tokenizer.json", "tokenizer.model")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a SentencePiece `.model`, a `tokenizer.json`, a tiktoken rank file, or a folder that holds one.

    The path "bytes" is the built-in byte tokenizer. Raises DataError where the file is missing, empty, damaged, of
    no known kind, or has no end-of-document token; UnavailableError where the library that reads it is not installed.
    """
    if str(path) == "bytes":
        return ByteTokenizer()
    file = _file_of(Path(path))
    try:
        content = file.read_bytes()
    except PermissionError:
        raise DataError(f"{file}: no permission to read it") from None
    if not content:
        raise DataError(f"{file}: the file is empty")
    # Each library is imported only where its format is met: both are slow to load.
    if content.lstrip()[:1] == b"{":
        from megatron.tokenizers.hugging_face import HuggingFaceTokenizer

        return HuggingFaceTokenizer(file, content)
    if looks_like_ranks(content):
        from megatron.tokenizers.tiktoken_tokenizer import TiktokenTokenizer

        return TiktokenTokenizer(file, content)
    from megatron.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(file, content)


def _file_of(path: Path) -> Path:
    if path.is_dir():
        for name in _IN_A_FOLDER:
            if (path / name).is_file():
                return path / name
        if len(ranks := sorted(path.glob("*.tiktoken"))) == 1:
            return ranks[0]
        raise DataError(f"{path}: neither {' nor '.join(_IN_A_FOLDER)} nor one .tiktoken file is in this folder")
    if not path.is_file():
        raise DataError(
            f"{path}: no such file: give a SentencePiece .model, a tokenizer.json, a .tiktoken file, or `bytes`, "
            "or make one with train_tokenizer"
        )
    return path
