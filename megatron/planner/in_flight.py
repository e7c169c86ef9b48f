"""Microbatches whose activations a pipeline rank holds at once, by its schedule's own order of forward and backward.

Free of torch. A stage's activations of a microbatch live from its forward pass to its backward pass; where the
schedule splits that, to its gradient of the weights, and between both halves the gradients of what its weights made are
held besides. `tests/planner/test_rank_memory.py` counts the same in torch's own orders of actions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

Kind = Literal["F", "I", "W", "B"]
Event = tuple[int, Kind]
"""(stage, by its place among the rank's stages; forward, gradient of inputs, of weights, or of both)."""


class InFlight(NamedTuple):
    """By the rank's stages in the model's order: microbatches whose activations are held, and of those the ones whose
    gradients of weights are still to come."""

    held: tuple[int, ...]
    pending: tuple[int, ...]


@lru_cache(maxsize=4096)
def microbatches_in_flight(
    schedule: str, pipeline: int, virtual: int, rank: int, microbatches: int
) -> tuple[InFlight, ...]:
    """What a rank holds at its fullest: of all moments of a step those of which no other holds as much everywhere.

    virtual: stages on a rank, for "interleaved". One process without a pipeline holds one. 1f1b: min(m, p - rank)
    (arXiv 2104.04473, section 2.2). zero-bubble: min(m, p), of which up to rank + 1 are pending (2401.10241, ZB-H1).
    """
    if pipeline == 1:
        return (InFlight((1,), (0,)),)
    if schedule == "1f1b":
        return (InFlight((min(microbatches, pipeline - rank),), (0,)),)
    if schedule == "interleaved":
        return _fullest(_interleaved(pipeline, virtual, rank, microbatches), virtual)
    if schedule == "zero-bubble":
        return _fullest(_zero_bubble(pipeline, rank, microbatches), 1)
    return _fullest(_zbv(pipeline, rank, microbatches), 2)


def in_transit(schedule: str, pipeline: int, virtual: int, rank: int, microbatches: int) -> int:
    """Hidden states and their gradients, of a microbatch each, that a rank holds at most besides the inputs and outputs
    of those in flight: received into before their pass has begun, and sent and not yet known to have arrived.

    virtual: stages on a rank, of all schedules. 1f1b: three messages, which its variables hold. Else torch posts a
    receive as soon as its sender's turn is over: two or three ahead, but up to p on interleaved's ends, whose
    neighbours are a round ahead; and `parallel/pipeline_stage.py` lets each stage have two gradients under way while a
    third sets out. `tests/parallel/test_pipeline_order.py` counts in torch's own orders.
    """
    if pipeline == 1:
        return 0
    sends = virtual - (rank == 0)
    if schedule == "1f1b":
        return 3
    if schedule == "interleaved":
        ahead = max(3, pipeline) if rank in (0, pipeline - 1) else 3
    else:
        ahead = 2 if schedule == "zero-bubble" else 3
    return min(ahead, 2 * virtual * microbatches) + min(3, microbatches) * sends


def _interleaved(pipeline: int, virtual: int, rank: int, microbatches: int) -> Iterator[Event]:
    """Forward passes go round by round through the rank's stages, backward passes the other way; before the first
    backward pass come v - 1 rounds and two for each rank behind this one."""
    each = microbatches // max(1, microbatches // pipeline)
    count = virtual * microbatches
    ahead = min(count, (virtual - 1) * each + 2 * (pipeline - 1 - rank))
    for number in range(count + ahead):
        if number < count:
            yield number // each % virtual, "F"
        if number >= ahead:
            yield virtual - 1 - (number - ahead) // each % virtual, "B"


def _zero_bubble(pipeline: int, rank: int, microbatches: int) -> Iterator[Event]:
    """As 1f1b, with gradients of weights `rank` microbatches late."""
    ahead = min(microbatches, pipeline - 1 - rank)
    for number in range(microbatches + ahead):
        if number < microbatches:
            yield 0, "F"
        if number >= ahead:
            yield 0, "I"
        if number >= ahead + rank:
            yield 0, "W"


def _zbv(pipeline: int, rank: int, microbatches: int) -> Iterator[Event]:
    """torch's fixed order (ScheduleZBVZeroBubble): 0 is the stage on the way down, 1 the one on the way up. It is laid
    out for at least 2 p - 1 microbatches, of which those that do not exist are left out. What comes after the last
    gradient of inputs frees only."""
    count = max(2 * pipeline - 1, microbatches)
    done: dict[Event, int] = {}

    def each(*events: Event) -> Iterator[Event]:
        for event in events:
            done[event] = done.get(event, 0) + 1
            if done[event] <= microbatches:
                yield event

    for _ in range(2 * (pipeline - rank) - 1):
        yield from each((0, "F"))
    for _ in range(rank):
        yield from each((1, "F"), (0, "F"))
    for _ in range(pipeline - rank):
        yield from each((1, "F"), (1, "I"), (1, "W"))
    while done.get((1, "F"), 0) < done[0, "F"] or done[0, "F"] < count:
        if done[0, "F"] < count:
            yield from each((0, "F"))
        yield from each((0, "I"), (0, "W"), (1, "F"), (1, "I"), (1, "W"))
    for _ in range(rank):
        yield from each((0, "I"), (1, "I"))
    for _ in range(pipeline - rank):
        yield from each((0, "I"), (0, "W"))


def _fullest(events: Iterator[Event], stages: int) -> tuple[InFlight, ...]:
    held, pending = [0] * stages, [0] * stages
    found: set[tuple[int, ...]] = set()
    for stage, kind in events:
        held[stage] += {"F": 1, "I": 0, "W": -1, "B": -1}[kind]
        pending[stage] += {"F": 0, "I": 1, "W": -1, "B": 0}[kind]
        if kind in "FI":
            found.add((*held, *pending))
    best = [v for v in found if not any(v != w and all(a <= b for a, b in zip(v, w, strict=True)) for w in found)]
    return tuple(InFlight(v[:stages], v[stages:]) for v in sorted(best))
