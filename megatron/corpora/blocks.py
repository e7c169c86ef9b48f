"""A corpus in blocks: cut once, in order, by the main process; read in workers, each block alone.

Where blocks begin and end depends on the files, the options and `block_bytes` only. The documents of all blocks, one
block after another, are the corpus.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron.config.errors import ConfigError, DataError
from megatron.corpora.block_cuts import cut_compressed, cut_plain, cut_rows, group_small
from megatron.corpora.compressed import compression_of, open_file
from megatron.corpora.document import BadRecord, Document
from megatron.corpora.json_lines import read_json_lines
from megatron.corpora.lines import CHUNK_BYTES, LineBatch, LongLine, line_batches
from megatron.corpora.payloads import Content, LineRange, Payload, Rows, TooLong, WholeFiles
from megatron.corpora.read_options import InputFile, ReadOptions
from megatron.corpora.text_files import read_paragraphs, read_text_lines, read_whole_files


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the corpus that a worker reads alone.

    `file_number` is the position of its first file among the files, `block_number` counts the blocks that begin in
    that file from 0, `first_line` is the number of its first line in the file (of its first row, in parquet), None
    where that is not known without reading what is before. `payload` is None in a block that was not wanted.
    """

    file_number: int
    block_number: int
    first_line: int | None
    payload: Payload | None


def cut_blocks(
    files: Sequence[InputFile],
    options: ReadOptions,
    block_bytes: int,
    wanted: Callable[[int, int], bool] = lambda file_number, block_number: True,
) -> Iterator[Block]:
    """The blocks of the files, in order. Runs in the main process; holds one block of a compressed file.

    Blocks for which `wanted(file_number, block_number)` is false come without content (payload None); their numbers
    go on. Raises DataError for a file that is gone, a damaged or cut-off archive, a column of the wrong type.
    """
    if block_bytes < 1:
        raise ConfigError(f"block_bytes = {block_bytes}: at least 1 is needed")
    number = 0
    while number < len(files):
        file = files[number]
        step = 1
        payloads: Iterator[tuple[int | None, Payload]]
        if _is_whole(file, options):
            group = group_small(files, number, block_bytes, lambda file: _is_whole(file, options))
            step, payloads = len(group.files), iter([(None, group)])
        elif file.kind == "parquet":
            payloads = cut_rows(file, options, block_bytes)
        elif compression_of(file.path):
            payloads = cut_compressed(file, options, block_bytes)
        else:
            payloads = cut_plain(file, options, block_bytes)
        for block_number, (first_line, payload) in enumerate(payloads):
            kept = payload if wanted(number, block_number) else None
            yield Block(number, block_number, first_line, kept)
        number += step


def _is_whole(file: InputFile, options: ReadOptions) -> bool:
    return file.kind == "git-blob" or (file.kind == "text" and options.text_documents == "file")


def read_block(
    block: Block, options: ReadOptions, skipped: Counter[str] | None = None
) -> Iterator[Document | BadRecord]:
    """The documents and bad records of a block, in order, streamed. Runs in a worker.

    `skipped` counts what is neither: blank lines, binary files, documents whose language or licence is not wanted.
    Raises DataError for a file that is gone or has changed, or an archive that is damaged.
    """
    counts = skipped if skipped is not None else Counter[str]()
    payload = block.payload
    if isinstance(payload, WholeFiles):
        return read_whole_files(payload.files, options, counts)
    if isinstance(payload, Rows):
        # imported where parquet is read: loading pyarrow takes a while and much memory
        from megatron.corpora.parquet import read_row_groups

        return read_row_groups(payload.file, payload.first, payload.count, options, counts)
    if isinstance(payload, LineRange | Content | TooLong):
        read = read_json_lines if payload.file.kind == "json-lines" else _text_reader(options)
        return read(batches_of(payload, options), payload.file, options, counts)
    raise ValueError(f"block {block.file_number}, {block.block_number} has no content: it was not wanted")


def _text_reader(
    options: ReadOptions,
) -> Callable[[Iterator[LineBatch | LongLine], InputFile, ReadOptions, Counter[str]], Iterator[Document | BadRecord]]:
    return read_text_lines if options.text_documents == "line" else read_paragraphs


def batches_of(payload: LineRange | Content | TooLong, options: ReadOptions) -> Iterator[LineBatch | LongLine]:
    """The lines that a block carries, or says where to read."""
    limit = options.max_document_bytes
    if isinstance(payload, TooLong):
        yield LongLine(payload.offset, 1, payload.size, payload.head)
    elif isinstance(payload, Content):
        yield from line_batches(io.BytesIO(payload.content).read, limit, payload.offset)
    else:
        yield from _range_batches(payload, limit)


def _range_batches(payload: LineRange, limit: int) -> Iterator[LineBatch | LongLine]:
    left = payload.stop - payload.start
    with open_file(payload.file.path) as raw:
        raw.seek(payload.start)

        def read(size: int) -> bytes:
            nonlocal left
            content = raw.read(min(size, left))
            left -= len(content)
            if left and not content:
                raise DataError(f"{payload.file.path}: the file has become shorter while it was read: run again")
            return content

        yield from line_batches(read, limit, payload.start)


def absolute_line(block: Block, line: int | None) -> int | None:
    """The number in its file of a line that is counted within the block. Counts the line ends before it on demand."""
    if line is None:
        return None
    if block.first_line is not None:
        return block.first_line + line - 1
    if not isinstance(block.payload, LineRange):
        return None
    left, ends = block.payload.start, 0
    with open_file(block.payload.file.path) as raw:
        while left and (content := raw.read(min(left, CHUNK_BYTES))):
            ends += content.count(b"\n")
            left -= len(content)
    return ends + line
