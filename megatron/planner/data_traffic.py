"""What data ranks send in a training step: FSDP2's gathers and sums of weights and gradients; a step's last sums."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron.config.layout import Layout
from megatron.config.layout_checks import BatchShape
from megatron.config.model_shape import ModelShape
from megatron.config.partition import partition_layers, stage_count, stage_numbers
from megatron.config.schema import ParallelSection, TrainSection
from megatron.planner.forward_pass import COMPUTE_BYTES
from megatron.planner.layout_bytes import HeldTensor, stage_tensors
from megatron.planner.volume import Beside, Volume, group_of


@dataclass(frozen=True)
class DataRanks:
    """Ranks that add up gradients, as FSDP2 sees them: context ranks have parts of the same samples. shards: over which
    parameters are cut. replicas: how many such groups there are. stride: between neighbours of a group of shards."""

    shards: int
    replicas: int
    stride: int

    @classmethod
    def of(cls, layout: Layout) -> DataRanks:
        """As `parallel/mesh.py` lays them out."""
        if layout.shard == 1:
            return cls(1, layout.replicate * layout.context, layout.tensor)
        return cls(layout.shard * layout.context, layout.replicate, layout.tensor)


@dataclass(frozen=True)
class StageElements:
    """Of one stage on one tensor rank, every parameter's rows rounded up to the data ranks: elements of one layer, and
    of what is around the layers (embedding, positions, last norm, head)."""

    layer: int
    layers: int
    around: int

    @property
    def total(self) -> int:
        """Of the stage."""
        return self.layer * self.layers + self.around


@lru_cache(maxsize=4096)
def stage_elements(shape: ModelShape, tensor: int, shards: int, layers: int, first: bool, last: bool) -> StageElements:
    """As FSDP2 gathers and reduces them."""
    layer = sum(_padded(item, shards) for item in stage_tensors(shape, tensor, range(1), False, False))
    around = sum(_padded(item, shards) for item in stage_tensors(shape, tensor, range(0), first, last))
    return StageElements(layer, layers, around)


def _padded(item: HeldTensor, shards: int) -> int:
    return -(-item.rows // shards) * shards * item.width


def rank_elements(
    shape: ModelShape, section: ParallelSection, layout: Layout, pipeline_rank: int
) -> list[StageElements]:
    """Of a pipeline rank's stages."""
    count = stage_count(section)
    partition = partition_layers(shape, count, shape.max_position_embeddings)
    shards = DataRanks.of(layout).shards
    return [
        stage_elements(shape, layout.tensor, shards, len(partition[number]), number == 0, number == count - 1)
        for number in stage_numbers(section, pipeline_rank)
    ]


def data_volumes(
    shape: ModelShape,
    section: ParallelSection,
    layout: Layout,
    train: TrainSection,
    pipeline_rank: int,
    microbatches: int,
    processes_per_node: int,
) -> list[Volume]:
    """Weights are gathered in the dtype that computes, gradients summed in the masters'.

    none: gradients all-reduced once a step. optimizer: weights gathered once, gradients reduce-scattered once.
    gradients: the same, reduced for each microbatch. full: weights gathered for each microbatch besides
    (`gather_counts`). Under a pipeline torch keeps gradients whole until the last microbatch: they are summed once.
    Between replicas of shards the shards' sums are all-reduced, as often as they are made.
    """
    ranks = DataRanks.of(layout)
    stages = rank_elements(shape, section, layout, pipeline_rank)
    wide = 8 if train.precision == "fp64" else 2 if train.gradients == "bf16" else 4
    narrow = COMPUTE_BYTES[train.precision]
    piped = layout.pipeline > 1
    (gathers, again), reduces = gather_counts(section, microbatches), reduce_count(section, microbatches)
    layers, around = sum(s.layer * s.layers for s in stages), sum(s.around for s in stages)
    parts = sum(s.layers for s in stages)
    # FSDP2 gathers a layer's weights while the layer before computes, and sums its gradients while the next does; what
    # is around the layers comes first and last. Under a pipeline all sums are made behind the last backward pass.
    forward: Beside = "forward"
    backward: Beside = "backward"
    late: Beside = "" if piped else "backward"
    found: list[Volume] = []
    if ranks.shards > 1:
        group = group_of(ranks.shards, ranks.stride, processes_per_node)
        found += [
            Volume("data", "all-gather", narrow * layers, gathers, group, forward, parts),
            Volume("data", "all-gather", narrow * layers, again, group, backward, parts),
            Volume("data", "all-gather", narrow * around, gathers + again, group),
            Volume("data", "reduce-scatter", wide * layers, reduces, group, late, parts),
            Volume("data", "reduce-scatter", wide * around, reduces, group),
        ]
    if ranks.replicas > 1:
        group = group_of(ranks.replicas, ranks.stride * ranks.shards, processes_per_node)
        found += [
            Volume("data", "all-reduce", wide * layers // ranks.shards, reduces, group, late, parts),
            Volume("data", "all-reduce", wide * around // ranks.shards, reduces, group),
        ]
    return [one for one in found if one.whole and one.count]


def gather_counts(section: ParallelSection, microbatches: int) -> tuple[int, int]:
    """How often a step gathers weights that are cut over data ranks: (in forward passes, in backward passes).

    full: FSDP2 drops a layer's weights behind each pass, so that each gathers them. Under a pipeline torch keeps them
    behind backward passes: of the m forward passes those that follow a backward pass find them there, and of the m
    backward passes those that follow another; whatever the schedule's order, m + 1 gathers are left.
    """
    if section.data_shard != "full":
        return 1, 0
    return microbatches, microbatches if section.pipeline == 1 else 1


def reduce_count(section: ParallelSection, microbatches: int) -> int:
    """How often a step sums gradients over data ranks."""
    return microbatches if section.data_shard in ("gradients", "full") and section.pipeline == 1 else 1


def end_volumes(
    shape: ModelShape,
    section: ParallelSection,
    layout: Layout,
    train: TrainSection,
    batch: BatchShape,
    pipeline_rank: int,
    processes_per_node: int,
) -> list[Volume]:
    """A step's last sums: partial gradients over tensor ranks, a tied head's over both ends of a pipeline, and over all
    ranks the gradient's norm, the losses of every row, and how many targets count (on the host)."""
    wide = 8 if train.precision == "fp64" else 4
    ranks, count = DataRanks.of(layout), stage_count(section)
    partition = partition_layers(shape, count, shape.max_position_embeddings)
    numbers = stage_numbers(section, pipeline_rank)
    partial = sum(
        _partial(shape, section, len(partition[number]), number == 0, number == count - 1, ranks.shards)
        for number in numbers
    )
    found = []
    if partial:
        group = group_of(layout.tensor, 1, processes_per_node)
        found.append(Volume("tensor", "all-reduce", wide * partial, 1, group))
    ends = layout.pipeline > 1 and section.schedule != "zbv" and pipeline_rank in (0, layout.pipeline - 1)
    if shape.tie_word_embeddings and ends:
        embedding = HeldTensor("", shape.padded_vocab_size // layout.tensor, shape.hidden_size, matrix=False)
        stride = layout.tensor * layout.context * layout.data
        group = group_of(layout.pipeline, stride, processes_per_node)
        found.append(Volume("pipeline", "send", wide * embedding.elements(ranks.shards, 0), 1, group))
    everyone = group_of(layout.world_size, 1, processes_per_node)
    if layout.world_size <= processes_per_node:
        everyone = group_of(layout.world_size, 1, layout.world_size)
    for size in (8, 8, 3 * 8 * batch.global_batch_size):
        found.append(Volume("everyone", "all-reduce", size, 1, everyone))
    return found


@lru_cache(maxsize=4096)
def _partial(shape: ModelShape, section: ParallelSection, layers: int, first: bool, last: bool, shards: int) -> int:
    one = partial_elements(shape, section, range(1), False, False, shards, 0)
    return layers * one + partial_elements(shape, section, range(0), first, last, shards, 0)


def partial_elements(
    shape: ModelShape, section: ParallelSection, layers: range, first: bool, last: bool, shards: int, shard: int
) -> int:
    """Of one stage, elements on one data rank whose gradients are parts of a sum over the tensor ranks: what stands on
    the residual stream, under sequence, and what several tensor ranks hold alike because heads are too few."""
    tensor = section.tensor
    if tensor == 1:
        return 0
    return sum(
        item.elements(shards, shard)
        for item in stage_tensors(shape, tensor, layers, first, last)
        if _is_partial(item.name, shape, section)
    )


def _is_partial(name: str, shape: ModelShape, section: ParallelSection) -> bool:
    _, _, rest = name.partition("layers.")
    owner = rest.partition(".")[2] if rest else name
    if "query_norm" in owner or "key_norm" in owner:
        heads = shape.num_attention_heads if "query_norm" in owner else shape.num_key_value_heads
        return shape.qk_norm == "head" or heads < section.tensor
    if owner.startswith(("attention.key.", "attention.value.")):
        return shape.num_key_value_heads < section.tensor
    stream = "norm" in owner or owner in ("attention.output.bias", "mlp.down.bias", "positions.weight")
    return stream and section.sequence
