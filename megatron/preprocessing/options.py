"""What decides the outcome of preprocessing, apart from its inputs and its tokenizer."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from megatron.config.errors import ConfigError
from megatron.corpora.chat_options import ChatOptions
from megatron.corpora.cleaning import CleaningOptions
from megatron.corpora.read_options import ReadOptions
from megatron.tokenizers.encoder import Backend


@dataclass(frozen=True)
class PreprocessOptions:
    """How documents are read, cleaned and encoded, and what becomes of records that are no documents.

    on_error: "fail" ends the run at the first bad record; "quarantine" writes bad records to `P.quarantine.jsonl`.
    block_bytes: bytes of input for each part of the work; None: from the size of the corpus. It changes no output byte.
    chat: for records that are conversations (then `read` has a chat_format too); None: documents are texts.
    """

    read: ReadOptions = field(default_factory=ReadOptions)
    cleaning: CleaningOptions = field(default_factory=CleaningOptions)
    encoder: Backend = "auto"
    on_error: Literal["fail", "quarantine"] = "fail"
    block_bytes: int | None = None
    chat: ChatOptions | None = None

    def __post_init__(self) -> None:
        if self.encoder not in ("auto", "fast", "reference"):
            raise ConfigError(f"encoder = {self.encoder!r}: one of auto, fast, reference")
        if self.on_error not in ("fail", "quarantine"):
            raise ConfigError(f"on_error = {self.on_error!r}: one of fail, quarantine")
        if self.block_bytes is not None and self.block_bytes < 1:
            raise ConfigError(f"block_bytes = {self.block_bytes}: at least 1 is needed")
        if (self.chat is None) != (not self.read.chat_format):
            raise ConfigError("chat and read.chat_format: conversations need both, texts have neither")

    def to_json(self) -> dict[str, Any]:
        """Everything here that decides the output. Reads evaluation sets that are not prepared yet."""
        read = _plain(asdict(self.read))
        if not self.read.chat_format:
            del read["chat_format"]  # texts have none
        return {"read": read, "cleaning": self.cleaning.to_json(), "encoder": self.encoder}


@dataclass(frozen=True)
class Shard:
    """One of several processes, on any machines, that share a corpus: number 1 .. count."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or not 1 <= self.number <= self.count:
            raise ConfigError(
                f"shard {self.number}/{self.count}: give I/N with I from 1 to N: under a SLURM array of 1-N that is "
                '"$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_MAX"'
            )

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, words: str) -> Shard:
        """The shard that "3/8" names. Raises ConfigError."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", words.strip())
        if found is None:
            raise ConfigError(f"shard {words!r}: give I/N, for example 3/8, with I from 1 to N")
        return cls(int(found[1]), int(found[2]))


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
