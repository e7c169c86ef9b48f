"""What each rank of a layout holds between steps, to the byte, from the model's shape alone (engine torch).

`benchmarks/layout_1024.py` and its test compare these numbers with the real tensors of every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.config.layout import Layout
from megatron.config.model_shape import ModelShape
from megatron.config.partition import partition_layers, stage_count, stage_numbers
from megatron.config.schema import OptimizerSection, ParallelSection
from megatron.planner.in_flight import in_transit

_STEP_BYTES = 4  # the optimizer's count of steps, float32, beside every tensor


@dataclass(frozen=True)
class HeldTensor:
    """A parameter as one tensor rank holds it: its first dimension, which data ranks share out, and the others'
    product. matrix: of a layer, which Muon takes."""

    name: str
    rows: int
    width: int
    matrix: bool

    def elements(self, shards: int, shard: int) -> int:
        """Held by one of `shards` data ranks: whole rows, as torch.chunk shares them out."""
        each = -(-self.rows // shards)
        return max(0, min(each, self.rows - shard * each)) * self.width


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank: master weights, their gradients as they are before the update, optimizer state."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class StepBytes:
    """What one rank holds besides while a step runs, without activations: weights gathered to compute with, and
    gradients added up over microbatches before the data ranks reduce them."""

    gathered: int
    accumulated: int


def step_bytes(
    shape: ModelShape,
    section: ParallelSection,
    layout: Layout,
    precision: str,
    pipeline_rank: int,
    split_masters: bool = False,
) -> StepBytes:
    """Of one rank with the torch engine and several microbatches a step.

    Weights are gathered layer by layer where `full` shards them, two layers at a time and what is around them; else,
    and always under a pipeline (torch keeps a stage's weights until its last microbatch), all at once. Where gradients
    are reduced only at the step's end they are whole until then, in the masters' dtype. precision: "auto" as bf16.
    split_masters: what computes is a half of the masters, and no memory besides.
    """
    stages = rank_tensors(shape, section, pipeline_rank)
    groups: dict[str, int] = {}
    for number, stage in enumerate(stages):
        for item in stage:
            parts = item.name.split(".")
            group = ".".join(parts[:2]) if parts[0] == "layers" else f"around stage {number}"
            groups[group] = groups.get(group, 0) + item.rows * item.width
    by_layer = section.data_shard == "full" and layout.pipeline == 1
    layers = sorted((size for name, size in groups.items() if name.startswith("layers.")), reverse=True)
    around = sum(size for name, size in groups.items() if name.startswith("around"))
    at_once = around + sum(layers[:2] if by_layer else layers)
    late = section.data_shard in ("none", "optimizer") or layout.pipeline > 1
    narrow, wide = {"fp64": (8, 8), "fp32": (4, 4)}.get(precision, (2, 4))
    shared = layout.shard > 1  # else the gradients of `RankBytes` are these
    return StepBytes(0 if split_masters else narrow * at_once, wide * (around + sum(layers)) if late and shared else 0)


def receive_bytes(
    section: ParallelSection, layout: Layout, width: int, precision: str, rows: int, length: int, microbatches: int
) -> int:
    """Hidden states and their gradients on their way between stages, of any pipeline rank at most: received into before
    they are needed, or sent and not yet known to have arrived (`in_flight.in_transit`). Those that passes in flight
    have read or made are activations.

    width: of the hidden states. rows: of a microbatch, each of `length` positions. microbatches: of a step.
    """
    each = {"fp64": 8, "fp32": 4}.get(precision, 2)
    cut = layout.context * (layout.tensor if section.sequence else 1)
    virtual = stage_count(section) // layout.pipeline
    most = max(
        in_transit(section.schedule, layout.pipeline, virtual, rank, microbatches) for rank in range(layout.pipeline)
    )
    return most * rows * (length // cut) * width * each


def stage_tensors(shape: ModelShape, tensor: int, layers: range, first: bool, last: bool) -> Iterator[HeldTensor]:
    """Every parameter of one pipeline stage on one tensor rank."""
    hidden, words = shape.hidden_size, shape.padded_vocab_size // tensor
    tied = shape.tie_word_embeddings
    if first or (last and tied):
        yield HeldTensor("embedding.weight", words, hidden, matrix=False)
    if first and shape.position_embedding == "learned":
        yield HeldTensor("positions.weight", shape.max_position_embeddings, hidden, matrix=False)
    for number in layers:
        yield from layer_tensors(shape, tensor, f"layers.{number}")
    if last:
        yield from _norm(shape, "final_norm")
        if not tied:
            yield HeldTensor("head.weight", words, hidden, matrix=False)


def layer_tensors(shape: ModelShape, tensor: int, name: str) -> Iterator[HeldTensor]:
    """Every parameter of one layer on one tensor rank; name: "layers." and its number."""
    hidden, inner = shape.hidden_size, shape.intermediate_size // tensor
    query = shape.num_attention_heads * shape.head_dim // tensor
    groups = shape.num_key_value_heads
    # Where there are fewer key-value heads than ranks, every rank holds all of them.
    key_value = shape.head_dim * (groups // tensor if groups >= tensor else groups)
    if shape.norms_before:
        yield from _norm(shape, f"{name}.attention_norm")
    yield from _linear(f"{name}.attention.query", query, hidden, shape.projection_bias)
    yield from _linear(f"{name}.attention.key", key_value, hidden, shape.projection_bias)
    yield from _linear(f"{name}.attention.value", key_value, hidden, shape.projection_bias)
    if shape.qk_norm != "none":
        each = shape.qk_norm == "head"
        yield HeldTensor(f"{name}.attention.query_norm.weight", shape.head_dim if each else query, 1, matrix=False)
        yield HeldTensor(f"{name}.attention.key_norm.weight", shape.head_dim if each else key_value, 1, matrix=False)
    yield from _linear(f"{name}.attention.output", hidden, query, shape.attention_bias)
    if shape.norms_after:
        yield from _norm(shape, f"{name}.attention_after_norm")
    if shape.norms_before and not shape.shared_norm:
        yield from _norm(shape, f"{name}.mlp_norm")
    if shape.gated_mlp:
        yield from _linear(f"{name}.mlp.gate", inner, hidden, shape.mlp_bias)
    yield from _linear(f"{name}.mlp.up", inner, hidden, shape.mlp_bias)
    yield from _linear(f"{name}.mlp.down", hidden, inner, shape.mlp_bias)
    if shape.norms_after:
        yield from _norm(shape, f"{name}.mlp_after_norm")


def _linear(name: str, rows: int, width: int, bias: bool) -> Iterator[HeldTensor]:
    yield HeldTensor(f"{name}.weight", rows, width, matrix=True)
    if bias:
        yield HeldTensor(f"{name}.bias", rows, 1, matrix=False)


def _norm(shape: ModelShape, name: str) -> Iterator[HeldTensor]:
    yield HeldTensor(f"{name}.weight", shape.hidden_size, 1, matrix=False)
    if shape.norm == "layernorm":
        yield HeldTensor(f"{name}.bias", shape.hidden_size, 1, matrix=False)


def rank_tensors(shape: ModelShape, section: ParallelSection, pipeline_rank: int) -> list[list[HeldTensor]]:
    """The parameters of a pipeline rank, by stage, as each of its tensor ranks holds them."""
    count = stage_count(section)
    partition = partition_layers(shape, count, shape.max_position_embeddings)
    return [
        list(stage_tensors(shape, section.tensor, partition[number], number == 0, number == count - 1))
        for number in stage_numbers(section, pipeline_rank)
    ]


def rank_bytes(
    shape: ModelShape,
    section: ParallelSection,
    layout: Layout,
    optimizer: OptimizerSection,
    precision: str,
    pipeline_rank: int,
    shard: int = 0,
) -> RankBytes:
    """Of one rank; shard: its place among the ranks that parameters are cut over, the first holding the most.

    precision: masters are float64 for fp64, else float32. Weights gathered to compute with, and activations, come on
    top.
    """
    tensors = [item for stage in rank_tensors(shape, section, pipeline_rank) for item in stage]
    shards = layout.shard * layout.context if layout.shard > 1 else 1
    wide = 8 if precision == "fp64" else 4
    held = sum(item.elements(shards, shard) for item in tensors)
    state = sum(state_bytes_of(item, item.elements(shards, shard), optimizer, wide) for item in tensors)
    return RankBytes(wide * held, wide * held, state)


def state_bytes_of(item: HeldTensor, elements: int, optimizer: OptimizerSection, wide: int) -> int:
    """Bytes of the optimizer's state beside so many elements of a parameter whose masters have `wide` bytes each."""
    if optimizer.name == "sgd":
        return wide * elements if optimizer.momentum else 0
    if optimizer.name == "muon" and item.matrix:
        return wide * elements
    return 2 * wide * elements + _STEP_BYTES
