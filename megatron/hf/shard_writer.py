"""Writes the tensors of a plan into their files: several threads, each a few MB at a time, every value looked at once.

Peak memory is a few MB a thread, whatever a tensor's size, and two tensors where theirs are the transposed of ours. A
file is on the disk (fsync) when its last tensor is in it.
"""

from __future__ import annotations

import os
import queue
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.checkpoint.stored_tensors import StoredTensors
from megatron.checkpoint.tensor_files import raw_bytes
from megatron.config.errors import IO_REMEDIES, StorageError
from megatron.config.model_shape import ModelShape
from megatron.hf.export_record import ExportRecord
from megatron.hf.shard_plan import PlannedTensor, ShardPlan
from megatron.hf.tensor_pieces import CHUNK, Pieces, spans
from megatron.hf.write_behind import WriteBehind

Progress = Callable[[int, int], None]
"""Told bytes of tensors that are written, or were found written, and of how many."""


@dataclass(frozen=True)
class Written:
    """kept, written: bytes of tensors that lay there whole from an earlier start, and of those written now."""

    kept: int
    written: int


def default_workers() -> int:
    """One for each core that this process may use, at most four: more threads only wait for the disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, cores))


def write_shards(
    folder: Path,
    plan: ShardPlan,
    open_source: Callable[[], StoredTensors],
    shape: ModelShape,
    record: ExportRecord,
    workers: int = 1,
    progress: Progress | None = None,
    beside: Callable[[], None] | None = None,
) -> Written:
    """Writes every file of the plan, but for tensors that lie there whole already, by the record's checksums.

    open_source: the checkpoint's weights; each thread opens them for itself. beside: runs in one more thread; what it
    raises ends the writing. Raises CheckpointError that names a tensor with NaN or infinity, or with values too large
    for the dtype; StorageError that says what is kept.
    """
    job = _Job(folder, plan, open_source, shape, record, progress or (lambda done, whole: None))
    threads = [threading.Thread(target=job.work, name=f"export {number}") for number in range(workers)]
    if beside is not None:
        threads.append(threading.Thread(target=job.watch, args=(beside,), name="export beside"))
    with _one_core_each(), job.behind:
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C is raised here, and meant for all
            job.fail(error)
        finally:
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
    job.close()
    if job.error is not None:
        raise job.error
    return Written(job.kept, job.done - job.kept)


class _Abandoned(Exception):
    """Another thread has failed."""


class _Job:
    """What the threads share."""

    def __init__(
        self,
        folder: Path,
        plan: ShardPlan,
        open_source: Callable[[], StoredTensors],
        shape: ModelShape,
        record: ExportRecord,
        progress: Progress,
    ) -> None:
        self.error: BaseException | None = None
        self.kept = self.done = 0
        self.behind = WriteBehind(lambda error: self.fail(self._told(error, "")))
        self._folder, self._plan, self._shape, self._record = folder, plan, shape, record
        self._open_source, self._progress = open_source, progress
        self._lock, self._whole = threading.Lock(), threading.Lock()
        self._descriptors: dict[int, int] = {}
        self._left = [0] * len(plan.files)
        self._tensors: queue.SimpleQueue[PlannedTensor] = queue.SimpleQueue()
        for tensor in plan.tensors:
            self._left[tensor.file] += 1
            self._tensors.put(tensor)

    def work(self) -> None:
        """One thread: takes tensor after tensor until none is left, or any thread has failed."""
        try:
            pieces = Pieces(self._open_source(), self._shape, self._whole)
            while self.error is None:
                try:
                    tensor = self._tensors.get_nowait()
                except queue.Empty:
                    return
                self._put(tensor, pieces)
        except BaseException as error:
            self.fail(error)

    def watch(self, other: Callable[[], None]) -> None:
        """One thread that does something else."""
        try:
            other()
        except BaseException as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Ends all threads. The first error is the one to show."""
        with self._lock:
            self.error = self.error or error

    def close(self) -> None:
        """Closes the files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _put(self, tensor: PlannedTensor, pieces: Pieces) -> None:
        """One tensor is in its file; with the last one the file is on the disk."""
        try:
            descriptor = self._open(tensor.file)
            known = self._record.written.get(tensor.name)
            if known is not None and known == self._checksum(tensor, descriptor):
                self._count(tensor.place.size, kept=True)
            else:
                self._record.add(tensor.name, self._write(tensor, descriptor, pieces))
            with self._lock:
                self._left[tensor.file] -= 1
                last = not self._left[tensor.file]
            if last:
                os.ftruncate(descriptor, self._plan.files[tensor.file].size)
                os.fsync(descriptor)
                with self._lock:
                    os.close(self._descriptors.pop(tensor.file))
        except OSError as error:
            file = self._plan.files[tensor.file].name
            raise self._told(error, f"/{file}: cannot write tensor {tensor.name}") from error

    def _open(self, number: int) -> int:
        with self._lock:
            if number not in self._descriptors:
                file = self._plan.files[number]
                descriptor = os.open(self._folder / file.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                self._descriptors[number] = descriptor
                _write_all(descriptor, memoryview(file.header), 0)
            return self._descriptors[number]

    def _write(self, tensor: PlannedTensor, descriptor: int, pieces: Pieces) -> int:
        """The checksum of the values."""
        checksum = 0
        # closed at once when it fails: it may hold the lock that others wait for
        with closing(pieces.of(tensor)) as found:
            for at, values in found:
                if self.error is not None:
                    raise _Abandoned
                view = raw_bytes(values)
                checksum = zlib.crc32(view, checksum)
                _write_all(descriptor, view, at)
                self.behind.wrote(descriptor, len(view))
                self._count(len(view))
        return checksum

    def _checksum(self, tensor: PlannedTensor, descriptor: int) -> int | None:
        """Of what lies in the file; None where that ends too early."""
        checksum = 0
        for begin, size in spans(tensor, self._shape):
            for at in range(begin, begin + size, CHUNK):
                wanted = min(CHUNK, begin + size - at)
                found = os.pread(descriptor, wanted, at)
                if len(found) != wanted:
                    return None
                checksum = zlib.crc32(found, checksum)
        return checksum

    def _count(self, size: int, kept: bool = False) -> None:
        with self._lock:
            self.done += size
            self.kept += size if kept else 0
            self._progress(self.done, self._plan.bytes_of_tensors)

    def _told(self, error: OSError, what: str) -> StorageError:
        done, whole = self.done / 1e9, self._plan.bytes_of_tensors / 1e9
        remedy = IO_REMEDIES.get(error.errno or 0, "see to the disk")
        return StorageError(
            f"{self._folder}{what}: {error.strerror or error}; {done:.2f} of {whole:.2f} GB of tensors are there and "
            f"stay in {self._folder}: {remedy}, then give the same command again, which goes on from there; or remove "
            "that folder"
        )


@contextmanager
def _one_core_each() -> Iterator[None]:
    """torch's own threads would multiply with ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_all(descriptor: int, view: memoryview, at: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], at + done)
