"""What the ranks of a job last said of themselves, and what may be concluded of one that is silent or behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.parallel.health_board import Board, rank_words

PHASES = ("after a step", "validation", "checkpoint", "evaluation", "data", "engine")
"""Of a rank that has taken so many steps, in the order in which it comes through them, alike on all ranks."""


_WORDS = 5


@dataclass(frozen=True)
class Sign:
    """A rank's last word. step, phase, host: None where it never spoke. silent: it said nothing new over some polls."""

    rank: int
    step: int | None
    phase: str | None
    host: str | None
    silent: bool

    @property
    def words(self) -> str:
        """Where it was last."""
        if self.step is None:
            return "not yet begun"
        return f"step {self.step}, {self.phase}" + (f" (no sign of life; host {self.host})" if self.silent else "")


@dataclass(frozen=True)
class Blame:
    """Whose an error is, as far as that is known. rank, host: None where it is nobody's alone. suspects: hosts that
    look bad, sorted."""

    rank: int | None = None
    host: str | None = None
    suspects: tuple[str, ...] = ()


def read_signs(board: Board, seconds: float, speak: Callable[[], None]) -> list[Sign]:
    """A sign of every rank, by two looks at the board that are so many seconds apart: longer than ranks are silent
    between two words. The rank that looks is never silent; speak: called meanwhile, since others may look at it."""
    keys = [f"status/{rank}" for rank in range(board.world_size)]
    before = [board.read(key) for key in keys]
    for _ in range(_WORDS):
        speak()
        time.sleep(seconds / _WORDS)
    now = [board.read(key) for key in keys]
    return [
        _sign(rank, said, rank != board.rank and said == earlier)
        for rank, (said, earlier) in enumerate(zip(now, before, strict=True))
    ]


def _sign(rank: int, said: Any, silent: bool) -> Sign:
    if said is None:
        return Sign(rank, None, None, None, silent)
    _, step, phase, host = said
    return Sign(rank, step, phase, host, silent)


def where_words(signs: list[Sign]) -> str:
    """Steps and phases of all ranks, those that are alike together, the rarest first."""
    groups: dict[str, list[int]] = {}
    for sign in signs:
        groups.setdefault(sign.words, []).append(sign.rank)
    ordered = sorted(groups.items(), key=lambda item: (len(item[1]), item[1]))
    return "; ".join(f"{rank_words(ranks)}: {words}" for words, ranks in ordered)


def silent_words(signs: list[Sign]) -> str:
    """Which ranks say nothing; empty for none."""
    silent = [sign for sign in signs if sign.silent]
    where = sorted({f"step {sign.step}, {sign.phase}, host {sign.host}" for sign in silent if sign.host is not None})
    return f" ({rank_words([sign.rank for sign in silent])}: {'; '.join(where)})" if silent else ""


def blame_of_lost(signs: list[Sign]) -> Blame:
    """For a process that was lost without a word: the silent ones."""
    return _blame([sign for sign in signs if sign.silent], signs)


def blame_of_hang(signs: list[Sign]) -> Blame:
    """For a hang, which is to say when nobody moved for long: ranks without a sign of life; else those that have taken
    fewer steps than others, or are in an earlier phase of the same step. Nobody, where all are at the same place."""
    silent = [sign for sign in signs if sign.silent]
    if silent:
        return _blame(silent, signs)
    if any(sign.step is None or sign.phase not in PHASES for sign in signs):
        return Blame()
    places = {sign.rank: (sign.step, PHASES.index(str(sign.phase))) for sign in signs}
    behind = [sign for sign in signs if places[sign.rank] < max(places.values())]
    return _blame(behind, signs)


def _blame(bad: list[Sign], signs: list[Sign]) -> Blame:
    """Never more than half of several hosts: when most are gone, it was the job that was ended, or the network."""
    everywhere = {sign.host for sign in signs if sign.host is not None}
    hosts = {sign.host for sign in bad if sign.host is not None}
    if not hosts or (len(everywhere) > 1 and 2 * len(hosts) > len(everywhere)):
        return Blame()
    one = bad[0] if len(bad) == 1 else None
    host = hosts.copy().pop() if len(hosts) == 1 else None
    return Blame(one.rank if one else None, host, tuple(sorted(hosts)))
