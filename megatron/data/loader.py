"""From the stream of samples to microbatches of tensors, prepared ahead in a thread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.data.permutation import GOLDEN, mix64_array
from megatron.data.samples import Sample, SampleStream, SampleTokens, assemble
from megatron.data.source_stream import EpochSpan
from megatron.data.sources import OpenSource


@dataclass(frozen=True)
class Microbatch:
    """b samples of T positions.

    tokens [b, T] int64 · targets [b, T] int64, -100 where there is none · document_ids [b, T] int32, the number of the
    piece along each row · source_ids [b] int64, numbering sources by name.
    """

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor
    source_ids: Tensor


@dataclass(frozen=True)
class Batch:
    """A global batch and the data position after it.

    step: its number, from 1 · tokens: input positions · valid_targets: targets that count · digest: 64 bits over
    (sample number, place, id) of every input, independent of layout and micro-batch · position: the ledger after this
    batch as JSON values, which is what a checkpoint stores.
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
    samples_by_source: dict[str, int] = field(default_factory=dict)


class BatchLoader:
    """Iterates over the global batches that are left of a schedule.

    `prefetch` batches are prepared ahead in one thread; the order does not depend on it. Errors of the thread are
    raised where the batch would have been given. Use as a context manager, or call `close`.
    """

    def __init__(
        self, stream: SampleStream, sources: Mapping[str, OpenSource], micro_batch_size: int, prefetch: int = 4
    ) -> None:
        self._stream = stream
        self._sources = sources
        self._micro_batch_size = micro_batch_size
        self._step = stream.ledger.consumed_steps
        self._stop = Event()
        self._queue: Queue[Batch | BaseException | None] = Queue(maxsize=max(1, prefetch))
        self._thread: Thread | None = None
        if prefetch:
            self._thread = Thread(target=self._prefetch, name="batch-loader", daemon=True)

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        if self._thread is None:
            while not self._stream.finished:
                yield self._next()
            return
        if not self._thread.is_alive():
            self._thread.start()
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Ends the thread; batches that it had prepared are dropped, and their position with them."""
        self._stop.set()
        if self._thread is None or not self._thread.is_alive():
            return
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except Empty:
                continue
        self._thread.join()

    def _prefetch(self) -> None:
        item: Batch | BaseException | None
        while not self._stop.is_set():
            try:
                item = None if self._stream.finished else self._next()
            except BaseException as error:  # handed to the thread that iterates
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except Full:
                    continue
            if not isinstance(item, Batch):
                return

    def _next(self) -> Batch:
        stage = self._stream.training_stage()
        samples = self._stream.next_batch()
        arrays = [assemble(sample, self._sources[sample.source], stage.seq_length) for sample in samples]
        self._step += 1
        by_source: dict[str, int] = {}
        for sample in samples:
            by_source[sample.source] = by_source.get(sample.source, 0) + 1
        return Batch(
            microbatches=_microbatches(arrays, self._micro_batch_size),
            step=self._step,
            training_stage=stage.name,
            seq_length=stage.seq_length,
            samples=len(samples),
            tokens=len(samples) * stage.seq_length,
            valid_targets=sum(int(np.count_nonzero(array.targets >= 0)) for array in arrays),
            digest=batch_digest(samples, arrays),
            position=self._stream.ledger.to_json(),
            samples_by_source=by_source,
        )


def batch_digest(samples: Sequence[Sample], arrays: Sequence[SampleTokens]) -> str:
    """A sum modulo 2^64 of a mix of (sample number, place, id): equal for equal inputs, however they are cut up."""
    total = 0
    for sample, array in zip(samples, arrays, strict=True):
        places = np.arange(len(array.tokens), dtype=np.uint64)
        words = mix64_array(places + np.uint64((sample.number * GOLDEN) & (2**64 - 1)))
        total += int(np.sum(mix64_array(words ^ array.tokens.astype(np.uint64)), dtype=np.uint64))
    return f"{total & (2**64 - 1):016x}"


def validation_batches(
    sources: Mapping[str, OpenSource], seq_length: int, micro_batch_size: int, samples: int
) -> list[Microbatch]:
    """Microbatches over held-out documents of every source that has data, at most `samples` sequences of each."""
    arrays = []
    for source in sources.values():
        if source.order is None:
            continue
        for spans in source.order.validation_spans(seq_length, samples):
            pieces = [EpochSpan(0, span.document, span.start, span.end) for span in spans]
            arrays.append(assemble(Sample(0, "validation", source.name, source.source_id, pieces), source, seq_length))
    return _microbatches(arrays, micro_batch_size)


def _microbatches(arrays: Sequence[SampleTokens], size: int) -> list[Microbatch]:
    result = []
    for start in range(0, len(arrays), size):
        rows = arrays[start : start + size]
        result.append(
            Microbatch(
                tokens=torch.from_numpy(np.stack([row.tokens for row in rows])),
                targets=torch.from_numpy(np.stack([row.targets for row in rows])),
                document_ids=torch.from_numpy(np.stack([row.document_ids for row in rows])),
                source_ids=torch.tensor([row.source_id for row in rows], dtype=torch.int64),
            )
        )
    return result
