"""What one rank of many does when any of them fails, hangs or is lost: all end soon, with the first error's code.

Two threads, which only a job of several processes has. `health-board` tells the board once a second that this rank
lives and how far it is, and looks whether another has failed. `health-watch` asks the board nothing, so that it ends
the process even where the board does not answer.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn, TypeVar

from megatron.config.errors import EXIT_BUG, EXIT_LOST_PROCESS, EXIT_REQUEUE, EXIT_WATCHDOG, exit_code_of
from megatron.parallel.health_board import Board, rank_words
from megatron.parallel.health_signs import (
    Blame,
    Sign,
    blame_of_hang,
    blame_of_lost,
    read_signs,
    silent_words,
    where_words,
)
from megatron.parallel.health_words import (
    first_line,
    follows_from_a_lost_peer,
    show_stacks,
    traceback_of,
    waited_too_long,
    words_of,
)
from megatron.parallel.mesh import host_name

T = TypeVar("T")

FIRST = "first failure"
SHOWN = "shown"


@dataclass(frozen=True)
class Failure:
    """Why a rank ends the job. hang: the others show their stacks, too. when: seconds since 1970 on its host. blamed:
    of a rank that was lost or hangs, whose fault it looks like: (rank, host, suspected hosts).
    """

    rank: int
    code: int
    message: str
    hang: bool = False
    host: str = field(default_factory=host_name)
    when: int = field(default_factory=lambda: int(time.time()))
    blamed: tuple[int | None, str | None, tuple[str, ...]] = (None, None, ())

    @property
    def told(self) -> bool:
        """Whether it is of another rank than the one that tells of it, or of none."""
        return self.code in (EXIT_LOST_PROCESS, EXIT_WATCHDOG)

    @property
    def stop(self) -> bool:
        """Whether it is no failure: the rank was asked to stop."""
        return self.code == EXIT_REQUEUE or self.code > 128

    @property
    def who(self) -> str:
        """Whose it is; of a rank that was lost or hangs, who told of it."""
        return self.words()

    def words(self, where: bool = False) -> str:
        """The same; where: with the host."""
        host = f" on {self.host}" if where else ""
        verb = "was asked to stop" if self.stop else "noticed it" if self.told else "failed"
        return f"{rank_words([self.rank])}{host} {verb} first"

    @property
    def blame(self) -> Blame:
        """What exit.json says of it."""
        if self.stop:
            return Blame()
        return (
            Blame(self.blamed[0], self.blamed[1], tuple(self.blamed[2])) if self.told else Blame(self.rank, self.host)
        )


@dataclass(frozen=True)
class Patience:
    """Seconds. poll: between looks at the board · grace: for the cause to be told before what follows from it is shown,
    and for rank 0 to meet what every rank does · acknowledged: at most, for all to hear of the end · silent: without a
    sign of a rank, or an answer of the board · silent_in_a_stop: the same once a stop is asked for, since a launcher
    whose process was killed asks the rest to.
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

    watchdog_seconds: without progress until the job ends; 0: never. speaks: says in full what all ranks see and no
    board keeps to one of them. To be set: record(code, reason, blame), called where the process ends for a failure, so
    that rank 0 writes exit.json; tell(message, when, trace), the same for the launcher; stop_asked(), whether a signal
    asked this rank to stop; several_hosts, so that messages name them.
    """

    def __init__(
        self, board: Board, watchdog_seconds: int, patience: Patience | None = None, speaks: bool = True
    ) -> None:
        self.record: Callable[[int, str, Blame], None] = lambda code, reason, blame: None
        self.tell: Callable[[str, int, str], None] = lambda message, when, trace: None
        self.stop_asked: Callable[[], bool] = lambda: False
        self.several_hosts = False
        self._board = board
        self._speaks = speaks
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
        failure = Failure(self._board.rank, exit_code_of(error), words_of(error))
        if follows_from_a_lost_peer(error):
            # The cause, if a rank lived to tell it, is on the board soon.
            self._hear_another()
            seen = first_line(error)
            failure = self._hung(f"a collective timed out ({seen})") if waited_too_long(error) else self._lost(seen)
        elif self._board.rank:
            # What is wrong on every rank, a key of the config say, is nobody's: rank 0 meets it, too, and shows it.
            self._hear_another()
        self._end(self._claim(failure), error)

    def fail_at_once(self, code: int, message: str) -> None:
        """Tells the others that this process ends now; returns, within seconds."""
        first = self._claim(Failure(self._board.rank, code, message))
        if first.rank == self._board.rank:
            self.tell(message, first.when, "")
            _within(self._patience.poll, lambda: self._say(f"error: {message}"))
            self._ask(self._patience.poll, lambda: self._board.another().count(SHOWN))
            # Without rank 0, which may hold the board, the rest would hear of nothing.
            self._ask(self._patience.acknowledged + 1, lambda: self._acknowledge(self._board.rank == 0))

    def leave(self, message: str) -> NoReturn:
        """Ends this process, and the job, where it was asked to stop and there is nothing to be saved."""
        self._end(self._claim(Failure(self._board.rank, EXIT_REQUEUE, message)))

    def give_up(self, message: str) -> NoReturn:
        """Ends this process, and the job, for something that did not come to its end in time: all show their stacks."""
        signs = self._ask(10 * self._patience.poll + self._patience.grace, self._signs)
        where = where_words(signs) if signs else "unknown, the store is silent"
        message += f"; where the ranks were last: {where}. The stacks of all threads of each rank are on standard error"
        self._end(self._claim(self._failure(EXIT_WATCHDOG, message, blame_of_hang(signs or []), hang=True)))

    # The end

    def _claim(self, failure: Failure) -> Failure:
        """The job's first failure: this one, unless another came before."""
        first = self._ask(self._patience.grace, lambda: self._board.another().claim(FIRST, asdict(failure)))
        return Failure(**first) if first else failure  # the board's host is gone: nobody hears us

    def _end(self, first: Failure, error: BaseException | None = None) -> NoReturn:
        """Shows the first failure, has it recorded, and ends the process. One thread does; others wait for the end.

        The rank that failed first shows it, whole; the others leave it at that.
        """
        with self._ending:
            self._exit_code = first.code
            self._end_by = time.monotonic() + self._patience.acknowledged + 8
            mine, trace = first.rank == self._board.rank, ""
            alike = error is not None and words_of(error) == first.message
            if first.hang:
                show_stacks(self._board.rank)
            if mine:
                trace = traceback_of(error, first.code)
                self._say(trace or (first.message if first.stop else f"error: {first.message}"))
                self._ask(self._patience.poll, lambda: self._board.another().count(SHOWN))
            elif self._board.rank == 0 and not alike:
                self._say(self._words_about(first))
            try:
                plain = mine or alike or first.stop
                words = first.message if plain else f"{first.words(self.several_hosts)}: {first.message}"
                self.record(first.code, words, first.blame)
            except Exception as second:
                self._say(f"note: exit.json could not be written: {second}")
            self._tell_the_launcher(first, trace)
            self._ask(self._patience.acknowledged + 1, lambda: self._acknowledge(mine))
            with contextlib.suppress(OSError):  # its reader has gone, or the disk is full: the code says so
                sys.stdout.flush()
            os._exit(first.code)

    def _words_about(self, first: Failure) -> str:
        """What rank 0 says of another's failure: all of it only where that rank did not live to."""
        board, seconds = self._board, 2 * self._patience.poll

        def shown() -> Any:
            here = board.another()
            return here.wait(lambda: here.count(SHOWN, 0), seconds)

        who = first.words(self.several_hosts)
        if self._ask(seconds + 1, shown):
            return f"{who}, with exit code {first.code}: see its own message"
        return f"error: {who}: {first.message}"

    def _tell_the_launcher(self, first: Failure, trace: str) -> None:
        """torchrun takes the earliest for the cause, whoever ends first; each node has a torchrun of its own, so that
        one rank of it says all."""
        if first.rank == self._board.rank:
            self.tell(first.message, first.when, trace)
        elif self._speaks and first.host != host_name():
            self.tell(f"{first.who}, on {first.host}: {first.message}", first.when + 1, "")
        else:
            self.tell(first.who, first.when + 2, "")

    def _acknowledge(self, mine: bool) -> None:
        """Says that this rank knows; who failed, or holds the board, stays until all have said so."""
        board = self._board.another()
        board.count("acknowledged")
        if mine or board.rank == 0:
            board.wait(lambda: board.count("acknowledged", 0) >= board.world_size, self._patience.acknowledged)

    def _say(self, text: str) -> None:
        where = f" on {host_name()}" if self.several_hosts else ""
        prefix = f"[rank {self._board.rank}{where}] " if self._board.rank or where else ""
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
                self._gone = first_line(error)
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
        signs = self._ask(10 * self._patience.poll + self._patience.grace, self._signs)
        where = where_words(signs) if signs else "unknown, the store is silent"
        message = (
            f"watchdog: rank {self._board.rank}: {seen}; where the ranks were last: {where}. The stacks of all threads "
            "of each rank are on standard error"
        )
        return self._failure(EXIT_WATCHDOG, message, blame_of_hang(signs or []), hang=True)

    def _failure(self, code: int, message: str, blame: Blame, hang: bool = False) -> Failure:
        return Failure(self._board.rank, code, message, hang, blamed=(blame.rank, blame.host, blame.suspects))

    def _hear_another(self) -> None:
        """Waits a little for another's failure; the other thread ends the process when there is one."""
        end = time.monotonic() + self._patience.grace
        while time.monotonic() < end and not self._gone:
            time.sleep(0.05)

    def _ask(self, seconds: float, question: Callable[[], T]) -> T | None:
        """What the board answers; None where it is gone or does not answer in time."""
        return None if self._gone else _within(seconds, question)

    def _lost(self, seen: str) -> Failure:
        signs = self._ask(4 * self._patience.poll, self._signs)
        who = " (rank 0, or the launcher that holds the store)" if signs is None else silent_words(signs)
        message = f"another process of the job was lost without a word{who}"
        # Without a store every rank is the first to fail: those that do not speak for others say no more than this.
        if signs is not None or self._speaks:
            message += f"; seen here: {seen}. Was it killed (by a user, or by the system where memory ran out)? "
            message += "Start the same command again"
        return self._failure(EXIT_LOST_PROCESS, message, blame_of_lost(signs or []))

    def _signs(self) -> list[Sign]:
        board, seconds = self._board.another(), 2.5 * self._patience.poll
        return read_signs(board, seconds, lambda: self._tell(board, time.monotonic_ns()))

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
