"""Text and code files to documents: a file, a line, or a paragraph between blank lines each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from megatron.corpora.compressed import open_stream
from megatron.corpora.document import BAD_CONTENT_BYTES, BadRecord, Document
from megatron.corpora.git_tree import read_blobs
from megatron.corpora.licences import SPDX_HEADER_BYTES, spdx_expression
from megatron.corpora.lines import CHUNK_BYTES, LineBatch, LongLine
from megatron.corpora.paragraphs import paragraphs
from megatron.corpora.read_options import InputFile, ReadOptions
from megatron.corpora.records import long_line, not_utf8, wanted_document

_BINARY_BYTES = 8000  # git's own test of whether a file is binary: a zero byte in so many of its first ones


def read_whole_files(
    files: Sequence[InputFile], options: ReadOptions, skipped: Counter[str]
) -> Iterator[Document | BadRecord]:
    """A document for each file; binary files and git LFS pointers are counted, not read."""
    limit = options.max_document_bytes
    for repository, group in groupby(files, key=lambda file: file.path if file.kind == "git-blob" else ""):
        members = list(group)
        contents = read_blobs(members, limit) if repository else _contents(members, limit)
        for file, content in contents:
            item = _document(file, content, options, skipped)
            if isinstance(item, BadRecord) or (item is not None and wanted_document(item, options, skipped)):
                yield item


def _contents(files: Iterable[InputFile], limit: int) -> Iterator[tuple[InputFile, bytes | None]]:
    for file in files:
        pieces, size = [], 0
        with open_stream(file.path) as stream:
            while size <= limit and (piece := stream.read(min(CHUNK_BYTES, limit + 1 - size))):
                pieces.append(piece)
                size += len(piece)
        yield file, b"".join(pieces) if size <= limit else None


def _document(
    file: InputFile, content: bytes | None, options: ReadOptions, skipped: Counter[str]
) -> Document | BadRecord | None:
    if content is None:
        reason = (
            f"{file.name} has more than {options.max_document_bytes} bytes: raise max_document_bytes, or leave large "
            "files out with max_file_bytes"
        )
        return BadRecord(file.path, None, 0, reason, b"")
    if b"\0" in content[:_BINARY_BYTES]:
        skipped["binary file"] += 1
        return None
    if len(content) < 1024 and content.startswith(b"version https://git-lfs.github.com/spec/v1\n"):
        skipped["git LFS pointer"] += 1
        return None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        if b"\0" in content:
            skipped["binary file"] += 1
            return None
        place = f"{file.name}: " if file.kind == "git-blob" else ""
        return BadRecord(file.path, None, 0, place + not_utf8(content, 0, error), content[:BAD_CONTENT_BYTES])
    licence = file.licence
    if b"SPDX-License-Identifier" in content[:SPDX_HEADER_BYTES]:
        licence = spdx_expression(text[:SPDX_HEADER_BYTES]) or licence
    return Document(file.name, text, file.language, "", licence)


def read_text_lines(
    batches: Iterable[LineBatch | LongLine], file: InputFile, options: ReadOptions, skipped: Counter[str]
) -> Iterator[Document | BadRecord]:
    """A document for each line that is not blank, without its line end (a line feed or CR LF)."""
    for batch in batches:
        if isinstance(batch, LongLine):
            yield long_line(file, batch, options)
            continue
        offset = batch.offset
        for number, line in enumerate(batch.lines, start=batch.number):
            if line.strip():
                item = _of_lines(file, line.removesuffix(b"\n").removesuffix(b"\r"), offset, number)
                if isinstance(item, BadRecord) or wanted_document(item, options, skipped):
                    yield item
            else:
                skipped["blank line"] += 1
            offset += len(line)


def read_paragraphs(
    batches: Iterable[LineBatch | LongLine], file: InputFile, options: ReadOptions, skipped: Counter[str]
) -> Iterator[Document | BadRecord]:
    """A document for each run of lines between blank ones (of white space only), without its last line end."""
    for paragraph in paragraphs(batches, options.max_document_bytes):
        if isinstance(paragraph, LongLine):
            yield long_line(file, paragraph, options, "paragraph")
            continue
        item = _of_lines(file, paragraph.data.removesuffix(b"\r"), paragraph.offset, paragraph.number)
        if isinstance(item, BadRecord) or wanted_document(item, options, skipped):
            yield item


def _of_lines(file: InputFile, content: bytes, offset: int, number: int) -> Document | BadRecord:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRecord(file.path, number, offset, not_utf8(content, offset, error), content[:BAD_CONTENT_BYTES])
    return Document(f"{file.name}@{offset}", text, file.language, "", file.licence)
