"""What goes wrong, and when: signals at random moments of a run's life, drawn from a seed."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass

from kills.recorder import BETWEEN, END, FIRST, PUBLISH, RETIRE, START, VALIDATE, WAIT

KILL, TERM, STOP, CONT = signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, signal.SIGCONT
Blow = tuple[float, int, tuple[int, ...]]
"""Seconds after the moment, a signal, and the ranks that get it."""


@dataclass(frozen=True)
class Moment:
    """When an event comes. kind, number: "time", seconds after the start; "rows", so many new rows of metrics; "files",
    so many files of a save that is being written; "phase", a rank is in the phase `words`. later: seconds after that.
    """

    kind: str
    number: float = 0
    words: str = ""
    later: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind} {self.words or f'{self.number:g}'} + {self.later:.3f} s"


@dataclass(frozen=True)
class Event:
    """What is done to a job. ends: whether the job must end by it, rather than go on."""

    name: str
    moment: Moment
    blows: tuple[Blow, ...]
    ends: bool = True

    def __str__(self) -> str:
        blows = ", ".join(
            f"+{after:.2f} s {signal.Signals(number).name} to {ranks}" for after, number, ranks in self.blows
        )
        return f"{self.name} at {self.moment}: {blows}"


def draw(chance: random.Random, ranks: int, horizon: float, watchdog: float) -> Event:
    """An event for an attempt of so many ranks. horizon: seconds from the start within which "time" falls."""
    kinds = [kind for kind in _KINDS if ranks > 1 or not kind[3]]
    name, _, make, _ = chance.choices(kinds, [kind[1] for kind in kinds])[0]
    blows = make(chance, ranks, watchdog)
    return Event(
        name, _moment(chance, horizon), blows, ends=any(number != CONT and number != STOP for _, number, _ in blows)
    )


def _moment(chance: random.Random, horizon: float) -> Moment:
    kind = chance.choices(["time", "rows", "files", "phase"], [5, 2, 4, 4])[0]
    if kind == "time":
        return Moment(kind, chance.uniform(0, horizon))
    if kind == "rows":
        return Moment(kind, chance.randint(1, 8), later=chance.uniform(0, 0.1))
    if kind == "files":
        return Moment(kind, chance.randint(1, 10), later=chance.choice([0.0, chance.uniform(0, 0.2)]))
    phase = chance.choice([START, FIRST, VALIDATE, WAIT, BETWEEN, PUBLISH, RETIRE, END, END])
    return Moment(kind, words=phase, later=chance.choice([0.0, chance.uniform(0, 0.05)]))


def _one(chance: random.Random, ranks: int) -> tuple[int, ...]:
    return (chance.randrange(ranks),)


def _all(ranks: int) -> tuple[int, ...]:
    return tuple(range(ranks))


def _several(chance: random.Random, ranks: int) -> tuple[int, ...]:
    return tuple(sorted(chance.sample(range(ranks), chance.randint(2, ranks))))


def _once(number: int, whom: str) -> Callable[[random.Random, int, float], tuple[Blow, ...]]:
    def make(chance: random.Random, ranks: int, watchdog: float) -> tuple[Blow, ...]:
        victims = {"one": _one(chance, ranks), "all": _all(ranks)}.get(whom) or _several(chance, ranks)
        return ((0.0, number, victims),)

    return make


def _preempted(chance: random.Random, ranks: int, watchdog: float) -> tuple[Blow, ...]:
    asks = chance.choice([TERM, signal.SIGUSR1])
    return ((0.0, asks, _all(ranks)), (chance.uniform(0, 3), KILL, _all(ranks)))


def _impatient(chance: random.Random, ranks: int, watchdog: float) -> tuple[Blow, ...]:
    first, second = chance.choice([_one(chance, ranks), _all(ranks)]), chance.choice([_one(chance, ranks), _all(ranks)])
    return ((0.0, TERM, first), (chance.uniform(0, 2), TERM, second))


def _paused(chance: random.Random, ranks: int, watchdog: float) -> tuple[Blow, ...]:
    victims = chance.choice([_one(chance, ranks), _all(ranks)])
    return ((0.0, STOP, victims), (chance.uniform(0.1, 3), CONT, victims))


def _held_up(chance: random.Random, ranks: int, watchdog: float) -> tuple[Blow, ...]:
    victims = _one(chance, ranks)
    return ((0.0, STOP, victims), (1.5 * watchdog, CONT, victims))


_KINDS: tuple[tuple[str, int, Callable[[random.Random, int, float], tuple[Blow, ...]], bool], ...] = (
    ("SIGKILL to one rank", 26, _once(KILL, "one"), False),
    ("SIGKILL to several", 6, _once(KILL, "several"), True),
    ("SIGKILL to all", 10, _once(KILL, "all"), False),
    ("SIGTERM to all", 6, _once(TERM, "all"), False),
    ("SIGTERM to one rank", 6, _once(TERM, "one"), True),
    ("SIGUSR1 to all", 4, _once(signal.SIGUSR1, "all"), False),
    ("SIGUSR1 to one rank", 4, _once(signal.SIGUSR1, "one"), True),
    ("SIGUSR2 to all", 3, _once(signal.SIGUSR2, "all"), False),
    ("SIGUSR2 to one rank", 3, _once(signal.SIGUSR2, "one"), True),
    ("asked to stop, SIGKILL to all soon after", 12, _preempted, False),
    ("asked to stop twice", 6, _impatient, False),
    ("stopped for a while", 6, _paused, False),
    ("one rank stopped for good", 4, _once(STOP, "one"), True),
    ("one rank stopped for longer than the watchdog", 2, _held_up, True),
)
"""Name, weight, blows, and whether it needs several ranks."""
