"""The processes of a run as one of them sees them: who writes, what rank 0 decides for all, and how all end together.

`OneProcess` has nobody to ask and costs nothing; `Rank` is one of several. Build and session ask either the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, TypeVar

from megatron.checkpoint.board import Board, LocalBoard
from megatron.config.errors import StagemixError
from megatron.config.layout import Layout
from megatron.config.schema import HealthSection
from megatron.launch.torchrun import tell_torchrun
from megatron.metrics.meters import StepClock
from megatron.parallel.health import Health
from megatron.parallel.health_agreement import agree
from megatron.parallel.health_board import gather, open_board
from megatron.parallel.mesh import (
    Launched,
    Mesh,
    close_mesh,
    host_name,
    local_device,
    one_process_mesh,
    open_mesh,
)
from megatron.parallel.rank_board import RankBoard
from megatron.trainer.decisions import reasons_of
from megatron.trainer.heartbeat import Pulse
from megatron.trainer.over_ranks import AllRanks, OneRank, OverRanks

T = TypeVar("T")


class Job(Protocol):
    """What build and session ask."""

    @property
    def who(self) -> Launched:
        """This process's numbers."""

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's folder, and speaks."""

    @property
    def pulse(self) -> Pulse:
        """What this process does at the moment."""

    def share(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON value that rank 0 makes, on every rank."""

    def in_turn(self, name: str, make: Callable[[], T]) -> T:
        """What every rank makes for itself: rank 0 first, then one of each node, then the rest, so that what the
        first ones leave on disk is made once."""

    def agree(self, name: str, facts: Mapping[str, Any], kind: type[StagemixError]) -> None:
        """Returns where the facts are the same on every rank; raises `kind` on a rank whose differ from rank 0's."""

    def at(self, phase: str, step: int | None = None) -> None:
        """Notes progress, for the watchdog and the heartbeat."""

    def while_rank_0(self, phase: str, work: Callable[[Callable[[], bool]], None], stop: Callable[[], bool]) -> None:
        """All ranks: rank 0 works, however long, and the others wait for it. work is given what it must call at least
        every minute: it tells the watchdog that the work goes on, and gives whether any rank was asked to stop.
        """

    def checkpoint_board(self) -> Board:
        """Where ranks agree on checkpoints."""

    def open_mesh(self, layout: Layout) -> Mesh:
        """Joins the ranks."""

    def over_ranks(self, mesh: Mesh) -> OverRanks:
        """What is summed over ranks in each step."""

    def clock(self) -> WatchedClock:
        """The clock of the loop."""


class OneProcess:
    """A run of one process."""

    who = Launched()
    writes = True

    def __init__(self, section: HealthSection | None = None) -> None:
        self.pulse = Pulse()
        self._reasons = reasons_of((section or HealthSection()).stop_signals)

    def share(self, name: str, make: Callable[[], Any]) -> Any:
        """The value."""
        return make()

    def in_turn(self, name: str, make: Callable[[], T]) -> T:
        """The thing."""
        return make()

    def agree(self, name: str, facts: Mapping[str, Any], kind: type[StagemixError]) -> None:
        """One process agrees."""

    def at(self, phase: str, step: int | None = None) -> None:
        """For the heartbeat."""
        self.pulse.at(phase)

    def while_rank_0(self, phase: str, work: Callable[[Callable[[], bool]], None], stop: Callable[[], bool]) -> None:
        """Nobody waits."""
        self.at(phase)
        work(stop)

    def checkpoint_board(self) -> Board:
        """One process's."""
        return LocalBoard()

    def open_mesh(self, layout: Layout) -> Mesh:
        """The mesh of one process."""
        return one_process_mesh(local_device(self.who.local_rank))

    def over_ranks(self, mesh: Mesh) -> OverRanks:
        """Nothing to sum."""
        return OneRank(self._reasons)

    def clock(self) -> WatchedClock:
        """A clock whose names are this process's phases."""
        return WatchedClock(self.at)


class Rank:
    """One process of several. Made first of all, then `meet`; `close` or `fail` last."""

    def __init__(self, who: Launched, section: HealthSection) -> None:
        """Finds the store of the job. Raises LostProcessError, ConfigError."""
        self.who = who
        self.writes = who.rank == 0
        self.pulse = Pulse()
        self._reasons = reasons_of(section.stop_signals)
        self._start_seconds, self._begin = section.start_seconds, time.monotonic()
        # Longer than the watchdog waits, which knows more than a collective that gives up.
        self._limit_seconds = max(section.start_seconds, section.watchdog_seconds + 60)
        self._board = open_board(who, section.start_seconds)
        # One of each node; and rank 1, for where rank 0 is the one that was lost.
        self.health = Health(self._board, section.watchdog_seconds, speaks=who.local_rank == 0 or who.rank == 1)
        self.health.tell = tell_torchrun
        self._long_works = 0

    def meet(self) -> None:
        """Waits for the others, and watches them from then on. Raises LostProcessError."""
        left = max(1.0, self._start_seconds - (time.monotonic() - self._begin))
        self._board = gather(self._board, self.who, self._start_seconds, left)
        self.health.several_hosts = self._board.nodes > 1
        self.health.begin()

    def hosts(self) -> list[str]:
        """The hosts of all ranks, sorted; a question for each rank."""
        board = self._board
        return sorted({str(board.read(f"here/{rank}") or host_name()) for rank in range(board.world_size)})

    def share(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON value that rank 0 makes."""
        self.at(f"{name}: rank 0 decides")
        if self.writes:
            self._board.post(f"shared/{name}", [make()])
        value = self._board.wait(lambda: self._board.read(f"shared/{name}"))[0]
        self.at(f"{name}: decided")
        return value

    def in_turn(self, name: str, make: Callable[[], T]) -> T:
        """What every rank makes: rank 0, then the first of each node, then the rest."""
        board, done = self._board, f"turns/{name}"
        before = 0 if self.who.rank == 0 else 1 if self.who.local_rank == 0 else board.nodes
        self.at(f"{name}: waits for its turn")
        board.wait(lambda: board.count(done, 0) >= before)
        self.at(name)
        made = make()
        if self.who.rank == 0 or self.who.local_rank == 0:
            board.count(done)
        return made

    def agree(self, name: str, facts: Mapping[str, Any], kind: type[StagemixError]) -> None:
        """Compares with rank 0."""
        self.at(f"{name}: compares")
        agree(self._board, name, facts, kind)

    def at(self, phase: str, step: int | None = None) -> None:
        """Notes progress."""
        self.pulse.at(phase)
        self.health.at(phase, step)

    def while_rank_0(self, phase: str, work: Callable[[Callable[[], bool]], None], stop: Callable[[], bool]) -> None:
        """Rank 0's steps of work are counted on the board, and each is progress of every rank."""
        self._long_works += 1
        board, key = self._board, f"long work/{self._long_works}"

        def goes_on() -> bool:
            self.at(phase)
            board.count(f"{key}/alive")
            return stop() or board.count(f"{key}/stop", 0) > 0

        if self.writes:
            work(goes_on)
            board.post(f"{key}/done", True)
            return
        seen, told, pause = 0, False, 0.05
        while not board.read(f"{key}/done"):
            if (alive := board.count(f"{key}/alive", 0)) != seen:
                seen = alive
                self.at(phase)
            if not told and stop():
                told = True
                board.count(f"{key}/stop")
            time.sleep(pause)
            pause = min(1.5 * pause, 1.0)
        self.at(f"{phase}: done")

    def checkpoint_board(self) -> Board:
        """The ranks'."""
        return RankBoard(self._board.store, self.who.rank, self.who.world_size, "checkpoint")

    def open_mesh(self, layout: Layout) -> Mesh:
        """Joins the ranks."""
        self.at("joins the process groups")
        return open_mesh(layout, self.who, self._limit_seconds)

    def over_ranks(self, mesh: Mesh) -> OverRanks:
        """Sums over the mesh."""
        return AllRanks(mesh, self._reasons)

    def clock(self) -> WatchedClock:
        """A clock whose names are this rank's phases."""
        return WatchedClock(self.at)

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process, and the job, for an error."""
        self.health.fail(error)

    def close(self) -> None:
        """Leaves in peace; rank 0, which may hold the board, last."""
        self.at("leaves")
        self._board.count("leaves")
        self._board.wait(lambda: self._board.count("leaves", 0) >= self._board.world_size)
        self.health.end()
        close_mesh()
        self._board.count("left")
        if self.writes:
            self._board.wait(lambda: self._board.count("left", 0) >= self._board.world_size, 30)


class WatchedClock(StepClock):
    """A clock that tells what the process is doing: every name that time is spent on is a phase. took: hears of each
    how long it was."""

    def __init__(self, at: Callable[..., None]) -> None:
        super().__init__()
        self._at = at
        self.took: Callable[[str, float], None] = lambda name, seconds: None

    @contextmanager
    def spending(self, name: str) -> Iterator[None]:
        """Tells the phase, and counts the time inside under its name."""
        self._at(name)
        began = time.monotonic()
        with super().spending(name):
            yield
        self.took(name, time.monotonic() - began)
