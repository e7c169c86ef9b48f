"""What each rank sends in a training step, by axis and kind of collective, to the byte (engine torch).

`tests/planner/test_communication.py` counts the same in real runs. Sources: tensor parallel with and without sequence,
Shoeybi et al. (arXiv 1909.08053, section 3) and Korthikanti et al. (2205.05198, section 4.2.2), with the input of a
layer gathered once more for its weights' gradients; context, DeepSpeed Ulysses (2309.14509) or keys and values
gathered; data, FSDP2 (`planner/data_traffic.py`). DeepSpeed's own collectives are taken to be the same bytes.

Not here: what happens once in many steps (checkpoints, validation) and the job's control messages of a few bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.kernel_checks import splits_backward
from megatron.config.layout import Layout
from megatron.config.layout_checks import BatchShape
from megatron.config.layout_sizes import gathers_keys
from megatron.config.model_shape import ModelShape
from megatron.config.partition import partition_layers, stage_count, stage_numbers
from megatron.config.schema import ParallelSection, TrainSection
from megatron.planner.data_traffic import data_volumes, end_volumes
from megatron.planner.forward_pass import COMPUTE_BYTES, heads_here
from megatron.planner.volume import Beside, Group, Kind, Volume, group_of


def volumes(
    shape: ModelShape,
    section: ParallelSection,
    layout: Layout,
    train: TrainSection,
    batch: BatchShape,
    pipeline_rank: int = 0,
    processes_per_node: int = 8,
) -> list[Volume]:
    """All that one rank of the given pipeline rank sends in a training step; nothing on one process.

    Messages of no bytes, and axes of one rank, are left out. The layout must be one that `refusals` passes.
    """
    if layout.world_size == 1:
        return []
    rows = train.micro_batch_size
    microbatches = batch.global_batch_size // layout.data // rows
    part = _Part.of(shape, section, pipeline_rank)
    found = [
        *_tensor_volumes(
            shape, section, layout, train, rows * (batch.seq_length // layout.context), part, microbatches
        ),
        *_context_volumes(
            shape, section, layout, train, rows * (batch.seq_length // layout.context), part, microbatches
        ),
        *_pipeline_volumes(shape, section, layout, train, rows * batch.seq_length, pipeline_rank, microbatches),
    ]
    placed = [_placed(one, layout, processes_per_node) for one in found if one.whole and one.count]
    placed += data_volumes(shape, section, layout, train, pipeline_rank, microbatches, processes_per_node)
    return placed + end_volumes(shape, section, layout, train, batch, pipeline_rank, processes_per_node)


def _placed(volume: Volume, layout: Layout, processes_per_node: int) -> Volume:
    size, stride = {
        "tensor": (layout.tensor, 1),
        "context": (layout.context, layout.tensor),
        "pipeline": (layout.pipeline, layout.tensor * layout.context * layout.data),
    }[volume.axis]
    group = group_of(size, stride, processes_per_node)
    return Volume(volume.axis, volume.kind, volume.whole, volume.count, group, volume.beside)


_UNPLACED = Group(1, 1)


@dataclass(frozen=True)
class _Part:
    """What a pipeline rank holds. layers: how many. recomputed: of them, those that are recomputed."""

    layers: int
    recomputed: int
    first: bool
    last: bool

    @classmethod
    def of(cls, shape: ModelShape, section: ParallelSection, pipeline_rank: int) -> _Part:
        count = stage_count(section)
        partition = partition_layers(shape, count, shape.max_position_embeddings)
        numbers = stage_numbers(section, pipeline_rank)
        held = [len(partition[number]) for number in numbers]
        limit = section.recompute_layers
        again = [] if section.recompute == "none" else [n if limit is None else min(n, limit) for n in held]
        return cls(sum(held), sum(again), 0 in numbers, count - 1 in numbers)


def _tensor_volumes(
    shape: ModelShape,
    section: ParallelSection,
    layout: Layout,
    train: TrainSection,
    tokens: int,
    part: _Part,
    microbatches: int,
) -> list[Volume]:
    """tokens: rows x positions of a microbatch on one context rank."""
    if layout.tensor == 1:
        return []
    stream = tokens * shape.hidden_size * COMPUTE_BYTES[train.precision]
    wide = 8 if train.precision == "fp64" else 4
    split, again = splits_backward(section), _runs_again(section) * part.recomputed
    # A layer that is made again stops where everything that was forgotten is there: at its last product, unless what
    # the product's sum goes into is needed, too.
    ends = again if shape.norms_after or shape.hidden_dropout else 0
    counts: dict[tuple[Kind, Beside], int] = {}
    if section.sequence:
        counts["all-gather", ""] = 4 * part.layers + 2 * again + part.first + part.last
        counts["all-gather", "input gradients"] = 0 if split else 2 * part.layers
        counts["reduce-scatter", ""] = 2 * part.layers + again + ends + part.first + part.last
        counts["reduce-scatter", "" if split else "weight gradients"] = 2 * part.layers
        if split:
            counts["reduce-scatter", ""] = 4 * part.layers + again + ends + part.first + part.last
    else:
        beside: Beside = "" if split else "weight gradients"
        counts["all-reduce", beside] = 2 * part.layers
        counts["all-reduce", ""] = counts.get(("all-reduce", ""), 0) + 2 * part.layers + again + ends
        counts["all-reduce", ""] += part.first + part.last
    made = [
        Volume("tensor", kind, stream, microbatches * count, _UNPLACED, beside)
        for (kind, beside), count in counts.items()
    ]
    if shape.qk_norm == "width":
        norms = microbatches * (2 * part.layers + again)
        made.append(Volume("tensor", "all-reduce", 2 * tokens * wide, norms, _UNPLACED))
    if part.last:
        numbers = 4 if train.label_smoothing else 3
        made.append(Volume("tensor", "all-gather", tokens * layout.tensor * numbers * wide, microbatches, _UNPLACED))
    return made


def _runs_again(section: ParallelSection) -> bool:
    """Whether recompute goes through a layer's collectives again."""
    return section.recompute == "full" or (
        section.recompute == "selective" and section.recompute_policy == "operations"
    )


def _context_volumes(
    shape: ModelShape,
    section: ParallelSection,
    layout: Layout,
    train: TrainSection,
    tokens: int,
    part: _Part,
    microbatches: int,
) -> list[Volume]:
    if layout.context == 1:
        return []
    heads, groups = heads_here(shape, layout.tensor)
    each = tokens * shape.head_dim * COMPUTE_BYTES[train.precision]
    passes = microbatches * part.layers
    # Made again, attention stops behind its kernel, before the outputs are exchanged; a whole layer goes on.
    again, whole = microbatches * part.recomputed, microbatches * part.recomputed * _runs_again(section)
    if gathers_keys(section, shape):
        gathered = layout.context * 2 * groups * each
        return [
            Volume("context", "all-gather", gathered, passes + again, _UNPLACED),
            Volume("context", "all-to-all", gathered, passes, _UNPLACED),
        ]
    return [
        Volume("context", "all-to-all", (heads + 2 * groups) * each, 2 * passes + again, _UNPLACED),
        Volume("context", "all-to-all", heads * each, 2 * passes + whole, _UNPLACED),
    ]


def _pipeline_volumes(
    shape: ModelShape,
    section: ParallelSection,
    layout: Layout,
    train: TrainSection,
    tokens: int,
    pipeline_rank: int,
    microbatches: int,
) -> list[Volume]:
    """Hidden states to the next stage and gradients to the one before, where another rank holds it."""
    if layout.pipeline == 1:
        return []
    cut = layout.context * (layout.tensor if section.sequence else 1)
    hidden = tokens // cut * shape.hidden_size * COMPUTE_BYTES[train.precision]
    count, owned = stage_count(section), set(stage_numbers(section, pipeline_rank))
    onward = sum(1 for number in owned if number + 1 < count and number + 1 not in owned)
    back = sum(1 for number in owned if number > 0 and number - 1 not in owned)
    beside: Beside = "" if section.schedule == "1f1b" else "backward"
    return [Volume("pipeline", "send", hidden, microbatches * (onward + back), _UNPLACED, beside)]
