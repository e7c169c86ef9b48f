"""Where the blocks of each kind of file begin and end. Everything gives pairs: number of the first line, payload."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

from megatron.corpora.compressed import open_file, open_stream
from megatron.corpora.lines import LineBatch, LongLine, line_batches
from megatron.corpora.paragraphs import BlankLine, paragraphs_and_blanks
from megatron.corpora.payloads import Content, LineRange, Payload, Rows, TooLong, WholeFiles
from megatron.corpora.read_options import InputFile, ReadOptions

LARGEST_CONTENT = 16 << 20  # bytes of lines that a block carries itself, but for its last line
_FILES_TOGETHER = 4096
_PIECE_BYTES = 1 << 16

Cuts = Iterator[tuple[int | None, Payload]]


def group_small(
    files: Sequence[InputFile], first: int, block_bytes: int, joins: Callable[[InputFile], bool]
) -> WholeFiles:
    """The files from number `first` on that make one block: as many as it takes to fill it."""
    group: list[InputFile] = []
    size = 0
    while first + len(group) < len(files) and joins(files[first + len(group)]):
        file = files[first + len(group)]
        if group and (size + file.size > block_bytes or len(group) == _FILES_TOGETHER):
            break
        group.append(file)
        size += file.size
    return WholeFiles(tuple(group))


def cut_rows(file: InputFile, options: ReadOptions, block_bytes: int) -> Cuts:
    """Consecutive row groups of about `block_bytes` in all."""
    from megatron.corpora.parquet import row_groups

    first, rows_before = 0, 0
    count = rows = size = 0
    for group_rows, group_bytes in row_groups(file, options):
        if count and size + group_bytes > block_bytes:
            yield rows_before + 1, Rows(file, first, count)
            first, rows_before, count, rows, size = first + count, rows_before + rows, 0, 0, 0
        count, rows, size = count + 1, rows + group_rows, size + group_bytes
    if count:
        yield rows_before + 1, Rows(file, first, count)


def cut_plain(file: InputFile, options: ReadOptions, block_bytes: int) -> Cuts:
    """Byte ranges that end at the first line end at or after `block_bytes`; of paragraphs, behind a blank line."""
    find = _blank_line_end if _by_blank_line(file, options) else _line_end
    with open_file(file.path) as raw:
        end = raw.seek(0, 2)
        start = 0
        while start < end:
            stop = min(find(raw, start + block_bytes - 1, end), end)
            yield 1 if start == 0 else None, LineRange(file, start, stop)
            start = stop


def _by_blank_line(file: InputFile, options: ReadOptions) -> bool:
    return file.kind == "text" and options.text_documents == "blank-line"


def _line_end(raw: BinaryIO, at: int, end: int) -> int:
    """The place behind the first line feed at or after `at`; `end` if there is none."""
    if at >= end:
        return end
    raw.seek(at)
    while piece := raw.read(_PIECE_BYTES):
        if (found := piece.find(b"\n")) >= 0:
            return at + found + 1
        at += len(piece)
    return end


def _blank_line_end(raw: BinaryIO, at: int, end: int) -> int:
    """The place behind the first blank line that begins after a line end at or after `at`."""
    begin = _line_end(raw, at, end)
    while begin < end:
        stop = _line_end(raw, begin, end)
        if _is_blank(raw, begin, stop):
            return stop
        begin = stop
    return end


def _is_blank(raw: BinaryIO, begin: int, stop: int) -> bool:
    raw.seek(begin)
    while begin < stop and (piece := raw.read(min(_PIECE_BYTES, stop - begin))):
        if piece.strip():
            return False
        begin += len(piece)
    return True


def cut_compressed(file: InputFile, options: ReadOptions, block_bytes: int) -> Cuts:
    """Lines out of a compressed stream, as many as it takes to fill a block; what is too long stands alone."""
    target, limit = min(block_bytes, LARGEST_CONTENT), options.max_document_bytes
    filling = _Filling(file)
    with open_stream(file.path) as stream:
        batches = line_batches(stream.read, limit)
        items = paragraphs_and_blanks(batches, limit) if _by_blank_line(file, options) else batches
        for item in items:
            if isinstance(item, LongLine):
                yield from filling.finish()
                yield filling.line, TooLong(file, item.offset, item.size, item.head)
                filling.begin(item.offset + item.size + 1, filling.line + item.lines)
            elif isinstance(item, LineBatch):
                yield from filling.add_lines(item.data, target)
            else:
                filling.add(item.data if isinstance(item, BlankLine) else item.data + b"\n")
                if isinstance(item, BlankLine) and filling.size >= target:
                    yield from filling.finish()
        yield from filling.finish()


class _Filling:
    """The block that is being filled; `line` is the number of its first line in the file."""

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self.begin(0, 1)

    def begin(self, offset: int, line: int) -> None:
        """A block begins at this place and line of the stream."""
        self._offset, self.line = offset, line
        self._pieces: list[bytes] = []
        self.size = 0

    def add(self, data: bytes) -> None:
        """Whole lines."""
        self._pieces.append(data)
        self.size += len(data)

    def add_lines(self, data: bytes, target: int) -> Cuts:
        """Adds lines; the blocks that end among them, each at the first line end at or after `target` bytes."""
        place = 0
        while place < len(data):
            end = data.find(b"\n", place + max(0, target - self.size - 1)) + 1 or len(data)
            self.add(data[place:end])
            place = end
            if self.size >= target:
                yield from self.finish()

    def finish(self) -> Cuts:
        """The block, if it has lines."""
        if self._pieces:
            content = b"".join(self._pieces)
            offset, line = self._offset, self.line
            self.begin(offset + len(content), line + content.count(b"\n"))
            yield line, Content(self._file, offset, content)
