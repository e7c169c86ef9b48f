"""What readers give: documents, and records that are not documents with the reason why."""

from __future__ import annotations

from dataclasses import dataclass

BAD_CONTENT_BYTES = 1 << 20  # how much of a bad record is kept


@dataclass(frozen=True, slots=True)
class Document:
    """One document: `id` names where it came from, `text` is its Unicode text, perhaps empty.

    The id is the record's own, or a file's name; without one, `name@offset` in bytes of the decompressed file for a
    line or paragraph, `name@row` (from 1) in parquet: the same however the corpus is cut into blocks.
    `language` is GitHub linguist's name for files ("Python"), or the value of the language field; `licence` is an SPDX
    expression. Both are "" where nothing is known.
    """

    id: str
    text: str
    language: str = ""
    source: str = ""
    licence: str = ""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be a document.

    `file` is its path. `line` counts from 1 within the block's stream (rows, in parquet), None for a whole file;
    `blocks.absolute_line` makes it the file's. `byte` is the record's offset in the file's decompressed stream.
    `reason` says what is wrong and what to do; `content` is the record's bytes, at most 1 MiB of them.
    """

    file: str
    line: int | None
    byte: int | None
    reason: str
    content: bytes

    def message(self, absolute_line: int | None) -> str:
        """One sentence for the user: file, line of the file, reason."""
        place = "" if absolute_line is None else f" line {absolute_line}:"
        return f"{self.file}:{place} {self.reason}"
