"""Byte streams to lines, in batches; a line that is too long is passed over and never held."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron.corpora.document import BAD_CONTENT_BYTES

CHUNK_BYTES = 1 << 17  # larger ones leave the cache and were measured slower


@dataclass(frozen=True, slots=True)
class LineBatch:
    """Consecutive lines with their line feeds, which the file's last one may lack; `data` is all of them together.

    `offset` is the first one's place in the stream, `number` its number from 1 within the block.
    """

    offset: int
    number: int
    data: bytes
    lines: list[bytes]


@dataclass(frozen=True, slots=True)
class LongLine:
    """A line longer than the limit: `size` in bytes, and its first ones; or a run of so many `lines`."""

    offset: int
    number: int
    size: int
    head: bytes
    lines: int = 1


def line_batches(read: Callable[[int], bytes], limit: int, offset: int = 0) -> Iterator[LineBatch | LongLine]:
    """The lines of what `read(size)` gives until it gives nothing. `limit` is in bytes without the line feed."""
    number = 1
    held: list[bytes] = []  # a line that has begun
    size = 0
    waiting = b""  # what was read behind a line that is too long
    while chunk := waiting or read(CHUNK_BYTES):
        waiting = b""
        end = chunk.rfind(b"\n") + 1
        if not end:
            held.append(chunk)
            size += len(chunk)
            if size > limit:
                line, waiting = _skip_line(read, held, size, offset, number)
                yield line
                offset, number = offset + line.size + 1, number + 1
                held, size = [], 0
            continue
        held.append(chunk[:end])
        data = b"".join(held) if len(held) > 1 else held[0]
        lines = io.BytesIO(data).readlines()  # finds line feeds many times faster than bytes.split
        yield from _checked(LineBatch(offset, number, data, lines), limit)
        offset, number = offset + len(data), number + len(lines)
        held = [chunk[end:]] if end < len(chunk) else []
        size = len(chunk) - end
    if size:
        data = b"".join(held)
        yield from _checked(LineBatch(offset, number, data, [data]), limit)


def _skip_line(
    read: Callable[[int], bytes], held: list[bytes], size: int, offset: int, number: int
) -> tuple[LongLine, bytes]:
    """Passes over the rest of a line; gives the line and the bytes read behind its end."""
    head = b"".join(held)[:BAD_CONTENT_BYTES]
    held.clear()
    while chunk := read(CHUNK_BYTES):
        end = chunk.find(b"\n")
        if end >= 0:
            return LongLine(offset, number, size + end, head), chunk[end + 1 :]
        size += len(chunk)
    return LongLine(offset, number, size, head), b""


def _checked(batch: LineBatch, limit: int) -> Iterator[LineBatch | LongLine]:
    """The batch, cut around its lines that are too long."""
    if len(batch.data) <= limit or all(len(line) <= limit for line in batch.lines):
        yield batch
        return
    offset, number, good = batch.offset, batch.number, list[bytes]()
    for line in batch.lines:
        if (size := len(line) - line.endswith(b"\n")) <= limit:
            good.append(line)
            continue
        if good:
            yield LineBatch(offset, number, b"".join(good), good)
            offset, number, good = offset + sum(map(len, good)), number + len(good), []
        yield LongLine(offset, number, size, line[: min(size, BAD_CONTENT_BYTES)])
        offset, number = offset + len(line), number + 1
    if good:
        yield LineBatch(offset, number, b"".join(good), good)
