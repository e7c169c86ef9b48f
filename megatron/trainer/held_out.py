"""Held-out samples of a run, and what of them counts in which training stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron.data.loader import validation_batches
from megatron.data.sources import OpenSource
from megatron.data.stage_objective import StageObjective
from megatron.engines.base import MicrobatchLike
from megatron.planner.resolve import ResolvedRun


@dataclass(frozen=True)
class HeldOut:
    """What is looked at: microbatches, and the sources of which only targets count that their loss masks mark."""

    microbatches: Sequence[MicrobatchLike]
    masked: tuple[str, ...] = ()


def held_out_of(resolved: ResolvedRun, seq_length: int, micro_batch_size: int, samples: int) -> dict[str, HeldOut]:
    """By name of each training stage that is not over: at most `samples` sequences of each source.

    An instruction stage is validated on what it learns: on the masked targets of every source that has loss masks,
    whether the stage has a weight for it or not, unless the stage's `whole_loss` has it. Stages of which the same
    counts share the same tensors.
    """
    made: dict[tuple[str, ...], HeldOut] = {}
    by_stage = {}
    for stage in resolved.schedule.stages:
        if stage.end_sample > resolved.ledger.consumed_samples:
            masked = masked_in(stage.objective, resolved.sources)
            if masked not in made:
                batches = validation_batches(resolved.sources, seq_length, micro_batch_size, samples, masked)
                made[masked] = HeldOut(batches, masked)
            by_stage[stage.name] = made[masked]
    return by_stage


def masked_in(objective: StageObjective, sources: Mapping[str, OpenSource]) -> tuple[str, ...]:
    """The sources of whose held-out documents only the marked targets count in a stage of this objective."""
    if not objective.is_instruction:
        return ()
    masked = (name for name, source in sorted(sources.items()) if source.mask_checksum is not None)
    return tuple(name for name in masked if name not in objective.whole_loss)


def unread_masks(resolved: ResolvedRun) -> list[str]:
    """Notes on sources with loss masks that a stage trains on without reading them."""
    return [
        f"stage {stage.name!r} does not read the loss mask of source {name!r}: all of its tokens are learned"
        for stage in resolved.schedule.stages
        for name in stage.weights.sources
        if resolved.sources[name].has_loss_mask and name not in stage.objective.masks
    ]
