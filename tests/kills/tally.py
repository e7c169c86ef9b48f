"""What a run's lives came to, in figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from kills.recorder import PHASES


@dataclass
class Recovery:
    """From an event to the first step beyond those that were taken before it, or to the end of a complete run. ended:
    whether the job that was hit has ended, where it must. again: other events came meanwhile."""

    began: float
    goal: int
    ended: bool
    again: bool = False
    seconds: float | None = None


@dataclass
class Tally:
    """Figures of one life or of several together."""

    attempts: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    beside: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    redone: int = 0
    hangs: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    worst_error: float = 0.0
    largest: float = 0.0
    refused: int = 0
    wrong_samples: int = 0

    @property
    def kills(self) -> int:
        """Events that reached a job that lived."""
        return self.kinds.total()

    def add(self, other: Tally) -> None:
        """Takes another life's figures."""
        for mine, theirs in (
            (self.attempts, other.attempts),
            (self.kinds, other.kinds),
            (self.phases, other.phases),
            (self.codes, other.codes),
        ):
            mine.update(theirs)
        self.beside += other.beside
        self.redone += other.redone
        self.refused += other.refused
        self.wrong_samples += other.wrong_samples
        self.hangs += other.hangs
        self.faults += other.faults
        self.ends += other.ends
        self.recoveries += other.recoveries
        self.worst_error = max(self.worst_error, other.worst_error)
        self.largest = max(self.largest, other.largest)

    def lines(self) -> Iterable[str]:
        """For people."""
        yield f"kills: {self.kills} in {self.attempts.total()} starts ({_words(self.attempts)})"
        for name, count in self.kinds.most_common():
            yield f"  {count:4d}  {name}"
        yield f"phases of the ranks that were hit ({self.phases.total()}; {self.beside} with a save beside training):"
        for name in [*PHASES, *(name for name in self.phases if name not in PHASES)]:
            yield f"  {self.phases[name]:4d}  {name}"
        yield f"exit codes of ranks: {_words(self.codes)}"
        yield f"second starts refused while the first still lived: {self.refused}"
        yield f"lost or replayed samples: {self.wrong_samples} steps; steps redone from a checkpoint: {self.redone}"
        yield f"hangs beyond the bound: {len(self.hangs)}; end of the job after the event: {_seconds(self.ends)}"
        alone = [r.seconds for r in self.recoveries if r.seconds is not None and not r.again]
        hit = [r.seconds for r in self.recoveries if r.seconds is not None and r.again]
        yield f"recovery, to the first step beyond: {_seconds(alone)}; hit again meanwhile: {_seconds(hit)}"
        yield f"worst relative error of losses where the layout changed: {self.worst_error:.1e}"
        yield f"largest disk use of a run: {self.largest:.1f} checkpoints"


def _words(counter: Counter[str]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counter.items()))


def _seconds(values: list[float]) -> str:
    return f"median {median(values):.1f} s, worst {max(values):.1f} s ({len(values)})" if values else "none"
