"""The layout that fits with the fewest changes to one that does not, and what to write for it.

Changes are counted by what they are about, in the order of docs/parallel.md, "Choosing a layout": data_shard,
data_replicate, rows of a microbatch, recompute, tensor (with sequence), pipeline (with its schedule), context. Of
layouts with equally many changes those come first whose changes come first in this order; of these the fastest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from megatron.config.schema import ParallelSection
from megatron.planner.layout_fit import Place, best_recompute, floor_bytes, needed_bytes, time_of
from megatron.planner.search import Found, rounded
from megatron.planner.search_space import Choice, Workload, accepted, choices, recompute_of

KEYS: dict[str, tuple[str, ...]] = {
    "data_shard": ("data_shard",),
    "data_replicate": ("data_replicate",),
    "micro_batch_size": (),
    "recompute": ("recompute", "recompute_policy", "recompute_layers"),
    "tensor": ("tensor", "sequence"),
    "pipeline": ("pipeline", "schedule", "virtual"),
    "context": ("context", "context_method"),
}
"""Keys of `[parallel]` by what a change is about, in the order of docs/parallel.md."""
_NAMES = tuple(KEYS)
_RECOMPUTE = _NAMES.index("recompute")
Changes = tuple[int, ...]
"""Places in KEYS, ascending."""


@dataclass(frozen=True)
class Nearest:
    """changes: what they are about, names of KEYS."""

    found: Found
    changes: tuple[str, ...]


def changes_of(choice: Choice, section: ParallelSection, rows: int) -> tuple[str, ...]:
    """What a layout changes of `[parallel]` and the microbatch; names of KEYS."""
    return tuple(_NAMES[number] for number in _changes(choice, section, rows))


def _changes(choice: Choice, section: ParallelSection, rows: int) -> Changes:
    return tuple(
        number
        for number, (name, keys) in enumerate(KEYS.items())
        if (
            choice.rows != rows
            if name == "micro_batch_size"
            else _values(choice.section, keys) != _values(section, keys)
        )
    )


def _values(section: ParallelSection, keys: tuple[str, ...]) -> list[Any]:
    return [getattr(section, key) for key in keys]


def nearest(workload: Workload, processes: int, place: Place) -> Nearest | None:
    """To `[parallel]` and the microbatch of the workload; None where nothing of the space fits.

    Without a change where the layout itself is accepted and fits.
    """
    grouped: dict[Changes, list[Choice]] = {}
    for choice in _possible(workload, processes, place):
        grouped.setdefault(_changes(choice, workload.section, workload.train.micro_batch_size), []).append(choice)
    # Every layout stands under its changes with the recompute that is now, and under those with another one.
    keeping: dict[Changes, list[Choice]] = {}
    for changes, members in grouped.items():
        without = tuple(number for number in changes if number != _RECOMPUTE)
        keeping.setdefault(without, []).extend(members)
    now = recompute_of(workload.section)
    asked = [(changes, False) for changes in keeping]
    asked += [(tuple(sorted({*changes, _RECOMPUTE})), True) for changes in keeping]
    for changes, anew in sorted(asked, key=lambda one: (len(one[0]), one[0])):
        members = keeping[tuple(number for number in changes if number != _RECOMPUTE)]
        found = _fastest(workload, members, place) if anew else _as_it_is(workload, members, now, place)
        if found is not None:
            return Nearest(found, tuple(_NAMES[number] for number in changes))
    return None


def _possible(workload: Workload, processes: int, place: Place) -> Iterator[Choice]:
    space = choices(workload, processes, place.accelerator.processes_per_node)
    for _, alike in groupby(space, key=lambda choice: id(choice.section)):
        members = list(alike)
        if accepted(workload, members[0]) and floor_bytes(workload, members[0]) <= place.capacity:
            yield from members


def _as_it_is(workload: Workload, members: list[Choice], now: Any, place: Place) -> Found | None:
    """The fastest that fits with the recompute of the config."""
    best: Found | None = None
    for plain in members:
        choice = plain.with_recompute(now)
        if recompute_of(plain.section) != now and not accepted(workload, choice):
            continue
        step = time_of(workload, choice, place)
        if best is not None and rounded(step.total) > best.seconds:
            continue
        needed = needed_bytes(workload, choice, above=place.capacity)
        if needed <= place.capacity:
            best = min(filter(None, (best, Found(choice, needed, step))), key=lambda one: one.key)
    return best


def _fastest(workload: Workload, members: list[Choice], place: Place) -> Found | None:
    """The fastest that fits with any other recompute."""
    best: Found | None = None
    for choice in sorted(members, key=lambda one: time_of(workload, one, place).total):
        if best is not None and rounded(time_of(workload, choice, place).total) > best.seconds:
            break
        found = best_recompute(workload, choice, place)
        if found is not None:
            candidate = Found(found[1], needed_bytes(workload, found[1]), found[0])
            best = min(filter(None, (best, candidate)), key=lambda one: one.key)
    return best


def settings(choice: Choice, section: ParallelSection, rows: int) -> list[str]:
    """What `--set` is given for a layout: KEY=VALUE for each key that is another in the config.

    A key without a value (recompute_layers of all layers) cannot be set: see `removals`.
    """
    words = []
    for keys in KEYS.values():
        for key in keys:
            value = getattr(choice.section, key)
            if value is not None and value != getattr(section, key):
                words.append(f"parallel.{key}={str(value).lower() if isinstance(value, bool) else value}")
    if choice.rows != rows:
        words.append(f"train.micro_batch_size={choice.rows}")
    return words


def removals(choice: Choice, section: ParallelSection) -> list[str]:
    """Keys that the config says and the layout does without."""
    names = [key for keys in KEYS.values() for key in keys]
    return [
        f"parallel.{key}" for key in names if getattr(choice.section, key) is None and getattr(section, key) is not None
    ]
