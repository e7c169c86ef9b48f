"""A corpus as one sequence of documents, read here and now: for what needs no workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron.config.errors import DataError
from megatron.corpora.blocks import absolute_line, cut_blocks, read_block
from megatron.corpora.document import BadRecord, Document
from megatron.corpora.selection import InputFile, ReadOptions, select_files

_BLOCK_BYTES = 16 << 20


def read_documents(
    inputs: Sequence[str | Path],
    options: ReadOptions | None = None,
    *,
    files_from: str | Path | None = None,
    skipped: Counter[str] | None = None,
) -> Iterator[Document]:
    """The documents of the inputs, in order. `skipped` counts what was passed over, by reason.

    Raises DataError as `select_files` does, at the first bad record, and for inputs without any document.
    """
    options = options or ReadOptions()
    counts = skipped if skipped is not None else Counter[str]()
    found = False
    for block in cut_blocks(select_files(inputs, files_from, options, counts), options, _BLOCK_BYTES):
        for item in read_block(block, options, counts):
            if isinstance(item, BadRecord):
                raise DataError(item.message(absolute_line(block, item.line)))
            found = True
            yield item
    if not found:
        passed = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        names = ", ".join(map(str, [*inputs, *([files_from] if files_from is not None else [])]))
        raise DataError(
            f"{names}: the corpus is empty: no document in it" + (f" (passed over: {passed})" if passed else "")
        )


def corpus_bytes(files: Iterable[InputFile]) -> int:
    """Size of the files as they lie on the disk, for progress bars; of git blobs, their own."""
    return sum(file.size for file in files)
