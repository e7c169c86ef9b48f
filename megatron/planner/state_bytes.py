"""What a rank holds of weights, gradients and moments during a step, by engine. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron.config.layout import Layout
from megatron.config.model_shape import ModelShape
from megatron.config.partition import partition_layers, stage_count, stage_numbers
from megatron.config.schema import KernelsSection, OptimizerSection, ParallelSection, TrainSection
from megatron.planner.forward_pass import COMPUTE_BYTES
from megatron.planner.layout_bytes import HeldTensor, layer_tensors, stage_tensors, state_bytes_of

ZERO_STAGES = {"none": 0, "optimizer": 1, "gradients": 2, "full": 3}
"""ZeRO stage by parallel.data_shard."""
_WIDENED = 1 << 26
"""Elements of narrow gradients that are widened at once for the optimizer (`engines/torch_engine.py`)."""
_BUCKET = 500_000_000
"""DeepSpeed's default of reduce_bucket_size and allgather_bucket_size, in elements."""
_LIVE, _PREFETCH = 1_000_000_000, 50_000_000
"""DeepSpeed's defaults of stage3_max_live_parameters and stage3_prefetch_bucket_size."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank.

    gathered: to compute with, while microbatches run. copies: of those, what is there during the update too.
    accumulated: gradients that wait to be reduced. narrow_gradients: of one microbatch before they are widened.
    prepared: sums of gradients that are there before the first backward pass. gathering: buffers of gathers and of
    reductions under way, which live on until the next. one_layer: gradients of one layer before they are reduced.
    reducing: buffers of reductions that are there in backward passes alone.
    updating: the optimizer's short-lived tensors. host: in the host's memory. reduced_late: gradients are whole, and
    in `accumulated`, until the step's end. apart: each microbatch's gradients are tensors of their own before they are
    added.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int = 0
    copies: int = 0
    accumulated: int = 0
    narrow_gradients: int = 0
    prepared: int = 0
    gathering: int = 0
    one_layer: int = 0
    reducing: int = 0
    updating: int = 0
    host: int = 0
    reduced_late: bool = False
    apart: bool = False


@dataclass(frozen=True)
class _Count:
    """Elements of parameters on one tensor rank. all: of them; held: by the first of the data ranks that they are cut
    over; matrices: of layers; state: bytes of moments; casts: bytes of casts to 8 bits; largest: of the largest."""

    all: int = 0
    held: int = 0
    matrices: int = 0
    state: int = 0
    casts: int = 0
    largest: int = 0
    largest_matrix: tuple[int, int] = (0, 0)

    def plus(self, other: _Count, times: int = 1) -> _Count:
        """The sum of this and so many of another."""
        return _Count(
            self.all + times * other.all,
            self.held + times * other.held,
            self.matrices + times * other.matrices,
            self.state + times * other.state,
            self.casts + times * other.casts,
            max(self.largest, other.largest if times else 0),
            max(self.largest_matrix, other.largest_matrix if times else (0, 0), key=lambda size: size[0] * size[1]),
        )


def _counted(items: Iterable[HeldTensor], shards: int, wide: int, kind: tuple[str, bool]) -> _Count:
    total = _Count()
    optimizer = OptimizerSection.model_validate({"name": kind[0], "momentum": 0.9 if kind[1] else 0.0})
    for item in items:
        size, here = item.rows * item.width, item.elements(shards, 0)
        total = total.plus(
            _Count(
                size,
                here,
                size * item.matrix,
                state_bytes_of(item, here, optimizer, wide),
                (size + item.width * (-(-item.rows // 16) * 16) + 4) * item.matrix,
                size,
                (item.rows, item.width) if item.matrix else (0, 0),
            )
        )
    return total


@lru_cache(maxsize=4096)
def _layer(shape: ModelShape, tensor: int, shards: int, wide: int, kind: tuple[str, bool]) -> _Count:
    return _counted(layer_tensors(shape, tensor, "layers.0"), shards, wide, kind)


@lru_cache(maxsize=4096)
def _ends(
    shape: ModelShape, tensor: int, shards: int, wide: int, kind: tuple[str, bool], first: bool, last: bool
) -> _Count:
    return _counted(stage_tensors(shape, tensor, range(0), first, last), shards, wide, kind)


@dataclass(frozen=True)
class _Rank:
    """What decides, of one rank. narrow, wide: bytes of an element in the forward pass, and of a master."""

    layer: _Count
    around: _Count
    all: _Count
    narrow: int
    wide: int

    @property
    def parameters(self) -> int:
        return self.wide * self.all.held


def state_bytes(
    shape: ModelShape,
    section: ParallelSection,
    layout: Layout,
    train: TrainSection,
    optimizer: OptimizerSection,
    pipeline_rank: int,
    kernels: KernelsSection | None = None,
) -> StateBytes:
    """Of the first data rank, which holds most. All layers are alike, so that one is counted."""
    narrow = COMPUTE_BYTES[train.precision]
    wide = max(4, narrow)
    shards = layout.shard * layout.context if layout.shard > 1 else 1
    kind = (optimizer.name, optimizer.momentum > 0)
    layer = _layer(shape, section.tensor, shards, wide, kind)
    count = stage_count(section)
    partition = partition_layers(shape, count, shape.max_position_embeddings)
    around, layers = _Count(), 0
    for number in stage_numbers(section, pipeline_rank):
        first, last = number == 0, number == count - 1
        if first or last:
            around = around.plus(_ends(shape, section.tensor, shards, wide, kind, first, last))
        layers += len(partition[number])
    rank = _Rank(layer, around, around.plus(layer, layers), narrow, wide)
    given = kernels or KernelsSection()
    return _ENGINES[section.engine](rank, section, layout, layers, train, optimizer, given)


def _torch(
    rank: _Rank,
    section: ParallelSection,
    layout: Layout,
    layers: int,
    train: TrainSection,
    optimizer: OptimizerSection,
    kernels: KernelsSection,
) -> StateBytes:
    if layout.world_size == 1:
        return _one_process(rank, train, optimizer, kernels)
    return _fsdp(rank, section, layout, layers, optimizer)


def _one_process(rank: _Rank, train: TrainSection, optimizer: OptimizerSection, kernels: KernelsSection) -> StateBytes:
    """`engines/master_weights.py`."""
    every = rank.all
    narrow_gradients = train.gradients == "bf16"
    fused = kernels.weight_gradients == "fused"
    copies = 2 * every.all if rank.narrow == 2 and optimizer.master_weights == "whole" else 0
    copies += every.casts if kernels.fp8 else 0
    apart = every.all - every.matrices if fused else every.all
    return StateBytes(
        parameters=rank.parameters,
        gradients=2 * every.all if narrow_gradients else rank.parameters,
        optimizer=every.state,
        gathered=copies,
        copies=copies,
        apart=rank.narrow == 2 and not fused,
        narrow_gradients=2 * apart if rank.narrow == 2 and not narrow_gradients else 0,
        prepared=4 * every.matrices if fused else 0,
        updating=_updating(rank, optimizer, narrow_gradients),
    )


def _fsdp(
    rank: _Rank, section: ParallelSection, layout: Layout, layers: int, optimizer: OptimizerSection
) -> StateBytes:
    """`engines/sharded_weights.py`. Under `full` without a pipeline layers come and go: two are there at once."""
    by_layer = section.data_shard == "full" and layout.pipeline == 1
    late = section.data_shard in ("none", "optimizer") or layout.pipeline > 1
    at_once = rank.around.all + rank.layer.all * (min(2, layers) if by_layer else layers)
    shared = layout.shard > 1
    return StateBytes(
        parameters=rank.parameters,
        gradients=rank.parameters,
        optimizer=rank.all.state,
        gathered=rank.narrow * at_once,
        accumulated=rank.wide * rank.all.all if late and shared else 0,
        gathering=0 if late else rank.wide * rank.layer.all,
        one_layer=0 if late else rank.wide * rank.layer.all,
        reduced_late=late and shared,
        apart=True,
        updating=_updating(rank, optimizer, narrow_gradients=False),
    )


def _deepspeed(rank: _Rank, section: ParallelSection, *_: Any) -> StateBytes:
    """Estimated by DeepSpeed's documentation of ZeRO, and held against steps of two ranks: masters and moments cut over
    the data ranks; all weights in the compute dtype beside them, under stage 3 cut as well and at most
    `stage3_max_live_parameters` of them gathered; gradients added up in float32, whole until the last microbatch under
    stage 1, beside their partition. A bucket of them, in float32, is there while they are reduced, under 3 always.
    What `deepspeed_config` says of these sizes is not read.
    """
    every, held, stage = rank.all, rank.parameters, ZERO_STAGES[section.data_shard]
    bucket = 4 * min(_BUCKET, every.all)
    if stage == 0:
        copies = 2 * every.all if rank.narrow == 2 else 0
        return StateBytes(held, held, every.state, copies, copies, reducing=bucket, apart=True)
    weights = rank.narrow * every.all
    if stage == 3:
        weights = rank.narrow * (every.held + min(_LIVE + _PREFETCH, every.all))
    offloaded = section.offload == "optimizer"
    return StateBytes(
        parameters=0 if offloaded else held,
        gradients=0 if offloaded else held,
        optimizer=0 if offloaded else every.state,
        gathered=weights,
        copies=weights,
        accumulated=4 * every.all if stage == 1 else 0,
        apart=True,
        gathering=bucket if stage == 3 else 0,
        reducing=bucket if stage < 3 else 0,
        host=2 * held + every.state if offloaded else 0,
    )


_ENGINES: dict[str, Callable[..., StateBytes]] = {"torch": _torch, "deepspeed": _deepspeed}


def _updating(rank: _Rank, optimizer: OptimizerSection, narrow_gradients: bool) -> int:
    """Short-lived tensors of the update: none for fused AdamW; of gradients that are widened for it, some at a time;
    a copy of the largest tensor for SGD's decay; for Muon of its largest matrix the momentum's look-ahead and five
    Newton-Schulz steps in bfloat16 (the matrix thrice, and three squares of its smaller side)."""
    if narrow_gradients:
        return 4 * min(rank.all.all, _WIDENED + rank.all.largest)
    if optimizer.name == "sgd":
        return rank.wide * rank.all.largest
    if optimizer.name == "muon":
        rows, width = rank.all.largest_matrix
        return 2 * rank.wide * rows * width + 2 * (3 * rows * width + 3 * min(rows, width) ** 2)
    return 0
