"""Reads raw corpora: folders of text and code, plain text files, and JSON lines, compressed or not.

A reader is picked by the file's name. Every document that cannot be read is a DataError that names file and place.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from megatron.config.errors import DataError
from megatron.tokenizers.base import first_surrogate

_SKIPPED_FOLDERS = {".git", ".hg", ".svn", "__pycache__", "node_modules", ".venv"}


@dataclass(frozen=True)
class Document:
    """One document: `id` names where it came from, `text` is its Unicode text, perhaps empty."""

    id: str
    text: str


@dataclass(frozen=True)
class ReadOptions:
    """How documents are found: the JSON fields of text and id, and the file endings taken from folders (none: all)."""

    text_field: str = "text"
    id_field: str = "id"
    suffixes: tuple[str, ...] = ()


@dataclass
class ReadProgress:
    """What was read so far, in bytes as they lie on the disk; kept up to date while a corpus is read."""

    bytes_read: int = 0
    files_read: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


def corpus_files(path: str | Path, options: ReadOptions | None = None) -> list[Path]:
    """The files of a corpus in the order they are read: the path itself, or all files below a folder, sorted by path.

    Links that leave the folder or lead to folders are not followed; version-control and cache folders are passed over.
    Raises DataError where the path is missing or holds no file.
    """
    options = options or ReadOptions()
    root = Path(path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        reason = "not a file or a folder" if root.exists() else "no such file or folder"
        raise DataError(f"{root}: {reason}: correct the input path")
    inside = root.resolve()
    files: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=_raise_walk_error):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        for name in names:
            file = Path(folder, name)
            wanted = not options.suffixes or name.endswith(options.suffixes)
            if wanted and file.is_file() and (not file.is_symlink() or file.resolve().is_relative_to(inside)):
                files.append(file)
    if not files:
        wanted_names = f" whose name ends in {' or '.join(options.suffixes)}" if options.suffixes else ""
        raise DataError(f"{root}: the corpus is empty: the folder holds no file{wanted_names}")
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def read_corpus(
    path: str | Path, options: ReadOptions | None = None, progress: ReadProgress | None = None
) -> Iterator[Document]:
    """The documents of a file or a folder, in order.

    `.jsonl` and `.jsonl.gz` (`.json.gz`, `.ndjson`) hold one JSON object a line; any other file is one document. In a
    folder, ids are paths relative to it. Raises DataError: a missing path, an empty corpus, bytes that are not UTF-8,
    bad JSON, a missing or wrong field, a cut-off `.gz`: each with the file and the line or byte.
    """
    options, progress = options or ReadOptions(), progress or ReadProgress()
    root = Path(path)
    found = False
    for file in corpus_files(root, options):
        name = file.name if root.is_file() else file.relative_to(root).as_posix()
        reader = _reader_for(file)
        for document in reader(file, name, options, progress):
            found = True
            yield document
        progress.files_read += 1
    if not found:
        raise DataError(f"{root}: the corpus is empty: no document in it")


def read_corpora(
    paths: Sequence[str | Path], options: ReadOptions | None = None, progress: ReadProgress | None = None
) -> Iterator[Document]:
    """The documents of several corpora, one corpus after another."""
    if not paths:
        raise DataError("no input was given")
    for path in paths:
        yield from read_corpus(path, options, progress)


def corpus_bytes(paths: Sequence[str | Path], options: ReadOptions | None = None) -> int:
    """Size on the disk of all files of the corpora, for progress bars. Raises DataError as `corpus_files` does."""
    return sum(file.stat().st_size for path in paths for file in corpus_files(path, options))


Reader = Callable[[Path, str, ReadOptions, ReadProgress], Iterator[Document]]


def _reader_for(file: Path) -> Reader:
    name = file.name.lower()
    if name.endswith((".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz")):
        return _read_json_lines
    if name.endswith((".zst", ".parquet", ".bz2", ".xz", ".zip", ".tar", ".tgz")):
        raise DataError(f"{file}: files of this kind are not read: unpack it to .jsonl, .jsonl.gz or text files")
    return _read_text


def _read_text(file: Path, name: str, options: ReadOptions, progress: ReadProgress) -> Iterator[Document]:
    with _opened(file) as raw:
        content = _read_checked(file, _unpacked(file, raw), -1)
    progress.bytes_read += file.stat().st_size
    yield Document(name, _decoded(content, f"{file}", 0))


def _read_json_lines(file: Path, name: str, options: ReadOptions, progress: ReadProgress) -> Iterator[Document]:
    offset = 0
    before = progress.bytes_read
    with _opened(file) as raw:
        for number, line in enumerate(_lines(file, _unpacked(file, raw)), start=1):
            progress.bytes_read = before + raw.tell()
            if line.strip():
                yield _document_of_line(line, f"{file}: line {number}", offset, f"{name}:{number}", options)
            else:
                progress.skip("blank line")
            offset += len(line)


def _document_of_line(line: bytes, place: str, offset: int, fallback_id: str, options: ReadOptions) -> Document:
    text = _decoded(line, place, offset)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}, column {error.colno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{place}: a JSON object is expected, this is {_kind(record)}")
    if options.text_field not in record:
        present = ", ".join(map(repr, list(record)[:8])) or "none"
        raise DataError(
            f"{place}: field {options.text_field!r} is missing (fields: {present}): name the one that has the text "
            "with --text-field"
        )
    value = record[options.text_field]
    if not isinstance(value, str):
        raise DataError(f"{place}: field {options.text_field!r}: a string is expected, this is {_kind(value)}")
    if (at := first_surrogate(value)) is not None:
        raise DataError(
            f"{place}: field {options.text_field!r}: lone surrogate U+{ord(value[at]):04X} at character {at} is not "
            "Unicode text: replace it (U+FFFD is usual)"
        )
    name = record.get(options.id_field)
    return Document(str(name) if isinstance(name, str | int) and not isinstance(name, bool) else fallback_id, value)


def _opened(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except PermissionError:
        raise DataError(f"{file}: no permission to read it") from None
    except FileNotFoundError:
        raise DataError(f"{file}: it was there when the folder was listed, and is gone now") from None


def _unpacked(file: Path, raw: BinaryIO) -> BinaryIO | gzip.GzipFile:
    return gzip.GzipFile(fileobj=raw) if file.name.lower().endswith(".gz") else raw


def _lines(file: Path, stream: BinaryIO | gzip.GzipFile) -> Iterator[bytes]:
    while line := _read_checked(file, stream, None):
        yield line


def _read_checked(file: Path, stream: BinaryIO | gzip.GzipFile, size: int | None) -> bytes:
    """A line (size None) or everything; a damaged archive is a DataError."""
    try:
        return stream.readline() if size is None else stream.read(size)
    except EOFError:
        raise DataError(f"{file}: the gzip file was cut off: its end is missing. Get it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}: the gzip file is damaged: {error}. Get it again") from None


def _decoded(content: bytes, place: str, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: byte {offset + error.start} (0x{content[error.start]:02x}) is not UTF-8: {error.reason}. "
            "Convert the file to UTF-8, or leave it out"
        ) from None


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _raise_walk_error(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder cannot be read: {error.strerror}")
