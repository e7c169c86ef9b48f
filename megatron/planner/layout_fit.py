"""What a layout needs on its fullest rank, beside what an accelerator has.

Needed are a rank's tensors (`rank_memory`) and what no tensor is made of: the context and the communicators' buffers
(`RankMemory.device_bytes`). The margin is what is left of the device for the allocator's gaps and the model's errors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from megatron.config.layout import Layout
from megatron.config.layout_checks import BatchShape
from megatron.config.model_shape import ModelShape
from megatron.config.partition import partition_layers, stage_count, stage_numbers
from megatron.config.schema import ParallelSection
from megatron.planner.hardware import Accelerator, Efficiency
from megatron.planner.in_flight import microbatches_in_flight
from megatron.planner.rank_memory import RankMemory, communicating_groups, rank_memory
from megatron.planner.search_space import Choice, Recompute, Workload, recompute_kinds, train_of
from megatron.planner.state_bytes import state_bytes
from megatron.planner.step_time import StepTime, step_time


@dataclass(frozen=True)
class Place:
    """What layouts are weighed for. margin: share of the device's memory that stays free, from 0 to below 1."""

    accelerator: Accelerator
    efficiency: Efficiency | None = None
    margin: float = 0.1

    @property
    def capacity(self) -> int:
        """Bytes that a rank may need."""
        return int(self.accelerator.memory_bytes * (1 - self.margin))


@lru_cache(maxsize=4096)
def framework_bytes(layout: Layout) -> int:
    """Of a rank, without the allocator's gaps."""
    return RankMemory(0, 0, 0, 0, 0, 0, 0, 0, 0).device_bytes(communicating_groups(layout), fragmentation=0.0)


def memory_of(workload: Workload, choice: Choice, rank: int, batch: BatchShape) -> RankMemory:
    """Tensors of the fullest rank at a place of the pipeline axis."""
    return rank_memory(
        workload.shape,
        choice.section,
        choice.layout,
        train_of(workload, choice.rows),
        workload.optimizer,
        batch,
        rank,
        workload.kernels,
    )


def time_of(workload: Workload, choice: Choice, place: Place, batch: BatchShape | None = None) -> StepTime:
    """Of a step of the main batch, or of another."""
    train = train_of(workload, choice.rows)
    return step_time(
        workload.shape,
        choice.section,
        choice.layout,
        train,
        workload.optimizer,
        batch or workload.main,
        place.accelerator,
        place.efficiency,
    )


def needed_bytes(workload: Workload, choice: Choice, least: bool = False, above: int | None = None) -> int:
    """Of the fullest rank in any of the training's batches. above: stop at the first rank that needs more than so much,
    and give what it needs. least: of the main batch alone."""
    besides, most = framework_bytes(choice.layout), 0
    for batch in workload.batches[:1] if least else workload.batches:
        for rank in telling_ranks(workload.shape, choice.section, _microbatches(choice, batch)):
            most = max(most, memory_of(workload, choice, rank, batch).total + besides)
            if above is not None and most > above:
                return most
    return most


def _microbatches(choice: Choice, batch: BatchShape) -> int:
    return batch.global_batch_size // choice.layout.data // choice.rows


@lru_cache(maxsize=65536)
def telling_ranks(shape: ModelShape, section: ParallelSection, microbatches: int) -> tuple[int, ...]:
    """Pipeline ranks of which one is the fullest: of those that hold as many layers of the same stages' kinds, the ones
    whose microbatches in flight are no part of another's. Both ends come first."""
    count, pipeline = stage_count(section), section.pipeline
    if pipeline == 1:
        return (0,)
    partition = partition_layers(shape, count, shape.max_position_embeddings)
    alike: dict[object, list[tuple[int, tuple[tuple[int, ...], ...]]]] = {}
    for rank in range(pipeline):
        numbers = stage_numbers(section, rank)
        moments = microbatches_in_flight(section.schedule, pipeline, len(numbers), rank, microbatches)
        vectors = tuple(moment.held + moment.pending for moment in moments)
        # Whether a step's later microbatches find gradients beside them is of the same group, too.
        begun = tuple(sorted({microbatches * len(numbers) > sum(moment.held) for moment in moments}))
        kind = (tuple(len(partition[n]) for n in numbers), 0 in numbers, count - 1 in numbers, begun)
        held = alike.setdefault(kind, [])
        if not any(all(_covered(vector, larger) for vector in vectors) for _, larger in held):
            held.append((rank, vectors))
    found = sorted(rank for held in alike.values() for rank, _ in held)
    ends = [rank for rank in (0, pipeline - 1) if rank in found]
    return (*ends, *(rank for rank in found if rank not in ends))


def _covered(vector: tuple[int, ...], larger: Iterable[tuple[int, ...]]) -> bool:
    return any(all(a <= b for a, b in zip(vector, other, strict=True)) for other in larger)


def floor_bytes(workload: Workload, choice: Choice) -> int:
    """No more than any recompute and any rows of a microbatch need with this layout: what two moments of a step hold
    without activations, on the pipeline's ends."""
    section, layout = choice.section, choice.layout
    most = 0
    for rank in {0, section.pipeline - 1}:
        state = state_bytes(workload.shape, section, layout, workload.train, workload.optimizer, rank, workload.kernels)
        held = state.parameters + state.gradients + state.optimizer
        backward = held + state.gathered + max(state.accumulated, state.narrow_gradients)
        most = max(most, backward, held + state.copies + state.updating)
    return most + framework_bytes(layout)


def best_recompute(workload: Workload, choice: Choice, place: Place) -> tuple[StepTime, Choice] | None:
    """The fastest way to recompute with which a layout fits; None where none does."""
    if needed_bytes(workload, choice, above=place.capacity) <= place.capacity:
        return time_of(workload, choice, place), choice
    found = []
    for kind in recompute_kinds(choice.section):
        if (fits := _fewest_layers(workload, choice, kind, place.capacity)) is not None:
            found.append((time_of(workload, fits, place), fits))
    return min(found, key=lambda one: one[0].total, default=None)


def _fewest_layers(workload: Workload, choice: Choice, kind: Recompute, capacity: int) -> Choice | None:
    """Recomputed layers of each stage, as few as fit: the more there are, the less is kept."""

    def fits(candidate: Choice) -> bool:
        return needed_bytes(workload, candidate, above=capacity) <= capacity

    every = choice.with_recompute(kind)
    if not fits(every):
        return None
    partition = partition_layers(workload.shape, stage_count(choice.section), workload.shape.max_position_embeddings)
    few, enough, best = 0, max(map(len, partition)), every
    while enough - few > 1:
        middle = (few + enough) // 2
        candidate = choice.with_recompute((kind[0], kind[1], middle))
        if fits(candidate):
            enough, best = middle, candidate
        else:
            few = middle
    return best


def fits_somehow(workload: Workload, choice: Choice, place: Place) -> bool:
    """Whether a layout fits with any recompute."""
    kinds = [choice, *(choice.with_recompute(kind) for kind in recompute_kinds(choice.section))]
    return any(needed_bytes(workload, one, above=place.capacity) <= place.capacity for one in kinds)


def least_recompute(workload: Workload, choice: Choice) -> tuple[int, Choice]:
    """The way to recompute that needs the fewest bytes, and how many."""
    found = [choice, *(choice.with_recompute(kind) for kind in recompute_kinds(choice.section))]
    sizes = [(needed_bytes(workload, one), number) for number, one in enumerate(found)]
    size, number = min(sizes)
    return size, found[number]
