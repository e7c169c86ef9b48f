"""What a block carries to a worker: where to read, or the bytes themselves."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.corpora.read_options import InputFile


@dataclass(frozen=True, slots=True)
class LineRange:
    """Bytes `start` to `stop` of a plain file; both are line ends (or the file's)."""

    file: InputFile
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Content:
    """Whole lines out of a compressed file; `offset` is their place in the decompressed stream."""

    file: InputFile
    offset: int
    content: bytes


@dataclass(frozen=True, slots=True)
class TooLong:
    """A line of a compressed file that is longer than `max_document_bytes`: its place, size and first bytes."""

    file: InputFile
    offset: int
    size: int
    head: bytes


@dataclass(frozen=True, slots=True)
class Rows:
    """Row groups of a parquet file."""

    file: InputFile
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class WholeFiles:
    """Files that are a document each."""

    files: tuple[InputFile, ...]


Payload = LineRange | Content | TooLong | Rows | WholeFiles
