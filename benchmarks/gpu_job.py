"""What the parts of `gpu.py` share: a job and its rows, the clock of a part, and how seconds are taken."""

from __future__ import annotations

import gc
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_results import Results, Row
from torch import Tensor

FLUSHED_BYTES = 1 << 30
"""Written between two timed calls: many times the L2 cache, and long enough that the host has the next call ready."""


class Clock:
    """The seconds that a part may still begin jobs in."""

    def __init__(self, limit: float) -> None:
        self._begin, self.limit = time.perf_counter(), limit

    @property
    def spent(self) -> float:
        """Seconds since the part began."""
        return time.perf_counter() - self._begin

    @property
    def left(self) -> float:
        """Seconds until no job is begun any more; below 0 where that is past."""
        return self.limit - self.spent


@dataclass(frozen=True)
class Job:
    """A piece of a part that is begun as a whole or left out. run: its rows; one with a key "failed" is a failure."""

    name: str
    run: Callable[[], Sequence[Row]]


@dataclass
class Context:
    """What jobs are given. work: a temporary folder. clock: of the part at hand; whole: of all."""

    device: torch.device
    dry: bool
    seed: int
    work: Path
    results: Results
    clock: Clock
    whole: Clock
    arguments: Namespace

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU to be timed by its own events."""
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Taken:
    """Seconds of a call: the median, and between which two of them four fifths of the calls lay."""

    median: float
    low: float
    high: float
    calls: int


class Timer:
    """Times calls on a device, the cache written over before each (as triton.testing.do_bench does).

    On a GPU by CUDA events around the call alone. What a call writes may still lie in the cache at its end, and what
    was written before it has then been pushed out at its cost: about equal, in the steady state.
    """

    def __init__(self, device: torch.device, budget: float = 0.25, rounds: tuple[int, int] = (10, 60)) -> None:
        """budget: seconds of timed calls, at least and at most so many rounds."""
        self._device, self._budget, self._rounds = device, budget, rounds
        self._flush: Tensor | None = None

    def seconds(self, call: Callable[[], object], flush: bool = True) -> Taken:
        """Of a call, after three that are not counted (compiling, and the allocator's first blocks)."""
        if self._device.type != "cuda":
            return _host_seconds(call)
        for _ in range(2):
            call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        rounds = int(self._budget / max(1e-6, begin.elapsed_time(end) / 1000))
        rounds = max(self._rounds[0], min(self._rounds[1], rounds))
        if flush and self._flush is None:
            self._flush = torch.empty(FLUSHED_BYTES // 4, dtype=torch.int32, device=self._device)
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(rounds)]
        for begin, end in pairs:
            if flush and self._flush is not None:
                self._flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize(self._device)
        return _taken([begin.elapsed_time(end) / 1000 for begin, end in pairs])


def _host_seconds(call: Callable[[], object]) -> Taken:
    """A dry run's: one call by the host's clock."""
    begin = time.perf_counter()
    call()
    return _taken([time.perf_counter() - begin])


def _taken(times: list[float]) -> Taken:
    times = sorted(times)
    tenth = len(times) // 10
    return Taken(statistics.median(times), times[tenth], times[-1 - tenth], len(times))


def synchronise(device: torch.device) -> None:
    """Waits for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """What nobody holds goes back to the device, programs of torch.compile among it."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def first_line(error: BaseException) -> str:
    """An error in a few words."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]:.200}" if said else type(error).__name__
