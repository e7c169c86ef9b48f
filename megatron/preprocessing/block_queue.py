"""Blocks on their way through the workers: a bounded number at a time, those that are done already left out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from megatron.corpora.blocks import Block, cut_blocks
from megatron.corpora.read_options import InputFile
from megatron.preprocessing.options import Shard
from megatron.preprocessing.parts import PartKey, open_part, publish_part
from megatron.preprocessing.work_plan import WorkPlan, shard_bounds
from megatron.preprocessing.worker import Job, PartReport, make_part

_IN_FLIGHT = 2  # blocks for each worker


@dataclass(frozen=True)
class Progress:
    """How far the parts are: bytes of input as they lie on the disk (about, within a block), and what they became.

    `kept_bytes` of the input were done by earlier runs; `new_tokens` are those of this one.
    """

    bytes_done: int
    bytes_total: int
    kept_bytes: int
    documents: int
    tokens: int
    new_tokens: int


class BlockQueue:
    """Makes the parts of one shard that are not in the folder yet. `keys` are all of its parts, in order."""

    def __init__(
        self,
        pool: Executor,
        workers: int,
        job: Job,
        files: Sequence[InputFile],
        plan: WorkPlan,
        shard: Shard,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._pool, self._most, self._job = pool, workers * _IN_FLIGHT, job
        self._files, self._folder = files, Path(job.folder)
        self._block_bytes = int(plan.content["block_bytes"])
        self._low, self._high = shard_bounds(files, self._block_bytes, shard)
        self._ends = list(accumulate((file.size for file in files), initial=0))
        self._show = progress
        self._in_flight: dict[Future[PartReport], PartKey] = {}
        self._publishing: deque[Future[None]] = deque()
        self._begin = self._place(self._low)
        self._total = self._place(self._high) - self._begin
        self._done_bytes = self._kept_bytes = 0
        self._documents = self._tokens = self._new_tokens = 0
        self.keys: list[PartKey] = []
        self.made = self.kept = self.peak_memory = 0

    def run(self) -> None:
        """Raises what the first failing block of the corpus raises, whichever worker was the first to fail."""
        with ThreadPoolExecutor(1) as self._publisher:  # left when all that were handed to it are published
            try:
                self._run()
            except BaseException:
                self._save_what_is_done()
                raise

    def _run(self) -> None:
        for block in self._blocks():
            key = PartKey(block.file_number, block.block_number)
            self.keys.append(key)
            if block.payload is None:
                self._keep(key)
                continue
            self._in_flight[self._pool.submit(make_part, block, self._job)] = key
            del block  # its content may be large
            while len(self._in_flight) >= self._most:
                self._collect()
        while self._in_flight:
            self._collect()
        while self._publishing:
            self._publishing.popleft().result()
        self._advance(self._high)

    def _blocks(self) -> Iterator[Block]:
        first, last = self._low.file_number, self._high.file_number + (self._high.block_number > 0)

        def wanted(file_number: int, block_number: int) -> bool:
            key = PartKey(first + file_number, block_number)
            return self._low <= key < self._high and not self._is_done(key)

        for block in cut_blocks(self._files[first:last], self._job.read, self._block_bytes, wanted):
            if self._low <= (first + block.file_number, block.block_number) < self._high:
                yield replace(block, file_number=first + block.file_number)

    def _is_done(self, key: PartKey) -> bool:
        part = open_part(self._folder, key)
        return part is not None and (part.summary["plan"], part.summary["backend"]) == (
            self._job.plan,
            self._job.backend,
        )

    def _collect(self) -> None:
        done, _ = wait(self._in_flight, return_when=FIRST_COMPLETED)
        if any(future.exception() is not None for future in done):
            for future in list(self._in_flight):  # in the order of the corpus
                future.result()
        for future in done:
            report, key = future.result(), self._in_flight.pop(future)
            self._publishing.append(self._publisher.submit(publish_part, self._folder, key))
            self.made += 1
            self.peak_memory = max(self.peak_memory, report.peak_memory)
            self._documents += report.documents
            self._tokens += report.tokens
            self._new_tokens += report.tokens
            self._advance(key)
        while len(self._publishing) > self._most:  # no more than the disk can follow
            self._publishing.popleft().result()

    def _save_what_is_done(self) -> None:
        for future, key in self._in_flight.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                self._publisher.submit(publish_part, self._folder, key)

    def _keep(self, key: PartKey) -> None:
        self.kept += 1
        part = open_part(self._folder, key)
        assert part is not None  # the block came without content because it is there
        self._documents += part.summary["documents"]
        self._tokens += part.summary["tokens"]
        before = self._done_bytes
        self._advance(key)
        self._kept_bytes += self._done_bytes - before

    def _advance(self, key: PartKey) -> None:
        after = key if key == self._high else PartKey(key.file_number, key.block_number + 1)
        self._done_bytes = max(self._done_bytes, min(self._place(after) - self._begin, self._total))
        if self._show is not None:
            self._show(
                Progress(
                    self._done_bytes, self._total, self._kept_bytes, self._documents, self._tokens, self._new_tokens
                )
            )

    def _place(self, key: PartKey) -> int:
        """Where about in the input a block begins, in bytes."""
        if key.file_number == len(self._files):
            return self._ends[-1]
        inside = min(key.block_number * self._block_bytes, self._files[key.file_number].size)
        return self._ends[key.file_number] + inside
