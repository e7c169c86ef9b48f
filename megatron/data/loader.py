"""From the stream of samples to microbatches of tensors, prepared ahead in threads.

One thread moves the stream, `workers` threads read what it gives: reading leaves the GIL, so that they run at once.
Batches come in the stream's order, whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.data.assembly import BatchArrays, assemble_batch, batch_digest, loaded_sums
from megatron.data.ledger import fingerprint_word
from megatron.data.samples import Sample, SampleStream
from megatron.data.source_stream import EpochSpan
from megatron.data.sources import OpenSource


@dataclass(frozen=True)
class Microbatch:
    """b samples of T positions.

    tokens [b, T] int64 · targets [b, T] int64, -100 where there is none · document_ids [b, T] int32, the number of the
    piece along each row · position_ids [b, T] int64, from 0 in each piece · cu_seqlens [pieces + 1] int32, the pieces'
    bounds over the rows laid end to end: 0, the end of each piece, b * T · longest_piece: its positions (flash
    attention's max_seqlen) · source_ids [b] int64, numbering sources by name · sample_numbers [b] int64, the rows'
    numbers among all samples of the run (0 for held-out rows, which are none of them).

    What the document of a padded sample leaves of its row is one more piece, without targets.
    """

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    longest_piece: int
    source_ids: Tensor
    sample_numbers: Tensor


@dataclass(frozen=True)
class Batch:
    """A global batch and the data position after it; where it is shared out among data ranks, one rank's rows of it.

    step: its number, from 1 · position: the ledger after this batch as JSON values, which is what a checkpoint stores ·
    passed_over: it is consumed, and not to be trained on: nothing of it was read, and the digest is of no rows.

    Of the rows that were read, and so sums over data ranks give those of the global batch (the latter two modulo
    2^64): microbatches · valid_targets: targets that count · digest: 64 bits over (sample number, place, id) of every
    input, independent of layout and micro-batch · loaded: what these samples add to the two sums of the order hash
    (`assembly.loaded_sums`). Of the global batch on every rank: samples, tokens (input positions), padding (those of
    them that hold no token of a document), samples_by_source.
    """

    microbatches: list[Microbatch]
    step: int
    training_stage: str
    seq_length: int
    samples: int
    tokens: int
    valid_targets: int
    digest: str
    position: dict[str, Any]
    loaded: tuple[int, int]
    samples_by_source: dict[str, int] = field(default_factory=dict)
    passed_over: bool = False
    padding: int = 0


class BatchLoader:
    """Iterates over the global batches that are left of a schedule.

    `prefetch` batches are prepared ahead by `workers` threads; the order depends on neither. 0 prepares each when it is
    asked for. pin_memory: tensors in page-locked memory, for copies to a CUDA device that do not wait; without such a
    device it has no effect. data_rank of data_size reads rows rank*B/size .. (rank+1)*B/size - 1 of each global batch
    of B, and no others; the ledger is the same on all of them. Errors of the threads are raised where the batch would
    have been given. Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        stream: SampleStream,
        sources: Mapping[str, OpenSource],
        micro_batch_size: int,
        prefetch: int = 4,
        *,
        workers: int = 1,
        pin_memory: bool = False,
        data_rank: int = 0,
        data_size: int = 1,
        passes_over: Callable[[int], bool] = lambda step: False,
    ) -> None:
        """passes_over: whether the batch of a step is consumed without being read."""
        if workers < 1:
            raise ValueError(f"at least one worker is needed, not {workers}")
        if not 0 <= data_rank < data_size:
            raise ValueError(f"data rank {data_rank} is not one of {data_size}")
        self._data_rank, self._data_size = data_rank, data_size
        self._passes_over = passes_over
        self._stream = stream
        self._sources = sources
        self._words = {name: fingerprint_word(source.fingerprint) for name, source in sources.items()}
        self._micro_batch_size = micro_batch_size
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._step = stream.ledger.consumed_steps
        self._stop = Event()
        self._queue: Queue[Future[Batch] | BaseException | None] = Queue(maxsize=max(1, prefetch))
        self._thread: Thread | None = None
        if prefetch:
            self._readers = ThreadPoolExecutor(workers, thread_name_prefix="batch-reader")
            self._thread = Thread(target=self._prefetch, name="batch-loader", daemon=True)

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        if self._thread is None:
            while not self._stream.finished:
                yield self._plan_next()()
            return
        if not self._thread.is_alive():
            self._thread.start()
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item.result()

    def close(self) -> None:
        """Ends the threads; batches that they had prepared are dropped, and their position with them."""
        self._stop.set()
        if self._thread is None:
            return
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except Empty:
                continue
        if self._thread.ident is not None:
            self._thread.join()
        self._readers.shutdown(cancel_futures=True)

    def _prefetch(self) -> None:
        item: Future[Batch] | BaseException | None
        while not self._stop.is_set():
            try:
                item = None if self._stream.finished else self._readers.submit(self._plan_next())
            except BaseException as error:  # handed to the thread that iterates
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except Full:
                    continue
            if not isinstance(item, Future):
                return

    def _plan_next(self) -> partial[Batch]:
        """Moves the stream by a batch; what it gives reads that batch, in any thread."""
        stage = self._stream.training_stage()
        shape = self._stream.shape()
        seq_length, mine = shape.seq_length, self._rows(shape.global_batch_size)
        # What fill-in-the-middle displaces is counted where pieces are looked up, and every rank's ledger needs all.
        self._step += 1
        passed_over = self._passes_over(self._step)
        everything = bool(stage.fim) or (self._data_size == 1 and not passed_over)
        samples = self._stream.next_batch(None if everything else () if passed_over else mine)
        by_source: dict[str, int] = {}
        for sample in samples:
            by_source[sample.source] = by_source.get(sample.source, 0) + 1
        position = self._stream.ledger.to_json()
        cursors = {name: position["sources"][name]["cursor"]["cursor"] for name in by_source}
        made = partial(
            Batch,
            step=self._step,
            training_stage=stage.name,
            seq_length=seq_length,
            samples=len(samples),
            tokens=len(samples) * seq_length,
            position=position,
            samples_by_source=by_source,
            passed_over=passed_over,
            padding=sum(seq_length - sample.pieces[0].end for sample in samples if sample.padded),
        )
        return partial(self._read, made, samples, mine, cursors, seq_length)

    def _rows(self, global_batch_size: int) -> range:
        """This data rank's places in a global batch."""
        whole, left = divmod(global_batch_size, self._data_size)
        if left:
            raise ValueError(f"a batch of {global_batch_size} cannot be shared out equally to {self._data_size} ranks")
        return range(self._data_rank * whole, (self._data_rank + 1) * whole)

    def _read(
        self, made: partial[Batch], samples: list[Sample], mine: range, cursors: Mapping[str, int], seq_length: int
    ) -> Batch:
        microbatches, digest, valid = [], 0, 0
        read = range(0) if made.keywords["passed_over"] else mine
        for start in range(read.start, read.stop, self._micro_batch_size):
            rows = samples[start : min(start + self._micro_batch_size, mine.stop)]
            micro = read_microbatch(rows, self._sources, seq_length, self._pin_memory)
            digest += int(batch_digest([sample.number for sample in rows], micro.tokens.numpy()), 16)
            valid += int(np.count_nonzero(micro.targets.numpy() >= 0))
            microbatches.append(micro)
        return made(
            microbatches=microbatches,
            valid_targets=valid,
            digest=f"{digest & (2**64 - 1):016x}",
            loaded=loaded_sums(samples, mine, cursors, self._words, seq_length),
        )


def read_microbatch(
    samples: Sequence[Sample], sources: Mapping[str, OpenSource], seq_length: int, pin_memory: bool = False
) -> Microbatch:
    """Samples as tensors, read into them from the mapped files without a copy in between."""
    shape = (len(samples), seq_length)
    tokens, targets, positions = (torch.empty(shape, dtype=torch.int64, pin_memory=pin_memory) for _ in range(3))
    documents = torch.empty(shape, dtype=torch.int32, pin_memory=pin_memory)
    out = BatchArrays(tokens.numpy(), targets.numpy(), documents.numpy(), positions.numpy())
    bounds = assemble_batch(samples, sources, out)
    ids, numbers = ([sample.source_id for sample in samples], [sample.number for sample in samples])
    small = (torch.from_numpy(bounds), *(torch.tensor(values, dtype=torch.int64) for values in (ids, numbers)))
    cu_seqlens, source_ids, sample_numbers = (tensor.pin_memory() if pin_memory else tensor for tensor in small)
    longest = int(np.diff(bounds).max())
    return Microbatch(tokens, targets, documents, positions, cu_seqlens, longest, source_ids, sample_numbers)


def validation_batches(
    sources: Mapping[str, OpenSource],
    seq_length: int,
    micro_batch_size: int,
    samples: int,
    masked: Collection[str] = (),
) -> list[Microbatch]:
    """Microbatches over held-out documents of every source that has data, at most `samples` sequences of each; of those
    in `masked` only the targets count that their loss masks mark."""
    windows = []
    for source in sources.values():
        if source.order is None:
            continue
        for spans in source.order.validation_spans(seq_length, samples):
            pieces = [EpochSpan(0, span.document, span.start, span.end) for span in spans]
            is_masked = source.name in masked
            windows.append(Sample(0, "validation", source.name, source.source_id, pieces, masked=is_masked))
    return [
        read_microbatch(windows[start : start + micro_batch_size], sources, seq_length)
        for start in range(0, len(windows), micro_batch_size)
    ]
