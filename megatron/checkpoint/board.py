"""Where ranks leave words for each other: a save in a thread of its own must not use the collectives of training."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from megatron.config.errors import StorageError

_SLICE = 5.0
_AT_EXIT = 10.0


class Board(Protocol):
    """Words by key, seen by all ranks. Used from several threads of a rank at once."""

    @property
    def rank(self) -> int:
        """This one's number."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def meeting(self) -> str:
        """A new prefix of keys, the same on all ranks: every rank asks for it in the same order, in its main thread."""

    def post(self, key: str, words: bytes) -> None:
        """Leaves words under a key that has none yet. Raises StorageError where the others cannot be reached."""

    def wait(self, key: str, seconds: float) -> bytes:
        """The words under a key, at most `seconds` later. Raises TimeoutError; StorageError as post does."""

    def remove(self, key: str) -> None:
        """Takes words away that everyone has read."""


class LocalBoard:
    """The board of one process without others."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self._words: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._meetings = 0

    def meeting(self) -> str:
        """A new prefix of keys."""
        self._meetings += 1
        return str(self._meetings)

    def post(self, key: str, words: bytes) -> None:
        """Leaves words under a key."""
        with self._changed:
            self._words[key] = words
            self._changed.notify_all()

    def wait(self, key: str, seconds: float) -> bytes:
        """The words under a key, at most `seconds` later. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._words, seconds):
                raise TimeoutError(key)
            return self._words[key]

    def remove(self, key: str) -> None:
        """Takes words away."""
        with self._changed:
            self._words.pop(key, None)


class Meeting:
    """One agreement of all ranks over a board: each reports to rank 0, rank 0 announces to all.

    Made in the main thread by every rank in the same order; used afterwards in one thread, whichever.
    """

    def __init__(self, board: Board, seconds: float, about: str) -> None:
        """seconds: bound of every wait, twice that for what rank 0 announces. about: for messages, a path first."""
        self._board = board
        self._seconds = seconds
        self._about = about
        self._name = board.meeting()
        self.rank, self.size = board.rank, board.size

    def announce(self, topic: str, words: bytes) -> None:
        """Rank 0 tells all the others."""
        if self.size > 1:
            self._board.post(f"{self._name}/{topic}", words)

    def hear(self, topic: str) -> bytes:
        """What rank 0 announces. It may itself wait its bound for a silent rank first. Raises StorageError."""
        return self._wait(f"{self._name}/{topic}", 2 * self._seconds, time.monotonic(), lambda: [0])

    def report(self, topic: str, words: bytes) -> None:
        """A rank other than 0 tells rank 0."""
        self._board.post(f"{self._name}/{topic}/{self.rank}", words)

    def collect(self, topic: str) -> dict[int, bytes]:
        """On rank 0, the report of every other rank, by rank. Raises StorageError that names all silent ones."""
        began = time.monotonic()
        reports: dict[int, bytes] = {}
        for rank in range(1, self.size):
            key = f"{self._name}/{topic}/{rank}"
            reports[rank] = self._wait(key, self._seconds, began, lambda: self._silent(topic, reports))
        for rank in reports:
            self._board.remove(f"{self._name}/{topic}/{rank}")
        return reports

    def agree(self, topic: str, problem: str) -> str:
        """The first problem that any rank has, the same on every rank; empty where none has any."""
        if self.size == 1:
            return problem
        if self.rank == 0:
            others = self.collect(topic)
            problem = next((words for words in [problem, *(w.decode() for w in others.values())] if words), "")
            self.announce(f"{topic}-by-all", problem.encode())
            return problem
        self.report(topic, problem.encode())
        return self.hear(f"{topic}-by-all").decode()

    def _wait(self, key: str, seconds: float, began: float, silent: Callable[[], list[int]]) -> bytes:
        end, last_call = began + seconds, 0.0
        while True:
            # A thread that waits must not keep a process alive whose main thread has failed.
            if not threading.main_thread().is_alive():
                end = min(end, last_call := last_call or time.monotonic() + _AT_EXIT)
            left = end - time.monotonic()
            with contextlib.suppress(TimeoutError):
                return self._board.wait(key, max(0.0, min(_SLICE, left)))
            if left > _SLICE:
                continue
            ranks = silent()
            names = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(str(rank) for rank in ranks)}"
            raise StorageError(
                f"{self._about}: {names} did not answer within {time.monotonic() - began:.0f} seconds; what was saved "
                "before is untouched: see what ended or held up those processes, then start the run again"
            )

    def _silent(self, topic: str, reports: Mapping[int, bytes]) -> list[int]:
        silent = []
        for rank in range(1, self.size):
            if rank not in reports:
                try:
                    self._board.wait(f"{self._name}/{topic}/{rank}", 0)
                except TimeoutError:
                    silent.append(rank)
        return silent
