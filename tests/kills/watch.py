"""One attempt watched from its start to the end of its last process: the event comes, the launcher does its part."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kills.adversary import CONT, KILL, TERM, Blow, Event, Moment
from kills.attempts import Attempt
from kills.laws import bytes_in, files_now, rows_in
from kills.recorder import END, FIRST, START, TRAIN, Noted

WATCHDOG, START_SECONDS = 30, 60
BOUND = max(WATCHDOG, START_SECONDS) + 60.0
"""Seconds after an event, or without any sign of progress, until a job that still lives hangs: the longest documented
wait, and room for a machine that does other work."""
NOTICE, KILL_WAIT = 0.5, 30.0
"""srun --kill-on-bad-exit: soon after a process has failed the rest are asked to stop, and killed after KillWait."""

LATE = 8
"""New rows after which an event comes that has waited in vain for something else."""


class Progress:
    """The newest step of metrics.jsonl, read again where the file has changed."""

    def __init__(self, output: Path) -> None:
        self._path = output / "metrics.jsonl"
        self._seen: tuple[int, int] = (0, -1)
        self.step = 0

    def look(self) -> int:
        """The step; 0 before the first."""
        try:
            status = self._path.stat()
        except OSError:
            return self.step
        if (status.st_ino, status.st_size) != self._seen:
            self._seen = (status.st_ino, status.st_size)
            self.step = max((row["step"] for row in rows_in(self._path) if "loss" in row), default=0)
        return self.step


@dataclass
class Watch:
    """How an attempt went. helps: whether a launcher ends the rest when one process has failed."""

    attempt: Attempt
    event: Event | None
    output: Path
    progress: Progress
    helps: bool
    hit: list[Noted | None] = field(default_factory=list)
    fired: float | None = None
    fired_step: int = 0
    first_row: float | None = None
    ended_after: float | None = None
    hang: str = ""
    killed_by_launcher: int = 0
    largest: int = 0
    on_fire: Callable[[], None] = lambda: None
    on_struck: Callable[[], None] = lambda: None
    on_step: Callable[[int], None] = lambda step: None
    _there_at: float | None = None

    def __post_init__(self) -> None:
        self._first_step = self.progress.look()
        self._blows: list[Blow] = list(self.event.blows) if self.event else []
        self._last_blow = 0.0
        self._sign: Any = None
        self._sign_at = time.monotonic()
        self._failed_at: float | None = None
        self._asked_rest = False
        self._sized_at = 0.0

    def run(self) -> None:
        """Returns when no process of the attempt lives."""
        while self.attempt.alive and not self.hang:
            now = time.monotonic()
            self._look(now)
            if self.event and self.fired is None and self._is_time(self.event.moment, now):
                self.fired, self.fired_step = now, self.progress.step
                self.on_fire()
            if self.fired is not None:
                self._strike(now)
            self._launcher(now)
            self._find_a_hang(now)
            time.sleep(0.004)
        self._look(time.monotonic())
        if self.event and self.event.ends and self._last_blow and not self.hang:
            self.ended_after = time.monotonic() - self._last_blow
        self.attempt.end()

    def _look(self, now: float) -> None:
        step = self.progress.look()
        if step > self._first_step and self.first_row is None:
            self.first_row = now - self.attempt.began
        self.on_step(step)
        sign = (step, self.attempt.codes, [self.attempt.noted(rank) for rank in range(self.attempt.ranks)])
        if sign != self._sign:
            self._sign, self._sign_at = sign, now
        if now - self._sized_at > 0.5:
            self._sized_at = now
            self.largest = max(self.largest, bytes_in(self.output))

    def _is_time(self, moment: Moment, now: float) -> bool:
        if moment.kind == "time":
            return now - self.attempt.began >= moment.number
        late = moment.words != END and self.progress.step >= self._first_step + LATE
        if self._there_at is None and (late or self._is_there(moment)):
            self._there_at = now
        return self._there_at is not None and now - self._there_at >= moment.later

    def _is_there(self, moment: Moment) -> bool:
        if moment.kind == "rows":
            return self.progress.step >= self._first_step + moment.number
        if moment.kind == "files":
            folders = list((self.output / "checkpoints").glob(".tmp-*"))
            return any(len(files_now(folder)) >= moment.number for folder in folders)
        noted = [self.attempt.noted(rank) for rank in range(self.attempt.ranks)]
        return any(one is not None and one.phase == moment.words for one in noted)

    def _strike(self, now: float) -> None:
        while self._blows and self.fired is not None and now - self.fired >= self._blows[0][0]:
            _, number, ranks = self._blows.pop(0)
            reached = [rank for rank in ranks if self.attempt.code(rank) is None and self.attempt.pid(rank)]
            for rank in reached:
                self.attempt.send(rank, number)
            if reached and number != CONT:
                self._last_blow = self._sign_at = time.monotonic()
                self.hit += [self.attempt.noted(rank) or self._guess() for rank in reached]
            if not self._blows:
                self.on_struck()

    def _guess(self) -> Noted:
        """What can be seen from outside of ranks that note nothing."""
        save = "between" if list((self.output / "checkpoints").glob(".tmp-*")) else ""
        begun = self.progress.step > self._first_step
        return Noted({True: TRAIN, False: START}[begun] if not save else FIRST, save, int(begun))

    def _launcher(self, now: float) -> None:
        alive, codes = self.attempt.alive, self.attempt.codes
        if not self._blows and alive and set(alive) <= self.attempt.stopped:
            self._kill(alive)  # stopped for good: left to the launcher, as docs/exit-codes.md says
        if not self.helps or all(code in (None, 0) for code in codes):
            return
        self._failed_at = self._failed_at or now
        if not self._asked_rest and now - self._failed_at > NOTICE:
            self._asked_rest = True
            for rank in alive:
                self.attempt.send(rank, CONT)
                self.attempt.send(rank, TERM)
        if now - self._failed_at > NOTICE + KILL_WAIT:
            self.killed_by_launcher += len(alive)
            self._kill(alive)

    def _kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            self.attempt.send(rank, KILL)

    def _find_a_hang(self, now: float) -> None:
        since = self._sign_at
        if self.event and self.event.ends and self._last_blow and not self._blows:
            since = min(since, self._last_blow)
        if not self._blows and now - since > BOUND:
            noted = [self.attempt.noted(rank) for rank in range(self.attempt.ranks)]
            self.hang = f"{self.event}: {now - since:.0f} s, codes {self.attempt.codes}, ranks {noted}"
