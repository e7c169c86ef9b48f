"""Goodput: how much of the wall time since a run's first start became steps that its weights still hold, and where the
rest went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron.launch.attempts import Attempt


@dataclass(frozen=True)
class StepTime:
    """Seconds that rows of metrics tell of, over the whole run. kept: of steps that survive. redone: of steps that were
    lost with a kill or a roll-back, and done again. aside: of saves, validation and so on, by name. exact: whether all
    rows were read; else aside is reckoned from the latest."""

    kept: float
    redone: float = 0.0
    aside: Mapping[str, float] = field(default_factory=dict)
    exact: bool = True


@dataclass(frozen=True)
class WallTime:
    """Seconds since the first start, shared out; their sum is total. exact: whether nothing of it was reckoned.

    start: from a start of the program to its first step. aside: by name. between: from the end of an attempt to the
    next start; and what rows do not fill of the time of attempts that were killed, whose end no record tells. other: in
    the loop, beyond what rows tell of: the last save of an attempt, a step that was not finished.
    """

    total: float
    kept: float
    redone: float
    start: float
    aside: dict[str, float]
    between: float
    other: float
    exact: bool

    @property
    def goodput(self) -> float:
        """The share that became steps that survive."""
        return self.kept / self.total if self.total > 0 else 0.0


def wall_time(attempts: Sequence[Attempt], until: float, last_sign: float, steps: StepTime) -> WallTime | None:
    """The time from the first start until `until`. last_sign: when the last attempt ended, or was last heard of; of
    one that lives, when its newest row was written, or its first step began; unix seconds. None where no start is on
    record."""
    if not attempts:
        return None
    start = between = loop = unknown = 0.0
    for number, attempt in enumerate(attempts):
        following = attempts[number + 1].began if number + 1 < len(attempts) else None
        end = attempt.end.time if attempt.end else last_sign if following is None else None
        known = end if end is not None else following
        assert known is not None
        first = attempt.start.time if attempt.start else known
        start += max(0.0, min(first, known) - attempt.began)
        if end is None:
            unknown += max(0.0, known - first)
        else:
            loop += max(0.0, end - first)
            between += max(0.0, (until if following is None else following) - end)
    total = max(0.0, until - attempts[0].began)
    inside = loop + unknown
    told = steps.kept + steps.redone + sum(steps.aside.values())
    # Clocks of hosts differ, and rows of a parent run tell of more time than there was.
    scale = min(1.0, inside / told) if told > 0 else 1.0
    left = inside - told * scale
    if unknown:
        between, left = between + left, 0.0
    exact = steps.exact and not unknown and scale > 0.99
    aside = {name: seconds * scale for name, seconds in steps.aside.items() if seconds > 0}
    return WallTime(total, steps.kept * scale, steps.redone * scale, start, aside, between, left, exact)
