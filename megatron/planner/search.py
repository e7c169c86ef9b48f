"""The fastest layouts of a run over N processes that train accepts and that fit an accelerator.

Exact over `search_space`: steps without recompute are bounds from below, since recompute only adds, so that in their
order the search may stop where no later layout can be among the best. Of ways to recompute a layout has its fastest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from megatron.planner.disk import checkpoint_bytes
from megatron.planner.layout_fit import (
    Place,
    best_recompute,
    fits_somehow,
    floor_bytes,
    least_recompute,
    needed_bytes,
    time_of,
)
from megatron.planner.search_space import Choice, Workload, accepted, choices, simplicity
from megatron.planner.step_time import StepTime

DIGITS = 4
"""Steps that are the same in so many digits are taken to be equally fast."""


@dataclass(frozen=True)
class Found:
    """A layout. needed: bytes of its fullest rank, with what no tensor is made of. step: of the main batch."""

    choice: Choice
    needed: int
    step: StepTime

    @property
    def seconds(self) -> float:
        """Of a step, in so many digits as count."""
        return rounded(self.step.total)

    @property
    def key(self) -> tuple[Any, ...]:
        """Sorts the best first."""
        return (self.seconds, *simplicity(self.choice))


@dataclass(frozen=True)
class SearchResult:
    """best: fastest first. looked: layouts of the space. refused: of them, by train. too_large: of the others, those
    whose weights, gradients and optimizer state alone are more than fits. timed: the rest. misses: where nothing fits,
    the layouts that need least, step times included."""

    processes: int
    best: tuple[Found, ...]
    looked: int
    refused: int
    too_large: int
    timed: int
    misses: tuple[Found, ...] = ()


def rounded(seconds: float) -> float:
    """To DIGITS digits."""
    return float(f"{seconds:.{DIGITS}g}")


def search(workload: Workload, processes: int, place: Place, top: int = 10, misses: int = 3) -> SearchResult:
    """The `top` fastest; of those that are equally fast the simplest first. One for each family (`family_of`)."""
    considered = _Considered(workload, processes, place)
    found: dict[Family, Found] = {}
    last: float | None = None
    for bound, choice in considered.by_time():
        if last is not None and bound > last:
            break
        best = best_recompute(workload, choice, place)
        if best is not None:
            one = Found(best[1], needed_bytes(workload, best[1]), best[0])
            other = found.setdefault(family_of(choice), one)
            found[family_of(choice)] = min(one, other, key=lambda each: each.key)
            if len(found) >= top:
                last = sorted(each.seconds for each in found.values())[top - 1]
    ranked = sorted(found.values(), key=lambda one: one.key)[:top]
    near = () if found else considered.nearest_misses(misses)
    counts = (considered.looked, considered.refused, considered.too_large, considered.timed)
    return SearchResult(processes, tuple(ranked), *counts, near)


Family = tuple[Any, ...]


def family_of(choice: Choice) -> Family:
    """Layouts that differ in nothing but recompute and data_replicate, of which the fastest is worth a line."""
    section = choice.section
    cut = (section.tensor, section.sequence, section.pipeline, section.schedule, section.virtual, section.context)
    return (*cut, section.data_shard, choice.rows)


def any_fits(workload: Workload, processes: int, place: Place) -> bool:
    """Whether some layout over so many processes fits."""
    sections = _Considered(workload, processes, place).sections
    return any(fits_somehow(workload, choice, place) for members in sections.values() for choice in members)


@dataclass(frozen=True)
class Fewest:
    """processes: over so many something fits. exact: over no smaller number above the one that was asked about."""

    processes: int
    exact: bool


ONE_BY_ONE = 24
"""Whole nodes that are tried one after the other before their number is doubled."""


def fewest_processes(workload: Workload, processes: int, place: Place, most: int = 64) -> Fewest | None:
    """The smallest number of processes above `processes` over which something fits: a divisor of a node, or whole
    nodes. None where none was found up to `most` times as many.

    Passed over are numbers over which master weights and moments do not fit though each were held once; from there
    ONE_BY_ONE nodes more are tried one by one, then doubled numbers.
    """
    node = place.accelerator.processes_per_node
    least = max(processes + 1, _least_by_state(workload, place))
    inside = [number for number in range(least, node) if node % number == 0]
    first = -(-least // node)
    last = most * max(processes, node) // node
    whole = [*range(first, min(last, first + ONE_BY_ONE) + 1)]
    doubled = [first << power for power in range(1, 24) if first + ONE_BY_ONE < first << power <= last]
    for number in (*inside, *(nodes * node for nodes in whole), *(nodes * node for nodes in doubled)):
        if any_fits(workload, number, place):
            return Fewest(number, number <= max(whole, default=0) * node)
    return None


def _least_by_state(workload: Workload, place: Place) -> int:
    if workload.section.offload != "none":
        return 1
    weights, moments = checkpoint_bytes(workload.shape, workload.optimizer, workload.train.precision)
    return -(-(weights + moments) // max(1, place.capacity))


class _Considered:
    """The layouts that train accepts, by section, and how many there are."""

    def __init__(self, workload: Workload, processes: int, place: Place) -> None:
        self._workload, self._place = workload, place
        self.looked = self.refused = self.too_large = self.timed = 0
        self.sections: dict[int, list[Choice]] = {}
        self._floors: list[tuple[int, int, list[Choice]]] = []
        space = choices(workload, processes, place.accelerator.processes_per_node)
        for number, (_, alike) in enumerate(groupby(space, key=lambda choice: id(choice.section))):
            members = list(alike)
            self.looked += len(members)
            if not accepted(workload, members[0]):
                self.refused += len(members)
                continue
            floor = floor_bytes(workload, members[0])
            self._floors.append((floor, number, members))
            if floor > place.capacity:
                self.too_large += len(members)
            else:
                self.timed += len(members)
                self.sections[number] = members

    def by_time(self) -> Iterator[tuple[float, Choice]]:
        """(seconds of a step without recompute, layout), the fastest first."""
        timed = [
            (rounded(time_of(self._workload, choice, self._place).total), number, choice)
            for members in self.sections.values()
            for number, choice in enumerate(members)
        ]
        for seconds, _, choice in sorted(timed, key=lambda one: one[0]):
            yield seconds, choice

    def nearest_misses(self, count: int) -> tuple[Found, ...]:
        """Those that need least, whatever they recompute."""
        found: dict[Family, Found] = {}
        last: int | None = None
        for floor, _, members in sorted(self._floors, key=lambda one: one[:2]):
            if last is not None and floor > last:
                break
            for choice in members:
                needed, least = least_recompute(self._workload, choice)
                one = Found(least, needed, time_of(self._workload, least, self._place))
                other = found.setdefault(family_of(choice), one)
                found[family_of(choice)] = min(one, other, key=lambda each: (each.needed, each.key))
            if len(found) >= count:
                last = sorted(int(each.needed) for each in found.values())[count - 1]
        return tuple(sorted(found.values(), key=lambda one: (one.needed, one.key))[:count])
