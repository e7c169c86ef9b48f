"""A board that all ranks of a job write on and read: JSON on the job's store, from before the process groups exist.

A rank opens it first of all, so that whatever goes wrong afterwards on one rank can be told to all.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from megatron.config.errors import ConfigError, LostProcessError
from megatron.parallel.mesh import Launched, host_name

T = TypeVar("T")

_FASTEST, _SLOWEST = 0.01, 0.25
_LATE = 2.0
"""More than its timeout for the store to say itself what is wrong."""


@dataclass(frozen=True)
class Board:
    """One rank's access. Threads share none: a question of one would wait for an answer to the other's; see `another`.

    Nothing here waits inside the store: its own waiting prints a warning at each timeout, and cannot be interrupted.
    """

    store: Store
    rank: int
    world_size: int
    nodes: int = 1

    def another(self) -> Board:
        """The same board over a connection of its own, for another thread."""
        connection = self.store.clone()  # type: ignore[attr-defined]
        return Board(connection, self.rank, self.world_size, self.nodes)

    def post(self, key: str, value: Any) -> None:
        """Writes a JSON value under a key, over what was there."""
        self.store.set(key, json.dumps(value))

    def read(self, key: str) -> Any:
        """The value of a key; None where nothing is."""
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def claim(self, key: str, value: Any) -> Any:
        """Writes where nothing is yet, and gives what is there now: the first claim of all ranks stands."""
        return json.loads(self.store.compare_set(key, "", json.dumps(value)))

    def count(self, key: str, amount: int = 1) -> int:
        """Adds to a counter and gives it; 0 only looks."""
        return int(self.store.add(key, amount))

    def wait(self, there: Callable[[], Any], seconds: float | None = None) -> Any:
        """What `there` gives as soon as it is something; None after `seconds`.

        Without a bound it is the health thread that ends a wait for a rank that is lost or hangs.
        """
        end, pause = time.monotonic() + (seconds or 0), _FASTEST
        while not (value := there()):
            if seconds is not None and time.monotonic() > end:
                return None
            time.sleep(pause)
            pause = min(pause * 1.5, _SLOWEST)
        return value


def open_board(who: Launched, start_seconds: int) -> Board:
    """The job's board; the others need not stand before it yet.

    Raises LostProcessError where the store is not there, or its host misses ranks, within start_seconds; ConfigError
    where nothing says where the ranks meet.
    """
    try:
        found = rendezvous("env://", who.rank, who.world_size, timeout=timedelta(seconds=start_seconds))
        store, _, _ = _in_time(start_seconds + _LATE, lambda: next(found))
    except ValueError as error:
        raise ConfigError(
            f"{who.world_size} processes were started and nothing says where they meet ({error}): export MASTER_ADDR "
            "and MASTER_PORT in the batch script (the first node's name and a free port), or start with torchrun"
        ) from None
    except DistError as error:
        if "EADDRINUSE" in str(error):
            raise LostProcessError(
                f"rank {who.rank} ({host_name()}) cannot listen at MASTER_PORT, which another program on this machine "
                f"has: {_first_line(error)}. Export another, or start again where the batch script chooses one"
            ) from None
        raise LostProcessError(
            f"rank {who.rank} ({host_name()}) found not all {who.world_size} processes within {start_seconds} seconds "
            f"(health.start_seconds): {_first_line(error)}. See that every one was started, that MASTER_ADDR is the "
            "first one's host and that MASTER_PORT is free there and open to the others"
        ) from None
    return Board(PrefixStore("stagemix", store), who.rank, who.world_size)


def _in_time(seconds: float, make: Callable[[], T]) -> T:
    """What `make` gives. Where nobody listens, the store's own retries take twice the timeout that it was given and
    more (torch 2.13), so that `make` runs in a thread that may be left behind. Raises what it raises, and DistError."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(make())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="rendezvous", daemon=True).start()
    try:
        return outcome.result(seconds)
    except FutureTimeoutError:
        raise DistError("nothing answers at MASTER_ADDR:MASTER_PORT") from None


def gather(board: Board, who: Launched, start_seconds: int, left: float) -> Board:
    """The board, with the number of nodes, once every rank stands before it.

    left: what is left of start_seconds. Raises LostProcessError that names the ranks that did not come.
    """
    try:
        board.post(f"here/{who.rank}", host_name())
        if who.local_rank == 0:
            board.count("nodes")
        board.count("here")
        if not board.wait(lambda: board.count("here", 0) >= who.world_size, left):
            missing = [rank for rank in range(who.world_size) if board.read(f"here/{rank}") is None]
            raise LostProcessError(
                f"{rank_words(missing)} of {who.world_size} did not come within {start_seconds} seconds "
                "(health.start_seconds): see that every process was started, and the first messages of those"
            )
        return replace(board, nodes=board.count("nodes", 0))
    except DistError as error:
        raise LostProcessError(
            f"rank {who.rank} ({host_name()}) waited for all {who.world_size} processes, and the one that keeps their "
            f"store, rank 0 or the launcher, ended before they had come ({_first_line(error)}): see its message"
        ) from None


def rank_words(ranks: list[int]) -> str:
    """ "rank 3", "ranks 0-2, 7"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) != 1 else ''} {words}"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
