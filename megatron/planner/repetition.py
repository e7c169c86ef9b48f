"""How often each source is repeated over a run, where it passes whole numbers of epochs, and where it runs dry."""

from __future__ import annotations

from typing import Any

from megatron.data.samples import leftover_bound
from megatron.data.schedule import Schedule, TrainingStage
from megatron.data.sources import OpenSource
from megatron.planner.positions import (
    Place,
    first_offset,
    place_row,
    sample_tokens,
    stream_tokens_at,
    used_at,
    where_use_passes,
)

# Up to four epochs repeated tokens are worth nearly as much as new ones (Muennighoff et al. 2023, arXiv 2305.16264).
MARKS = (1, 2, 4)
MUCH_REPEATED = 4


def repetition_row(schedule: Schedule, source: OpenSource) -> dict[str, Any]:
    """One source over the run.

    "epochs_after": lifetime epochs at each stage's end · "passes": where more than 1, 2 and 4 epochs are used, each
    with "epochs" and the place · "dry_at": where its cap leaves less than one sample, with "policy"; absent where it
    never does.
    """
    name, size = source.name, source.epoch_tokens
    row: dict[str, Any] = {
        "epochs_after": [
            float(used_at(stage, name, stage.samples) / size) if size else 0.0 for stage in schedule.stages
        ],
        "passes": [],
    }
    for epochs in MARKS:
        place = where_use_passes(schedule, name, epochs * size) if size else None
        if place is not None:
            row["passes"].append({"epochs": epochs, **place_row(schedule, place)})
    dry = dry_row(schedule, name)
    if dry is not None:
        row["dry_at"] = dry
    return row


def dry_row(schedule: Schedule, source: str) -> dict[str, Any] | None:
    """Where what a source's cap leaves no longer holds one sample more; None where it always does.

    "policy" says what follows: "error" (the run takes no more of it; the plan would have refused), "repeat" (epochs go
    on past the cap), "renormalise" (the others share its weight).
    """
    for stage in schedule.stages:
        fact = stage.facts[source]
        room = fact.cap_tokens - stage.used_before.get(source, 0)
        if source in stage.weights.sources and room > 0:
            offset = _renormalised(stage, source, room) if fact.dry == "renormalise" else _used_up(stage, source, room)
            if offset is not None:
                return {"policy": fact.dry, **place_row(schedule, Place(stage.index, offset))}
    return None


def _used_up(stage: TrainingStage, source: str, room: int) -> int | None:
    """The first sample number of the stage by which every whole sample that `room` tokens hold is due."""
    length = sample_tokens(stage, source, stage.shapes.steps[-1].seq_length)
    whole = room // length * length
    if not whole or stream_tokens_at(stage, source, stage.samples) < whole:
        return None
    return first_offset(stage.samples, lambda offset: stream_tokens_at(stage, source, offset) >= whole)


def _renormalised(stage: TrainingStage, source: str, room: int) -> int | None:
    """The sample number at which a source leaves the stage because less than one sample more is left of it."""
    ends = [part.start for part in stage.weights.segments if 0 < part.start < stage.samples]
    for offset in [*(end for end in ends if not stage.weights.weight(source, end)), stage.samples]:
        if room - stream_tokens_at(stage, source, offset) < leftover_bound(stage.shapes):
            return offset
    return None
