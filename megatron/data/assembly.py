"""Reads samples: their tokens, targets, document bounds and positions, straight from the memory-mapped files.

`gather_twin` defines what is read; the extension's `gather` gives the same arrays in one call, without the GIL, and
checks every place before it reads it. It imports no torch: the loader hands it arrays that lie in tensors.

Only `TokenFile.tokens` and `IndexedDataset.arrays` touch a file's bytes. A corpus in an object store would enter there:
an opened file that fetches the byte ranges of a batch (fsspec's `cat_ranges`) and gives the twin views of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from megatron.config.errors import DataError
from megatron.data.ledger import order_sums
from megatron.data.native import native
from megatron.data.permutation import GOLDEN, mix64_array
from megatron.data.samples import Sample
from megatron.data.source_files import SourceFiles
from megatron.data.source_stream import EpochSpan
from megatron.data.sources import OpenSource

IGNORED_TARGET = -100

Ids = npt.NDArray[np.int64]
Bounds = npt.NDArray[np.int32]
Spans = Sequence[EpochSpan] | npt.NDArray[np.int64]
"""The spans of one sample, in order: tuples, or int64 [n, 4] of (epoch, document, start, end)."""


@dataclass(frozen=True)
class BatchArrays:
    """Arrays of b samples of T places to be filled: tokens, targets and position_ids int64 [b, T], document_ids int32
    [b, T], each contiguous.
    """

    tokens: Ids
    targets: Ids
    document_ids: npt.NDArray[np.int32]
    position_ids: Ids

    @staticmethod
    def empty(samples: int, seq_length: int) -> BatchArrays:
        """New arrays, not yet filled."""
        shape = (samples, seq_length)
        return BatchArrays(
            np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.int32), np.empty(shape, np.int64)
        )


@dataclass(frozen=True)
class SampleTokens:
    """A sample's arrays.

    tokens [T] int64 · targets [T] int64, -100 where there is none · document_ids [T] int32, span numbers from 0
    upwards · position_ids [T] int64, from 0 in each span · cu_seqlens [spans + 1] int32: 0, the end of each span, T.
    """

    tokens: Ids
    targets: Ids
    document_ids: npt.NDArray[np.int32]
    position_ids: Ids
    cu_seqlens: Bounds
    source_id: int


def assemble(sample: Sample, source: OpenSource, seq_length: int) -> SampleTokens:
    """Reads a sample. Each target is the next token of the same document, also where that lies beyond the sample; a
    document's last token has none; of a masked sample only those that the source's loss mask marks are targets. The
    spans of `sample.fim` are rearranged before their targets are taken, and their last token has none. What a
    validation window that is shorter than a sample leaves is one more span, of id 0 and without targets.

    Raises IndexError for spans outside the documents, ValueError for spans longer than the sample or backward,
    DataError where a file has changed since it was opened.
    """
    out = BatchArrays(
        np.empty(seq_length, np.int64),
        np.empty(seq_length, np.int64),
        np.empty(seq_length, np.int32),
        np.empty(seq_length, np.int64),
    )
    bounds = gather([source.opened().files], [sample.pieces], out, [0] if sample.masked else ())
    if sample.fim:
        _rearrange(sample, out.tokens, out.targets)
    if sample.padded:
        _pad(sample, out.tokens)
    return SampleTokens(out.tokens, out.targets, out.document_ids, out.position_ids, bounds, sample.source_id)


def assemble_batch(samples: Sequence[Sample], sources: Mapping[str, OpenSource], out: BatchArrays) -> Bounds:
    """Reads samples into the rows of `out`; see `assemble` for their meaning and for what is raised.

    Gives the bounds of all spans over the rows laid end to end, int32 [spans + 1]: 0, the end of each span, b * T,
    which is what flash attention's variable-length kernels take as cu_seqlens.
    """
    files, masked = [sources[sample.source].opened().files for sample in samples], [s.masked for s in samples]
    bounds = gather(files, [s.pieces for s in samples], out, [row for row, is_so in enumerate(masked) if is_so])
    for row, sample in enumerate(samples):
        if sample.fim:
            _rearrange(sample, out.tokens[row], out.targets[row])
        if sample.padded:
            _pad(sample, out.tokens[row])
    return bounds


def gather(
    files: Sequence[SourceFiles], spans: Sequence[Spans], out: BatchArrays, masked: Collection[int] = ()
) -> Bounds:
    """Fills one row of `out` for each sample, from the files of its source and its spans; gives the spans' bounds.

    masked: the rows whose targets are only those tokens that the files' loss masks mark. What spans leave of a row is
    one more span, of id 0. Raises as `assemble` does; what `out` then holds is not defined.
    """
    extension = native()
    readers = [source.masked_reader if row in masked else source.reader for row, source in enumerate(files)]
    if extension is None or None in readers:
        return gather_twin(files, spans, out, masked)
    try:
        bounds: Bounds = extension.gather(readers, spans, out.tokens, out.targets, out.document_ids, out.position_ids)
    except RuntimeError as error:
        raise DataError(f"{error}. Start again on files that nothing writes to") from error
    return bounds


def gather_twin(
    files: Sequence[SourceFiles], spans: Sequence[Spans], out: BatchArrays, masked: Collection[int] = ()
) -> Bounds:
    """Defines `gather`."""
    rows = len(files)
    if not rows or len(spans) != rows or out.tokens.size % rows:
        raise ValueError("as many samples as files are needed, and as many rows of tokens")
    tokens, targets, documents, positions = (
        array.reshape(rows, -1) for array in (out.tokens, out.targets, out.document_ids, out.position_ids)
    )
    length, ends = tokens.shape[1], [0]
    for row in range(rows):
        at = number = 0
        for _, document, start, end in np.asarray(spans[row], dtype=np.int64).reshape(-1, 4).tolist():
            if not 0 <= start < end:
                raise ValueError("a span needs 0 <= start < end")
            if end - start > length - at:
                raise ValueError("the spans of a sample are longer than the sample")
            if end > files[row].document_length(document):
                raise IndexError(f"tokens {start}:{end} of document {document} are not all there")
            ids, stop = files[row].tokens(document, start, end + 1), at + end - start
            tokens[row, at:stop] = ids[: end - start]
            targets[row, at:stop] = IGNORED_TARGET
            targets[row, at : at + len(ids) - 1] = ids[1:]
            if row in masked:  # the target at a place is the token after it, and so is the bit that speaks of it
                learned = files[row].learned(document, start + 1, end + 1)
                targets[row, at : at + len(ids) - 1][~learned] = IGNORED_TARGET
            documents[row, at:stop] = number
            positions[row, at:stop] = np.arange(end - start)
            at, number = stop, number + 1
            ends.append(row * length + at)
        if at < length:
            tokens[row, at:], targets[row, at:], documents[row, at:] = 0, IGNORED_TARGET, number
            positions[row, at:] = np.arange(length - at)
            ends.append((row + 1) * length)
    return np.array(ends, dtype=np.int32)


def _pad(sample: Sample, tokens: Ids) -> None:
    """Fills the rest of a padded row, a span of its own without targets, with the id that stands for nothing."""
    tokens[sum(piece.end - piece.start for piece in sample.pieces) :] = sample.padding_id


def _rearrange(sample: Sample, tokens: Ids, targets: Ids) -> None:
    """Applies fill-in-the-middle to those spans of one row that the sample says."""
    assert sample.fim_rule is not None
    ends = list(accumulate(int(piece[3]) - int(piece[2]) for piece in sample.pieces))
    for number in sample.fim:
        epoch, document, start, _ = sample.pieces[number]
        first, end = ends[number - 1] if number else 0, ends[number]
        is_last = bool(targets[end - 1] == IGNORED_TARGET)
        ids = sample.fim_rule.rearrange((epoch, document, start), tokens[first:end], is_last)
        tokens[first:end] = ids
        targets[first : end - 1] = ids[1:]
        targets[end - 1] = IGNORED_TARGET  # what follows in the document does not follow the middle


def batch_digest(numbers: Sequence[int], tokens: Ids) -> str:
    """64 bits over the inputs of a batch, in hexadecimal: the sum modulo 2^64 of a mix of (sample number, place, id).

    numbers: of the samples in the rows of tokens [b, T]. Equal for equal inputs, however they are cut up; sums of
    parts are the digest of the whole.
    """
    if (extension := native()) is not None:
        return f"{extension.batch_digest(np.array(numbers, dtype=np.uint64), tokens):016x}"
    return batch_digest_twin(numbers, tokens)


def batch_digest_twin(numbers: Sequence[int], tokens: Ids) -> str:
    """Defines `batch_digest`."""
    total = 0
    places = np.arange(tokens.shape[1], dtype=np.uint64)
    for number, row in zip(numbers, tokens, strict=True):
        words = mix64_array(places + np.uint64((number * GOLDEN) & (2**64 - 1)))
        total += int(np.sum(mix64_array(words ^ row.astype(np.uint64)), dtype=np.uint64))
    return f"{total & (2**64 - 1):016x}"


def loaded_sums(
    batch: Sequence[Sample],
    loaded: Sequence[int],
    cursors_after: Mapping[str, int],
    words: Mapping[str, int],
    seq_length: int,
) -> tuple[int, int]:
    """What the samples at places `loaded` of a global batch add to the two sums of the order hash.

    A rank counts so what it has really read; the sums of all ranks, added modulo 2^64 to the order hash before, must
    give the stream's own after (`ledger.add_to_order`, `Ledger.order`).

    Args:
        batch: all samples of the global batch, in order.
        loaded: places in it of those that were read.
        cursors_after: by source, the stream position after this batch, in tokens.
        words: by source, `ledger.fingerprint_word` of its fingerprint.
        seq_length: places of a sample.
    """
    ahead: dict[str, int] = {}
    cursors = [sample.cursor for sample in batch]
    for place in reversed(range(len(batch))):
        if batch[place].padded:  # how far it moves its source is not the same for all
            continue
        name = batch[place].source
        ahead[name] = ahead.get(name, 0) + seq_length
        cursors[place] = cursors_after[name] - ahead[name]
    return order_sums(
        [batch[place].number for place in loaded],
        np.array([words[batch[place].source] for place in loaded], dtype=np.uint64),
        [cursors[place] for place in loaded],
        seq_length,
    )
