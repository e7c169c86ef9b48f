"""What is read and how: the options of the readers, and one file of a corpus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.errors import ConfigError

Kind = Literal["json-lines", "parquet", "text", "git-blob"]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How documents are found and which are kept. Picklable; everything that decides a block's content is here."""

    text_field: str = "text"
    id_field: str = "id"
    language_field: str = ""  # the field or column with a document's language; "": files only, by name
    source_field: str = ""
    licence_field: str = ""  # a string, or a list of strings that all apply
    suffixes: tuple[str, ...] = ()  # endings of names that are taken from folders; none: all
    languages: tuple[str, ...] = ()  # keep only these; none: all
    licences: tuple[str, ...] = ()  # keep only documents under these SPDX licences; none: all
    min_file_bytes: int = 0  # of text and code files
    max_file_bytes: int | None = None
    gitignore: bool = True  # pass over what .gitignore files name, in folders
    git: bool = False  # read repositories at HEAD, tracked files only, instead of the checked-out files
    text_documents: Literal["file", "line", "blank-line"] = "file"  # what a document of a plain text file is
    chat_format: Literal["", "auto", "alpaca", "sharegpt", "messages", "prompt-completion"] = ""  # "": no chat records
    max_document_bytes: int = 64 << 20  # a longer line, row or file is a bad record and never held whole

    def __post_init__(self) -> None:
        if self.text_documents not in ("file", "line", "blank-line"):
            raise ConfigError(f"text_documents = {self.text_documents!r}: one of file, line, blank-line")
        if self.chat_format not in ("", "auto", "alpaca", "sharegpt", "messages", "prompt-completion"):
            raise ConfigError(
                f"chat_format = {self.chat_format!r}: one of auto, alpaca, sharegpt, messages, prompt-completion"
            )
        if not self.text_field:
            raise ConfigError("text_field is empty: name the field that has the text")
        for name in ("min_file_bytes", "max_document_bytes"):
            if getattr(self, name) < (name == "max_document_bytes"):
                raise ConfigError(f"{name} = {getattr(self, name)}: too small")
        if self.max_file_bytes is not None and self.max_file_bytes < self.min_file_bytes:
            raise ConfigError(f"max_file_bytes = {self.max_file_bytes} is below min_file_bytes = {self.min_file_bytes}")


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of a corpus.

    `name` is the prefix of its documents' ids: the path relative to the folder it was found in, or the file's name.
    `size` is in bytes as they lie on the disk. For a git blob `path` is the repository's git folder, `object_id` the
    blob's, and `size` the blob's.
    """

    path: str
    name: str
    kind: Kind
    size: int
    language: str = ""
    licence: str = ""
    object_id: str = ""
