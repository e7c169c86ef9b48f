"""What one rank of many does when any of them fails, hangs or is lost: all end soon, with the first error's code.

Two threads, which only a job of several processes has. `health-board` tells the board once a second that this rank
lives and how far it is, and looks whether another has failed. `health-watch` asks the board nothing, so that it ends
the process even where the board does not answer.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from megatron.config.errors import (
    EXIT_BUG,
    EXIT_IO,
    EXIT_LOST_PROCESS,
    EXIT_WATCHDOG,
    IO_REMEDIES,
    StagemixError,
)
from megatron.parallel.health_board import Board, host_name, rank_words

T = TypeVar("T")

FIRST = "first failure"


@dataclass(frozen=True)
class Failure:
    """Why a rank ends the job. hang: the others show their stacks, too."""

    rank: int
    code: int
    message: str
    hang: bool = False


@dataclass(frozen=True)
class Patience:
    """Seconds. poll: between looks at the board · grace: for the cause to be told before what follows from it is shown
    · acknowledged: at most, for all to hear of the end · silent: without a sign of a rank, or an answer of the board ·
    silent_in_a_stop: the same once a stop is asked for, since a launcher whose process was killed asks the rest to.
    """

    poll: float = 1.0
    grace: float = 3.0
    acknowledged: float = 3.0
    silent: float = 120.0
    silent_in_a_stop: float = 12.0


@dataclass(frozen=True)
class _Progress:
    since: float
    phase: str
    step: int


class Health:
    """This rank's watch over itself and the others; `begin` starts it, `end` leaves the job in peace.

    watchdog_seconds: without progress until the job ends; 0: never. To be set: record(code, reason), called where the
    process ends for a failure, so that rank 0 writes exit.json; stop_asked(), whether a signal asked this rank to stop.
    """

    def __init__(self, board: Board, watchdog_seconds: int, patience: Patience | None = None) -> None:
        self.record: Callable[[int, str], None] = lambda code, reason: None
        self.stop_asked: Callable[[], bool] = lambda: False
        self._board = board
        self._limit = watchdog_seconds
        self._patience = patience or Patience()
        self._progress = _Progress(time.monotonic(), "starting", 0)
        self._answered = time.monotonic()
        self._heard: dict[int, tuple[Any, float]] = {}
        self._gone = ""
        self._done = threading.Event()
        self._ending = threading.Lock()
        self._end_by: float | None = None
        self._exit_code = EXIT_BUG
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._talk, "health-board"), (self._watch, "health-watch"))
        ]

    def begin(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Ends them; nothing is watched any more."""
        self._done.set()
        for thread in self._threads:
            thread.join()

    def at(self, phase: str, step: int | None = None) -> None:
        """Notes progress: what this rank is about to do, and how many steps it has taken (None: as before)."""
        self._progress = _Progress(time.monotonic(), phase, self._progress.step if step is None else step)

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process and with it the job, for an error that nobody handles here."""
        failure = Failure(self._board.rank, code_of(error), words_of(error))
        if follows_from_a_lost_peer(error):
            # The cause, if a rank lived to tell it, is on the board soon.
            self._hear_the_cause()
            seen = _first_line(error)
            failure = self._hung(f"a collective timed out ({seen})") if waited_too_long(error) else self._lost(seen)
        self._end(self._claim(failure), error)

    def fail_at_once(self, code: int, message: str) -> None:
        """Tells the others that this process ends now; returns, within seconds."""
        self._claim(Failure(self._board.rank, code, message))

    # The end

    def _claim(self, failure: Failure) -> Failure:
        """The job's first failure: this one, unless another came before."""
        first = self._ask(self._patience.grace, lambda: self._board.another().claim(FIRST, asdict(failure)))
        return Failure(**first) if first else failure  # the board's host is gone: nobody hears us

    def _end(self, first: Failure, error: BaseException | None = None) -> NoReturn:
        """Shows the first failure, has it recorded, and ends the process. One thread does; others wait for the end."""
        with self._ending:
            self._exit_code = first.code
            self._end_by = time.monotonic() + self._patience.acknowledged + 5
            mine = first.rank == self._board.rank
            if first.hang:
                show_stacks(self._board.rank)
            if not mine:
                self._say(f"{rank_words([first.rank])} failed first: {first.message}")
            elif error is None or isinstance(error, StagemixError) or first.code in (EXIT_LOST_PROCESS, EXIT_IO):
                self._say(f"error: {first.message}")
            else:
                self._say("".join(traceback.format_exception(error)).rstrip())
            try:
                self.record(first.code, first.message if mine else f"rank {first.rank} failed first: {first.message}")
            except Exception as second:
                self._say(f"note: exit.json could not be written: {second}")
            self._ask(self._patience.acknowledged + 1, lambda: self._acknowledge(mine))
            sys.stdout.flush()
            os._exit(first.code)

    def _acknowledge(self, mine: bool) -> None:
        """Says that this rank knows; who failed, or holds the board, stays until all have said so."""
        board = self._board.another()
        board.count("acknowledged")
        if mine or board.rank == 0:
            board.wait(lambda: board.count("acknowledged", 0) >= board.world_size, self._patience.acknowledged)

    def _say(self, text: str) -> None:
        prefix = f"[rank {self._board.rank}] " if self._board.rank else ""
        lines = "".join(f"{prefix}{line}\n" for line in text.splitlines())
        sys.stderr.write(lines)
        sys.stderr.flush()

    # Talking to the board

    def _talk(self) -> None:
        board, turn = self._board.another(), 0
        while not self._done.wait(self._patience.poll if turn else 0):
            turn += 1
            try:
                self._tell(board, turn)
                if (first := board.read(FIRST)) is not None:
                    if first["rank"] != board.rank:
                        self._end(Failure(**first))
                    continue  # the thread that failed ends the process
                self._listen(board)
                if self._limit and time.monotonic() - self._progress.since > self._limit:
                    self._hang()
            except (RuntimeError, OSError) as error:
                self._gone = _first_line(error)
                return
            self._answered = time.monotonic()

    def _tell(self, board: Board, turn: int) -> None:
        now = self._progress
        board.post(f"status/{board.rank}", [turn, now.step, now.phase, host_name()])

    def _listen(self, board: Board) -> None:
        """Rank 0 listens to all, the others to rank 0: a rank that says nothing for too long is lost."""
        now = time.monotonic()
        patience = self._patience.silent_in_a_stop if self.stop_asked() else self._patience.silent
        for rank in range(board.world_size) if board.rank == 0 else (0,):
            said = board.read(f"status/{rank}")
            if rank not in self._heard or said != self._heard[rank][0]:
                self._heard[rank] = said, now
            elif rank != board.rank and now - self._heard[rank][1] > patience:
                self._end(self._claim(self._lost(f"no sign of life for {patience:.0f} seconds")))

    def _hang(self) -> None:
        self._end(self._claim(self._hung(f"no progress for {self._limit} seconds (health.watchdog_seconds)")))

    def _hung(self, seen: str) -> Failure:
        seconds = 10 * self._patience.poll + self._patience.grace
        where = self._ask(seconds, self._where) or "unknown, the store is silent"
        message = (
            f"watchdog: rank {self._board.rank}: {seen}; where the ranks were last: {where}. The stacks of all threads "
            "of each rank are on standard error"
        )
        return Failure(self._board.rank, EXIT_WATCHDOG, message, hang=True)

    def _where(self) -> str:
        """Steps and phases of all ranks, those that are alike together, the rarest first."""
        groups: dict[str, list[int]] = {}
        for rank, (said, silent) in self._signs().items():
            words = "not yet begun" if said is None else f"step {said[1]}, {said[2]}"
            if silent and said is not None:
                words += f" (no sign of life; host {said[3]})"
            groups.setdefault(words, []).append(rank)
        ordered = sorted(groups.items(), key=lambda item: (len(item[1]), item[1]))
        return "; ".join(f"{rank_words(ranks)}: {words}" for words, ranks in ordered)

    def _hear_the_cause(self) -> None:
        """Waits a little for another's failure; the other thread ends the process when there is one."""
        end = time.monotonic() + self._patience.grace
        while time.monotonic() < end and not self._gone:
            time.sleep(0.05)

    def _ask(self, seconds: float, question: Callable[[], T]) -> T | None:
        """What the board answers; None where it is gone or does not answer in time."""
        return None if self._gone else _within(seconds, question)

    def _lost(self, seen: str) -> Failure:
        who = self._ask(4 * self._patience.poll, self._silent_words)
        who = " (rank 0, or the launcher that holds the store)" if who is None else who
        message = f"another process of the job was lost without a word{who}; seen here: {seen}. "
        message += "Was it killed (by a user, or by the system where memory ran out)? Start the same command again"
        return Failure(self._board.rank, EXIT_LOST_PROCESS, message)

    def _silent_words(self) -> str:
        """Which ranks say nothing, by a look at the board over some polls."""
        silent = {rank: said for rank, (said, is_silent) in self._signs().items() if is_silent}
        where = sorted({f"step {word[1]}, {word[2]}, host {word[3]}" for word in silent.values() if word})
        return f" ({rank_words(list(silent))}: {'; '.join(where)})" if silent else ""

    def _signs(self) -> dict[int, tuple[Any, bool]]:
        """What each rank said last, and whether another than this one said nothing new over some polls."""
        board = self._board.another()
        keys = {rank: f"status/{rank}" for rank in range(board.world_size)}
        before = {rank: board.read(key) for rank, key in keys.items()}
        time.sleep(2.5 * self._patience.poll)
        now = {rank: board.read(key) for rank, key in keys.items()}
        return {rank: (said, rank != board.rank and said == before[rank]) for rank, said in now.items()}

    # Watching without the board

    def _watch(self) -> None:
        patience = self._patience
        while not self._done.wait(patience.poll):
            now = time.monotonic()
            if self._end_by is not None:
                if now > self._end_by:
                    os._exit(self._exit_code)
            elif self._gone:
                time.sleep(patience.grace)
                self._end(self._lost(self._gone))
            elif self._limit and now - self._progress.since > self._limit + 3 * patience.poll + patience.grace:
                message = f"watchdog: rank {self._board.rank} made no progress for {self._limit} seconds"
                message += f" (step {self._progress.step}, {self._progress.phase}), and the job's store does not answer"
                self._end(Failure(self._board.rank, EXIT_WATCHDOG, message, hang=True))
            elif now - self._answered > patience.silent:
                self._end(self._lost(f"the job's store did not answer for {patience.silent:.0f} seconds"))


def code_of(error: BaseException) -> int:
    """The exit code that an error stands for."""
    if isinstance(error, StagemixError):
        return error.exit_code
    return EXIT_IO if isinstance(error, OSError) and error.errno in IO_REMEDIES else EXIT_BUG


def words_of(error: BaseException) -> str:
    """An error as a message; errors that are not for users come with their type."""
    return str(error) if isinstance(error, StagemixError) else f"{type(error).__name__}: {error}"


_PEER_WORDS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "nccl",
    "gloo/transport",
    "timed out waiting",
    "processgroup",
)


def follows_from_a_lost_peer(error: BaseException) -> bool:
    """Whether an error is what a collective says when the other side has gone, or what was raised from one."""
    if isinstance(error, StagemixError):
        return isinstance(error.__cause__, dist.DistError)
    return any(
        isinstance(one, dist.DistError)
        or (isinstance(one, RuntimeError) and any(words in str(one).lower() for words in _PEER_WORDS))
        for one in (error, error.__cause__, error.__context__)
    )


def waited_too_long(error: BaseException) -> bool:
    """Whether a collective gave up because another rank never came to it."""
    return any("timed out" in str(one).lower() for one in (error, error.__cause__, error.__context__) if one)


def _first_line(error: BaseException) -> str:
    return f"{words_of(error).splitlines()[0].partition('. This is typically')[0]:.300}"


def _within(seconds: float, action: Callable[[], T]) -> T | None:
    """What the action gives; None where it takes longer or the store is gone. A store's host that is stopped would
    hold the caller for good, so the action runs in a thread that may be left behind."""
    given: list[T] = []

    def act() -> None:
        with contextlib.suppress(RuntimeError, OSError):
            given.append(action())

    thread = threading.Thread(target=act, name="health-question", daemon=True)
    thread.start()
    thread.join(seconds)
    return given[0] if given else None


def show_stacks(rank: int) -> None:
    """The stacks of all threads of this process, on standard error."""
    try:
        descriptor = sys.__stderr__.fileno() if sys.__stderr__ is not None else 2
        os.write(descriptor, f"[rank {rank}] stacks of process {os.getpid()} on {host_name()}:\n".encode())
        faulthandler.dump_traceback(descriptor, all_threads=True)
    except (OSError, ValueError):
        pass  # nowhere to show them
