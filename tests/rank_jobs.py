"""`train` as several real processes, each with a log of its own, as srun starts them: rank 0 holds the store.

They are forked from the server of `ranks`, which has torch loaded, so that a job starts in about a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranks import rank_environment  # its import also tells the fork server what to load

_context = multiprocessing.get_context("forkserver")
Fault = Callable[[int], None]
"""Called in each process with its rank before `train` starts: makes it go wrong later."""


@dataclass
class RankJob:
    """Processes of one job, by rank."""

    processes: list[Any]
    logs: list[Path]

    def wait(self, seconds: float = 90) -> list[int]:
        """Exit codes by rank; a process that a signal ended has its number, negative. Nobody is left behind."""
        end = time.monotonic() + seconds
        try:
            for rank, process in enumerate(self.processes):
                process.join(max(0.0, end - time.monotonic()))
                assert process.exitcode is not None, f"rank {rank} still runs:\n{self.text()}"
        finally:
            self.kill()
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """Ends for certain what still runs."""
        for rank, process in enumerate(self.processes):
            if process.is_alive():
                self.send(rank, signal.SIGKILL)
            process.join(10)

    def send(self, rank: int, number: int) -> None:
        """A signal to one rank."""
        os.kill(self.processes[rank].pid, number)

    def log(self, rank: int) -> str:
        """What a rank printed."""
        return self.logs[rank].read_text()

    def text(self) -> str:
        """All logs, for messages."""
        return "\n".join(f"--- rank {rank}\n{self.log(rank)}" for rank in range(len(self.logs)))


def start_ranks(
    world_size: int,
    config: Path,
    *words: str,
    of_rank: Mapping[int, Sequence[str]] | None = None,
    fault: Fault | None = None,
    missing: Sequence[int] = (),
) -> RankJob:
    """Starts `train config words…` as so many ranks. of_rank: further words for single ranks. missing: not started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, logs = [], []
    for rank in range(world_size):
        if rank in missing:
            continue
        log = config.with_name(f"{config.stem}-rank-{rank}-{time.monotonic_ns()}.log")
        log.touch()
        argv = [str(config), *words, *(of_rank or {}).get(rank, ())]
        process = _context.Process(target=_rank, args=(rank, world_size, port, argv, log, fault), daemon=True)
        process.start()
        processes.append(process)
        logs.append(log)
    return RankJob(processes, logs)


def train_ranks(world_size: int, config: Path, *words: str, **options: Any) -> RankJob:
    """Trains to the end; every rank must leave with 0."""
    job = start_ranks(world_size, config, *words, **options)
    assert job.wait() == [0] * world_size, job.text()
    return job


def _rank(rank: int, world_size: int, port: int, argv: list[str], log: Path, fault: Fault | None) -> None:
    os.environ |= rank_environment(rank, world_size, port)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.__stderr__ = sys.stderr
    import torch

    from megatron.commands.frame import run_command
    from megatron.commands.train import main

    torch.set_num_threads(1)
    if fault is not None:
        fault(rank)
    code = run_command(main, argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
