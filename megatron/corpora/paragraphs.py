"""Runs of lines between blank ones, and where blocks of them end. A line of white space only is blank.

A line that is too long stands alone, as it may not be held; a run of lines that is too long is one bad paragraph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron.corpora.document import BAD_CONTENT_BYTES
from megatron.corpora.lines import LineBatch, LongLine


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Lines, the last one without its line feed, and the place and number of the first."""

    offset: int
    number: int
    data: bytes


@dataclass(frozen=True, slots=True)
class BlankLine:
    """A line between paragraphs, with its line feed."""

    data: bytes


def paragraphs(batches: Iterable[LineBatch | LongLine], limit: int) -> Iterator[Paragraph | LongLine]:
    """The paragraphs; as a LongLine one of more than `limit` bytes."""
    return (item for item in paragraphs_and_blanks(batches, limit) if not isinstance(item, BlankLine))


def paragraphs_and_blanks(
    batches: Iterable[LineBatch | LongLine], limit: int
) -> Iterator[Paragraph | LongLine | BlankLine]:
    """The paragraphs and what is between them. Holds no more than `limit` bytes and a batch."""
    growing = _Growing(limit)
    for batch in batches:
        if isinstance(batch, LongLine):
            yield from growing.finish()
            yield batch
            continue
        offset = batch.offset
        for number, line in enumerate(batch.lines, start=batch.number):
            if line.strip():
                growing.add(line, offset, number)
            else:
                yield from growing.finish()
                yield BlankLine(line)
            offset += len(line)
    yield from growing.finish()


class _Growing:
    """The paragraph that has begun, if one has."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._offset = self._number = 0
        self._begin()

    def _begin(self) -> None:
        self._content = bytearray()  # not a list: short lines would take many times their bytes
        self._head: bytes | None = None  # set once it is too long
        self._size = self._lines = 0
        self._ended = False  # with a line feed

    def add(self, line: bytes, offset: int, number: int) -> None:
        if not self._lines:
            self._offset, self._number = offset, number
        self._size += len(line)
        self._lines += 1
        self._ended = line.endswith(b"\n")
        if self._head is None:
            self._content += line
            if self._size - self._ended > self._limit:
                self._head, self._content = bytes(self._content[:BAD_CONTENT_BYTES]), bytearray()

    def finish(self) -> Iterator[Paragraph | LongLine]:
        if self._head is not None:
            yield LongLine(self._offset, self._number, self._size - self._ended, self._head, self._lines)
        elif self._lines:
            yield Paragraph(self._offset, self._number, bytes(self._content).removesuffix(b"\n"))
        self._begin()
