"""Real processes as ranks, for tests: forked from a server that has torch loaded, so that eight start in a second."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.fsdp", "megatron.engines.build"])


def run_ranks(world_size: int, body: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """body(*args) in each of world_size processes, which find each other as under torchrun; their results by rank.

    The first rank that fails is raised here with its traceback; every process is gone when this returns.
    body: a module's function; arguments and results are pickled, tensors by value.
    """
    _store, pipes, processes = start_bodies(world_size, body, args)
    try:
        return _results(pipes, time.monotonic() + timeout, timeout)
    finally:
        for process in processes:
            process.join(0.2)
            if process.is_alive() and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):  # it may end by itself at this very moment
                    os.kill(process.pid, signal.SIGKILL)
            process.join(10)


def start_bodies(world_size: int, body: Callable[..., Any], args: Any) -> tuple[Any, list[Connection], list[Any]]:
    """(the store that the ranks meet at, to be kept; a pipe to each rank's result; the processes)."""
    from torch.distributed import TCPStore

    work = pickle.dumps((body, args))  # by value: multiprocessing would share tensors' memory
    store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    pipes: list[Connection] = []
    processes = []
    for rank in range(world_size):
        mine, theirs = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank, args=(theirs, rank, world_size, store.port, work), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    return store, pipes, processes


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would say to one of the processes of a node."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def _results(pipes: list[Connection], end: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, max(0.0, end - time.monotonic()))
        if not ready:
            missing = sorted(set(range(len(pipes))) - results.keys())
            raise TimeoutError(f"ranks {missing} gave nothing within {timeout} seconds")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                kind, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} ended without a result") from None
            if kind == "error":
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(pipe: Connection, rank: int, world_size: int, port: int, work: bytes) -> None:
    os.environ |= rank_environment(rank, world_size, port) | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    import torch

    torch.set_num_threads(1)
    try:
        body, args = pickle.loads(work)
        pipe.send_bytes(pickle.dumps(("result", body(*args))))
    except BaseException:
        pipe.send_bytes(pickle.dumps(("error", traceback.format_exc())))
    finally:
        pipe.close()
        # Threads of process groups may wait for ranks that have failed: there is nothing left to tidy.
        os._exit(0)
