"""Waiting for sends earlier than torch does keeps no rank of any schedule waiting for another for ever."""

from __future__ import annotations

from typing import Any

import pytest
from torch_schedules import made_schedule

from megatron.parallel.pipeline_stage import GRADIENTS_SENT
from megatron.planner.in_flight import in_transit

CASES = [("interleaved", 2), ("interleaved", 3), ("zero-bubble", 1), ("zbv", 1)]
PIPELINES = [2, 3, 4, 8]


def orders_of(schedule: str, virtual: int, pipeline: int, microbatches: int) -> tuple[list[list[Any]], dict[int, int]]:
    """By rank, torch's actions with communication; every stage's rank."""
    made = made_schedule(schedule, pipeline, virtual, microbatches)
    actions = made.pipeline_order_with_comms
    orders = [
        [(a.computation_type.value, a.stage_index, a.microbatch_index) for a in actions[rank]]
        for rank in range(pipeline)
    ]
    return orders, made.stage_index_to_group_rank


WORDS = {"F": "states", "B": "gradient"}


def plays_to_the_end(orders: list[list[Any]], owner: dict[int, int], outstanding: int, late: bool = False) -> bool:
    """Whether all ranks come to their ends. Messages between two ranks pass one by one in the order in which each rank
    posts them, and only when both have posted theirs, as NCCL's of one communicator do: stricter than gloo. A rank is
    stopped by a pass whose message has not come, and by a gradient sent `outstanding` gradients of its stage ago that
    has not gone. late: receives are posted only before the pass that needs them: what torch does not do.
    """
    places = [0] * len(orders)
    lines: dict[tuple[int, int], list[Any]] = {}
    passed: set[Any] = set()
    sent: dict[int, list[Any]] = {}

    def post(rank: int, other: int, message: Any) -> None:
        lines.setdefault((rank, other), []).append(message)
        mine, theirs = lines[rank, other], lines.setdefault((other, rank), [])
        while mine and theirs and mine[0] == theirs[0]:
            passed.add(mine.pop(0))
            theirs.pop(0)

    def goes(rank: int) -> bool:
        kind, stage, number = orders[rank][places[rank]]
        if kind == "SEND_B":
            before = sent.setdefault(stage, [])
            message = ("gradient", stage - 1, number)
            if not before or before[-1] != message:
                before.append(message)
                post(rank, owner[stage - 1], message)
            return len(before) <= outstanding or before[-1 - outstanding] in passed
        if kind == "SEND_F":
            post(rank, owner[stage + 1], ("states", stage + 1, number))
        elif kind in ("RECV_F", "RECV_B") and not late:
            post(rank, owner[stage + (1 if kind == "RECV_B" else -1)], (WORDS[kind[-1]], stage, number))
        elif kind in ("F", "B", "I"):
            message = (WORDS["F" if kind == "F" else "B"], stage, number)
            beside = stage - 1 if kind == "F" else stage + 1
            if beside in owner and owner[beside] != rank:
                if late and message not in lines.get((rank, owner[beside]), []) and message not in passed:
                    post(rank, owner[beside], message)
                return message in passed
        return True

    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while places[rank] < len(order) and goes(rank):
                places[rank], moved = places[rank] + 1, True
    return all(place == len(order) for place, order in zip(places, orders, strict=True))


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize(("schedule", "virtual"), CASES)
def test_no_rank_waits_for_ever(schedule: str, virtual: int, pipeline: int) -> None:
    for microbatches in (pipeline, 2 * pipeline, 6 * pipeline):
        orders, owner = orders_of(schedule, virtual, pipeline, microbatches)
        for outstanding in (GRADIENTS_SENT, 0):
            assert plays_to_the_end(orders, owner, outstanding), "even where each send is waited for at once"


def test_the_play_would_see_it() -> None:
    """Where receives are posted as late as they can be, sends that are waited for at once meet nobody."""
    orders, owner = orders_of("zbv", 1, 4, 16)
    assert not plays_to_the_end(orders, owner, 0, late=True)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize(("schedule", "virtual"), CASES)
def test_what_is_on_its_way_is_no_more_than_planned(schedule: str, virtual: int, pipeline: int) -> None:
    """Posted and not yet begun upon, in torch's own order; sent are at most three of each stage."""
    for microbatches in (pipeline, 2 * pipeline, 6 * pipeline):
        orders, owner = orders_of(schedule, virtual, pipeline, microbatches)
        for rank, order in enumerate(orders):
            waiting, most = set(), 0
            for kind, stage, number in order:
                if kind in ("RECV_F", "RECV_B"):
                    waiting.add((kind[-1], stage, number))
                elif kind in ("F", "B", "I"):
                    waiting.discard(("F" if kind == "F" else "B", stage, number))
                most = max(most, len(waiting))
            held = len({stage for stage, of in owner.items() if of == rank})
            sends = sum(of == rank and stage > 0 for stage, of in owner.items())
            sent = sends * min(GRADIENTS_SENT + 1, microbatches)
            assert most + sent <= in_transit(schedule, pipeline, held, rank, microbatches)
