"""What every tokenizer of the project gives, whatever library reads its file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron.config.errors import DataError

WRAPPER_VERSION = 1

# Names under which published tokenizers keep their end-of-document token, the plainest first.
EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<|end▁of▁sentence|>")

# SentencePiece models write some with their word's space: \u2581<PRE>
_MARKER = re.compile(r"\u2581?<\S+>|\[[A-Z0-9_]+\]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def _never(text: str) -> bool:
    return False


@dataclass(frozen=True)
class PlainBpe:
    """A tokenizer as plain byte-pair encoding, without its special tokens: what a fast library can be given.

    Either `description`, the text of a Hugging Face tokenizer.json, or a tiktoken `rank_file` with the name of its
    split pattern. A text goes through `prepare` first (None: as it is); a text for which `by_reference` is true must be
    left to the tokenizer itself.
    """

    description: str = ""
    rank_file: Path | None = None
    pattern_name: str = ""
    prepare: Callable[[str], str] | None = None
    by_reference: Callable[[str], bool] = _never


class NotPlainBpe(Exception):
    """A tokenizer that has no equal as plain byte-pair encoding. Its text says why."""


class Tokenizer(Protocol):
    """Text to ids and back. Text is only ever text: the name of a special token in it never becomes that token."""

    @property
    def name(self) -> str:
        """The file's name, for people."""

    @property
    def library(self) -> str:
        """The library that reads the file and its version, such as "sentencepiece 0.2.3"."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eod_id(self) -> int:
        """The id that ends a document. `encode` never gives it."""

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the model file's bytes, its kind, the end-of-document id and our wrapper's version."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text, with nothing added. Raises DataError where the text is not Unicode (a lone surrogate)."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in order, on the calling thread's core as far as the library allows."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids. Special ids give nothing; bytes that are not UTF-8 give U+FFFD."""

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Ids by name of all tokens that text never becomes: the end of a document, FIM sentinels, chat markers."""

    def plain_bpe(self) -> PlainBpe:
        """The tokenizer for a fast library. Raises NotPlainBpe where there is none that gives the same ids."""

    def files(self) -> list[Path]:
        """The files that the tokenizer was read from; copied into checkpoints and exports."""


def looks_like_marker(piece: str) -> bool:
    """True for names in angle brackets or upper-case square ones (`<|im_end|>`, `<sep>`, `[MASK]`): control, not text.

    Files list such names among ordinary "user-defined" or "added" tokens as often as among special ones, and beside
    real text such as runs of spaces, which must go on being matched.
    """
    return _MARKER.fullmatch(piece) is not None


def utf8_of(text: str) -> bytes:
    """The text's UTF-8 bytes. A lone surrogate, which UTF-8 has no bytes for, is a DataError that says where."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"text has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: it is no Unicode "
            "text. Replace it in the corpus (U+FFFD is usual)"
        ) from None


def first_surrogate(text: str) -> int | None:
    """Position of the first lone surrogate, or None."""
    if text.isascii() or not (found := _SURROGATE.search(text)):
        return None
    return found.start()


def fingerprint_of(kind: str, content: bytes, eod_id: int) -> str:
    """The identity of a tokenizer: see `Tokenizer.fingerprint`."""
    digest = hashlib.sha256(f"stagemix-tokenizer-{WRAPPER_VERSION}\n{kind}\n{eod_id}\n".encode())
    digest.update(content)
    return digest.hexdigest()


def stated_eos(folder: Path) -> str | None:
    """`eos_token` of the tokenizer_config.json in the folder, where there is one and it names one."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}): correct the file or remove it") from None
    value = config.get("eos_token") if isinstance(config, dict) else None
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def no_eod_error(path: Path, tried: Iterable[str]) -> DataError:
    """The error for a tokenizer without an end-of-document token."""
    return DataError(
        f"{path}: the tokenizer has no end-of-document token (looked for {', '.join(tried)}, and for eos_token in a "
        'tokenizer_config.json beside it): put {"eos_token": "NAME"} into that file, NAME being a token of the '
        "vocabulary, or train one with train_tokenizer"
    )
