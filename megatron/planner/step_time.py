"""How long a training step takes on a layout and an accelerator: arithmetic, at rates that programs reach.

A rank's step is its microbatches' products, attention and elementwise operations (`planner/operations.py`), what it
waits for of its communication (`planner/communication.py`), the pipeline's bubble, and the update. The slowest pipeline
rank decides. docs/planner.md has the formulas, and what they give beside published and measured steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import log2
from types import MappingProxyType

from megatron.config.layout import Layout
from megatron.config.layout_checks import BatchShape
from megatron.config.model_shape import ModelShape
from megatron.config.partition import partition_layers, stage_count, stage_numbers
from megatron.config.schema import OptimizerSection, ParallelSection, TrainSection
from megatron.planner.bubble import bubble_fraction
from megatron.planner.communication import volumes
from megatron.planner.data_traffic import gather_counts, rank_elements, reduce_count
from megatron.planner.forward_pass import COMPUTE_BYTES
from megatron.planner.hardware import Accelerator, Efficiency, default_efficiency
from megatron.planner.operations import (
    ADDED_BYTES,
    Operation,
    Rows,
    head_operations,
    layer_operations,
    muon_flops,
    update_bytes,
)
from megatron.planner.volume import Volume

NOTHING: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the slowest pipeline rank, by what they are spent on; they add up to `total`.

    products, attention, memory_bound: forward and backward, of all microbatches. recompute: what is made again.
    bubble: waiting for other pipeline ranks. exposed: by axis, communication that somebody waits for. optimizer: the
    update and the gradient's norm. launch: what the host needs longer than the device. hidden: communication that runs
    beside computation, in none of the others.

    tokens_per_second: of the whole job. mfu_causal, mfu_full: share of the peak in the operations of the model alone,
    6N + 6LdT and 6N + 12LdT a token (`ModelShape.flops_per_token`).
    """

    products: float
    attention: float
    memory_bound: float
    recompute: float
    bubble: float
    optimizer: float
    launch: float
    total: float
    tokens_per_second: float
    tokens_per_second_per_process: float
    mfu_causal: float
    mfu_full: float
    hidden: float = 0.0
    exposed: Mapping[str, float] = field(default_factory=lambda: NOTHING)

    @property
    def communication(self) -> float:
        """Seconds of communication that somebody waits for, of all axes."""
        return sum(self.exposed.values())


@dataclass(frozen=True)
class Work:
    """Seconds of computation by kind; forward and backward passes apart."""

    products: tuple[float, float] = (0.0, 0.0)
    attention: tuple[float, float] = (0.0, 0.0)
    memory: tuple[float, float] = (0.0, 0.0)

    @property
    def forward(self) -> float:
        return self.products[0] + self.attention[0] + self.memory[0]

    @property
    def backward(self) -> float:
        return self.products[1] + self.attention[1] + self.memory[1]

    @property
    def total(self) -> float:
        return self.forward + self.backward


def seconds_of(one: Operation, rows: Rows, head_dim: int, peak: float, device: Accelerator, by: Efficiency) -> float:
    """At least: a product overlaps with its own memory traffic, so that the longer one counts."""
    moving = one.bytes_moved / (device.memory_bandwidth * by.memory)
    if one.kind == "product":
        smaller = 1 + by.half_size * sum(1 / size for size in one.sizes)
        return max(moving, one.flops * smaller / (peak * by.products))
    if one.kind == "attention":
        # Heads of 128 are what rates are published of; FlashAttention's of 64 are 20 % slower.
        smaller = (1 + by.attention_half_length / rows.length) * (1 + 32 / head_dim) / 1.25
        return max(moving, one.flops * smaller / (peak * by.attention))
    return moving


@lru_cache(maxsize=16384)
def layer_work(
    shape: ModelShape, rows: Rows, tensor: int, precision: str, device: Accelerator, by: Efficiency
) -> tuple[Work, Work]:
    """Of one layer, and of the head with its loss; one microbatch on one tensor rank."""
    peak = device.operations(precision)
    works = []
    for operations in (layer_operations(shape, rows, tensor), head_operations(shape, rows, tensor)):
        spent: dict[str, list[float]] = {"product": [0.0, 0.0], "attention": [0.0, 0.0], "memory": [0.0, 0.0]}
        for one in operations:
            seconds = seconds_of(one, rows, shape.head_dim, peak, device, by)
            forward = {"forward": 1.0, "backward": 0.0, "both": 1 / 3 if one.kind == "product" else 1 / 2}[one.when]
            spent[one.kind][0] += forward * seconds
            spent[one.kind][1] += (1 - forward) * seconds
        kinds = ((spent[kind][0], spent[kind][1]) for kind in ("product", "attention", "memory"))
        works.append(Work(*kinds))
    return works[0], works[1]


def message_seconds(volume: Volume, device: Accelerator, by: Efficiency) -> float:
    """Of all of a step's messages of one kind, if nothing else is sent: by rings that use every device's link and
    network card. A ring over k devices a node leaves the node through k cards; an exchange through the sender's own."""
    size, near = volume.group.size, volume.group.per_node
    link, network = device.link_bandwidth * by.links, device.network_bandwidth * by.network
    each = volume.bytes_each
    if volume.inside_node:
        seconds = each / link
    elif volume.kind == "send":
        seconds = each / network
    elif volume.kind == "all-to-all":
        seconds = max(each / link, volume.whole * (size - near) / size / network)
    else:
        seconds = max(each / link, each / (near * network))
    return volume.count * (seconds + volume.parts * by.latency * log2(max(2, size)))


@dataclass(frozen=True)
class _Rank:
    """A pipeline rank: layers it holds, those that it recomputes, and which ends of the model."""

    number: int
    layers: int
    recomputed: int
    first: bool
    last: bool


@lru_cache(maxsize=4096)
def _ranks(shape: ModelShape, section: ParallelSection) -> tuple[_Rank, ...]:
    count = stage_count(section)
    partition = partition_layers(shape, count, shape.max_position_embeddings)
    found = []
    for rank in range(section.pipeline):
        numbers = stage_numbers(section, rank)
        held = [len(partition[number]) for number in numbers]
        limit = section.recompute_layers
        again = sum(held if limit is None else (min(limit, n) for n in held)) if section.recompute != "none" else 0
        found.append(_Rank(rank, sum(held), again, 0 in numbers, count - 1 in numbers))
    return tuple(found)


def _made_again(section: ParallelSection, layer: Work) -> float:
    """Seconds of one layer's recompute, one microbatch."""
    if section.recompute == "none":
        return 0.0
    if section.recompute == "full":
        return layer.forward
    return layer.memory[0] if section.recompute_policy == "operations" else layer.attention[0]


def step_time(
    shape: ModelShape,
    section: ParallelSection,
    layout: Layout,
    train: TrainSection,
    optimizer: OptimizerSection,
    batch: BatchShape,
    accelerator: Accelerator,
    efficiency: Efficiency | None = None,
) -> StepTime:
    """Of a layout that `refusals` passes. precision "auto" counts as bf16. Rows are taken to be one document each:
    shorter ones make attention cheaper.
    """
    by = efficiency or default_efficiency(accelerator)
    microbatches = batch.global_batch_size // layout.data // train.micro_batch_size
    tokens = train.micro_batch_size * (batch.seq_length // layout.context)
    residual = tokens // (layout.tensor if section.sequence else 1)
    rows = Rows(tokens, residual, batch.seq_length, COMPUTE_BYTES[train.precision])
    layer, head = layer_work(shape, rows, layout.tensor, train.precision, accelerator, by)
    again = _made_again(section, layer)
    embedding = 4 * residual * shape.hidden_size * rows.narrow / (accelerator.memory_bandwidth * by.memory)

    ranks = _ranks(shape, section)
    costs = [r.layers * layer.total + r.recomputed * again + r.last * head.total + r.first * embedding for r in ranks]
    slowest = max(ranks, key=lambda rank: costs[rank.number])
    weights = _weight_seconds(shape, section, layout, slowest.number, microbatches, accelerator, by)
    mine = _Spent.of(slowest, layer, head, microbatches, embedding + weights, again)
    sent = volumes(shape, section, layout, train, batch, slowest.number, accelerator.processes_per_node)
    exposed, hidden = _exposed(sent, mine, microbatches, slowest, layer, accelerator, by)

    waiting = bubble_fraction(section.schedule, section.pipeline, section.virtual, microbatches)
    within = exposed.get("tensor", 0.0) + exposed.get("context", 0.0)
    mean = (mine.total + within) * sum(costs) / len(costs) / costs[slowest.number]
    bubble = float(waiting / (1 - waiting)) * mean
    update = _update_seconds(shape, section, layout, train, optimizer, slowest.number, accelerator, by)
    device_seconds = mine.total + sum(exposed.values()) + update
    launch = max(0.0, by.layer_launch * microbatches * slowest.layers - device_seconds)
    total = device_seconds + bubble + launch
    parts = {
        "products": mine.products,
        "attention": mine.attention,
        "memory_bound": mine.memory,
        "recompute": mine.recompute,
        "bubble": bubble,
        "optimizer": update,
        "launch": launch,
        "hidden": hidden,
    }
    return _result(shape, layout, train, batch, accelerator, by, parts, exposed, total)


def _result(
    shape: ModelShape,
    layout: Layout,
    train: TrainSection,
    batch: BatchShape,
    accelerator: Accelerator,
    by: Efficiency,
    parts: Mapping[str, float],
    exposed: Mapping[str, float],
    total: float,
) -> StepTime:
    seconds = total * by.step
    rate = batch.seq_length * batch.global_batch_size / seconds
    peak = accelerator.operations(train.precision) * layout.world_size
    causal, full = _model_operations(shape, batch.seq_length)
    return StepTime(
        **{name: value * by.step for name, value in parts.items()},
        exposed={axis: value * by.step for axis, value in exposed.items()},
        total=seconds,
        tokens_per_second=rate,
        tokens_per_second_per_process=rate / layout.world_size,
        mfu_causal=rate * causal / peak,
        mfu_full=rate * full / peak,
    )


@lru_cache(maxsize=1024)
def _model_operations(shape: ModelShape, length: int) -> tuple[int, int]:
    """A token's, by both conventions."""
    return shape.flops_per_token(length, causal=True), shape.flops_per_token(length, causal=False)


@dataclass(frozen=True)
class _Spent:
    """Seconds of a rank's computation in a step. forward, backward: of one microbatch, all its layers."""

    products: float
    attention: float
    memory: float
    recompute: float
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.memory + self.recompute

    @classmethod
    def of(cls, rank: _Rank, layer: Work, head: Work, microbatches: int, besides: float, again: float) -> _Spent:
        """besides: memory traffic of a microbatch that belongs to no layer."""
        n, last = rank.layers, float(rank.last)
        return cls(
            microbatches * (n * sum(layer.products) + last * sum(head.products)),
            microbatches * n * sum(layer.attention),
            microbatches * (n * sum(layer.memory) + last * sum(head.memory) + besides),
            microbatches * rank.recomputed * again,
            n * layer.forward,
            n * layer.backward + rank.recomputed * again,
        )


def _exposed(
    sent: list[Volume],
    mine: _Spent,
    microbatches: int,
    rank: _Rank,
    layer: Work,
    device: Accelerator,
    by: Efficiency,
) -> tuple[dict[str, float], float]:
    """(by axis, seconds that are waited for; seconds that are hidden). What runs beside computation is hidden by it up
    to `by.overlap`."""
    # Half of a backward pass's products are gradients of inputs, half of weights; those of maps that read the residual
    # stream, more than half of each, are what gathers and sums run beside.
    half = microbatches * rank.layers * layer.products[1] / 4
    left = {"input gradients": half, "weight gradients": half, "forward": 0.0, "backward": 0.0}
    exposed: dict[str, float] = {}
    hidden = 0.0
    for volume in sent:
        seconds = message_seconds(volume, device, by)
        if volume.beside in ("forward", "backward"):
            each = mine.forward if volume.beside == "forward" else mine.backward
            room = each * min(volume.count, microbatches)
            if volume.axis == "data" and volume.beside == "backward":
                room -= left["backward"]  # both gathers and sums run there
        else:
            room = left.get(volume.beside, 0.0)
        behind = by.overlap * min(seconds, max(0.0, room))
        if volume.axis == "data" and volume.beside == "backward":
            left["backward"] += behind
        hidden += behind
        exposed[volume.axis] = exposed.get(volume.axis, 0.0) + seconds - behind
    return exposed, hidden


def _weight_seconds(
    shape: ModelShape,
    section: ParallelSection,
    layout: Layout,
    pipeline_rank: int,
    microbatches: int,
    device: Accelerator,
    by: Efficiency,
) -> float:
    """Memory traffic of a microbatch for weights and their gradients: narrow gradients added to wide sums, or copied to
    be reduced; gathered weights copied to where they compute."""
    elements = sum(stage.total for stage in rank_elements(shape, section, layout, pipeline_rank))
    late = reduce_count(section, microbatches) == 1
    moved = float(ADDED_BYTES if late else 6) * elements
    if layout.world_size > 1:
        moved += 4 * elements * sum(gather_counts(section, microbatches)) / microbatches
    return moved / (device.memory_bandwidth * by.memory)


def _update_seconds(
    shape: ModelShape,
    section: ParallelSection,
    layout: Layout,
    train: TrainSection,
    optimizer: OptimizerSection,
    pipeline_rank: int,
    device: Accelerator,
    by: Efficiency,
) -> float:
    """Of the update and of the norm before it."""
    shards = layout.shard * layout.context if layout.shard > 1 else 1
    stages = rank_elements(shape, section, layout, pipeline_rank)
    held = sum(stage.total for stage in stages) / shards
    wide = 8 if train.precision == "fp64" else 4
    copy = 2 if layout.world_size == 1 and train.precision in ("bf16", "auto") else 0
    moved = held * (update_bytes(optimizer, wide, copy) + wide)
    seconds = moved / (device.memory_bandwidth * by.memory)
    if optimizer.name == "muon":
        h, f = shape.hidden_size, shape.intermediate_size
        query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        each = 2 * muon_flops(query, h) + 2 * muon_flops(key, h) + (3 if shape.gated_mlp else 2) * muon_flops(h, f)
        seconds += sum(stage.layers for stage in stages) * each / (device.peak_flops * by.products)
    return seconds
