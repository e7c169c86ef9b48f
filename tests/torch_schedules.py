"""torch's pipeline schedules without processes: their orders of actions, and how long they take on paper."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron.config.partition import stage_count, stage_numbers
from megatron.config.schema import ParallelSection
from megatron.parallel.pipeline import SCHEDULES

Action = tuple[int, str, int]


def made_schedule(schedule: str, pipeline: int, virtual: int, microbatches: int) -> Any:
    """torch's schedule object of pipeline rank 0, over stages that are names only."""
    section = ParallelSection.model_validate({"pipeline": pipeline, "schedule": schedule, "virtual": virtual})
    count = stage_count(section)
    stages = [
        SimpleNamespace(
            stage_index=number,
            num_stages=count,
            group_size=pipeline,
            group_rank=0,
            group=None,
            device="cpu",
            has_backward=False,
            is_first=number == 0,
            is_last=number == count - 1,
            submod=None,
            stage_index_to_group_rank={stage: stage % pipeline for stage in range(count)},
        )
        for number in stage_numbers(section, 0)
    ]
    return SCHEDULES[schedule](stages[0] if schedule == "1f1b" else stages, microbatches, scale_grads=False)


def actions_of(schedule: str, pipeline: int, virtual: int, microbatches: int) -> list[list[Action]]:
    """By pipeline rank, what it computes in order: (stage, "F" forward, "I" gradient of inputs, "W" of weights or "B"
    both, microbatch)."""
    if schedule == "1f1b":
        return [_one_forward_one_backward(rank, pipeline, microbatches) for rank in range(pipeline)]
    order = made_schedule(schedule, pipeline, virtual, microbatches).pipeline_order
    return [
        [(a.stage_index, a.computation_type.value, a.microbatch_index) for a in order[rank] if _computes(a)]
        for rank in range(pipeline)
    ]


def _one_forward_one_backward(rank: int, pipeline: int, microbatches: int) -> list[Action]:
    """As Schedule1F1B._step_microbatches does it; its _get_pipeline_order misnumbers the last rank's forwards."""
    ahead = min(microbatches, pipeline - rank)
    order = [(rank, "F", number) for number in range(ahead)]
    for number in range(microbatches):
        order.append((rank, "B", number))
        if number + ahead < microbatches:
            order.append((rank, "F", number + ahead))
    return order


def _computes(action: Any) -> bool:
    return action is not None and action.computation_type.value in {"F", "I", "W", "B"}


def makespan(orders: list[list[Action]], stages: int, forward: float, inputs: float, weights: float) -> float:
    """Time until every rank is done, where each does its actions in order, as soon as what they need is there.

    forward, inputs, weights: time of each part of one stage on one microbatch. Messages take none.
    """
    last = stages - 1
    done: dict[Action, float] = {}
    clocks, places = [0.0] * len(orders), [0] * len(orders)
    lasts = {"F": forward, "I": inputs, "W": weights, "B": inputs + weights}
    # torch's first stage has nobody to send gradients of inputs to: it computes all in the place of weights.
    first = lasts | {"I": 0.0, "W": inputs + weights}
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        moved = False
        for rank, order in enumerate(orders):
            while places[rank] < len(order):
                stage, kind, number = order[places[rank]]
                ready = _ready(done, stage, kind, number, last)
                if ready is None:
                    break
                clocks[rank] = max(clocks[rank], ready) + (first if stage == 0 else lasts)[kind]
                done[stage, kind, number] = clocks[rank]
                if kind == "B":
                    done[stage, "I", number] = clocks[rank]
                places[rank] += 1
                moved = True
        assert moved, "the order of actions waits for itself"
    return max(clocks)


def _ready(done: dict[Action, float], stage: int, kind: str, number: int, last: int) -> float | None:
    """When what an action needs is there; None while it is not."""
    if kind == "F":
        return 0.0 if stage == 0 else done.get((stage - 1, "F", number))
    if kind == "W":
        return done.get((stage, "I", number))
    own = done.get((stage, "F", number))
    after = own if stage == last else done.get((stage + 1, "I", number))
    return None if own is None or after is None else max(own, after)
