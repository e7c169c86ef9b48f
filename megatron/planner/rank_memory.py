"""The most memory that one rank holds during an optimizer step, and what it is made of. Free of torch.

A step's fullest moment is one of four, and the planner takes the fullest of them:

    loss       the last forward pass of those in flight has come to the logits; activations of all of them are kept
    backward   its first (topmost) layer runs backward, with a recomputed layer's activations where layers recompute
    gradients  its last layers and the embedding have run backward: nothing is kept, all gradients are there
    update     the optimizer has its copies beside masters, gradients and moments

What torch's engine holds between steps is exact (`layout_bytes.py`, `state_bytes.py`), and so is what a forward pass
keeps (`activation_bytes.py`); short-lived tensors of backward passes are counted by the few largest of them.
`benchmarks/planner_memory.py` compares totals with real steps. DeepSpeed's buffers are estimated by its documentation.

What no tensor is made of (a CUDA context, NCCL's buffers, the allocator's gaps) is kept apart: `device_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megatron.config.layout import Layout
from megatron.config.layout_checks import BatchShape
from megatron.config.model_shape import ModelShape
from megatron.config.partition import partition_layers, stage_count, stage_numbers
from megatron.config.schema import KernelsSection, OptimizerSection, ParallelSection, TrainSection
from megatron.planner.activation_bytes import (
    backward_bytes,
    embedding_backward_bytes,
    loss_gradient_bytes,
    loss_kept_bytes,
    loss_peak_bytes,
    pending_bytes,
    stage_bytes,
    stream_bytes,
)
from megatron.planner.forward_pass import DeviceKind, ForwardPass, forward_pass
from megatron.planner.in_flight import in_transit, microbatches_in_flight
from megatron.planner.state_bytes import StateBytes, state_bytes

CONTEXT_BYTES = 1 << 30
"""Allowance for a CUDA context with its kernels and its libraries' workspaces. An assumption, measured on no GPU."""
COMMUNICATOR_BYTES = 512 << 20
"""Allowance for NCCL's buffers, for each kind of group that a rank is in. An assumption, measured on no GPU: NCCL's
documentation gives 4 MiB a buffer (NCCL_BUFFSIZE), and a group has some for each of up to 32 channels."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at its fullest moment.

    parameters: master weights. gradients: as the optimizer reads them. optimizer: moments and steps. gathered: weights
    to compute with: copies, casts to 8 bits, what FSDP2 or ZeRO has gathered. accumulated: gradients that wait to be
    reduced over the data ranks or to be widened. receive: hidden states and their gradients on their way between
    stages, at most. activations: kept for backward passes of all microbatches in flight.
    logits: of the loss at its peak, with the gradients that it makes forward.
    workspace: short-lived tensors. moment: which it is. host: in the host's memory, by offload; not in the total.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    accumulated: int
    receive: int
    activations: int
    logits: int
    workspace: int
    moment: str = "loss"
    host: int = 0

    @property
    def total(self) -> int:
        """All tensors."""
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.gathered
            + self.accumulated
            + self.receive
            + self.activations
            + self.logits
            + self.workspace
        )

    def device_bytes(self, groups: int = 1, fragmentation: float = 0.05) -> int:
        """What a GPU must have: the total, a margin for the allocator's gaps (a share of the total, a guess that
        `expandable_segments` keeps small), the context, and NCCL's buffers of so many kinds of groups."""
        return round(self.total * (1 + fragmentation)) + CONTEXT_BYTES + groups * COMMUNICATOR_BYTES

    def to_json(self) -> dict[str, int | str]:
        """The fields and the total as JSON values."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"total": self.total}


def communicating_groups(layout: Layout) -> int:
    """Kinds of groups that a rank talks in: an axis each, and all ranks."""
    sizes = (layout.pipeline, layout.data, layout.context, layout.tensor)
    return sum(size > 1 for size in sizes) + (layout.world_size > 1)


def rank_memory(
    shape: ModelShape,
    section: ParallelSection,
    layout: Layout,
    train: TrainSection,
    optimizer: OptimizerSection,
    batch: BatchShape,
    pipeline_rank: int,
    kernels: KernelsSection | None = None,
    device: DeviceKind = "gpu",
) -> RankMemory:
    """Of the fullest rank at a place of the pipeline axis (the first of its data ranks), in a step of one batch.

    kernels: what `[kernels]` says; what it leaves open, and None, are what a device of this kind usually chooses
    (`forward_pass.py`). Of layouts that `check_layout` refuses, numbers mean nothing.
    """
    run = forward_pass(
        shape, section, layout, train.precision, train.micro_batch_size, batch.seq_length, kernels, device
    )
    state = state_bytes(shape, section, layout, train, optimizer, pipeline_rank, kernels)
    microbatches = max(1, batch.global_batch_size // (train.micro_batch_size * layout.data))
    return _fullest(shape, section, layout, run, state, microbatches, pipeline_rank, device)


def _fullest(
    shape: ModelShape,
    section: ParallelSection,
    layout: Layout,
    run: ForwardPass,
    state: StateBytes,
    microbatches: int,
    rank: int,
    device: DeviceKind,
) -> RankMemory:
    rows = microbatches * run.rows * run.length * _BYTES_A_TOKEN if device == "gpu" else 0
    pieces = _stage_pieces(shape, section, run, rank)
    receive = _travelling(shape, section, run, pieces, rank, microbatches)
    flying = _flying(section, run, shape, pieces, rank, microbatches)
    last, first = any(piece.last for piece in pieces), any(piece.first for piece in pieces)
    # A step's first microbatch has no gradients beside it, unless its products add to sums that are there already.
    begun = microbatches * len(pieces) > flying.count
    late = 0 if state.reduced_late else state.gradients
    gradients, waiting = (late, state.accumulated) if begun else (state.prepared, 0)
    base = RankMemory(
        state.parameters, gradients, state.optimizer, state.gathered, waiting, receive, 0, 0, rows, host=state.host
    )
    top = replace(base, activations=flying.kept, workspace=rows + state.gathering)
    backward = replace(
        top,
        moment="backward",
        logits=loss_gradient_bytes(shape, run, begun) if last else 0,
        workspace=top.workspace
        + state.reducing
        + backward_bytes(shape, run, last, state.apart or not begun, state.one_layer),
    )
    moments = [
        backward,
        replace(
            base,
            moment="gradients",
            gradients=state.gradients,
            accumulated=max(state.accumulated, state.narrow_gradients),
            workspace=rows + state.reducing + (embedding_backward_bytes(shape, run) if first else 0),
        ),
        replace(
            base,
            moment="update",
            gradients=state.gradients,
            gathered=state.copies,
            accumulated=0,
            workspace=rows + state.updating,
        ),
    ]
    if last:
        moments.append(replace(top, moment="loss", logits=loss_peak_bytes(shape, run)))
    if not begun and flying.count > 1:
        # As many microbatches as can be in flight: the first has left its gradients when the second runs backward.
        fewer = flying.kept - flying.newest
        moments.append(replace(backward, activations=fewer, gradients=late, accumulated=state.accumulated))
    return max(moments, key=lambda moment: moment.total)


_BYTES_A_TOKEN = 8 + 8 + 4
"""Token, target and document of a position, all microbatches of a step at once."""


@dataclass(frozen=True)
class _Piece:
    """A stage on this rank: what it keeps of a microbatch, and between both halves of a split backward pass besides,
    and which ends of the model it has."""

    kept: int
    pending: int
    first: bool
    last: bool


@dataclass(frozen=True)
class _Flying:
    """kept: of all microbatches in flight. count: of them, on the rank's stages together. newest: of one of them."""

    kept: int
    count: int
    newest: int


def _stage_pieces(shape: ModelShape, section: ParallelSection, run: ForwardPass, rank: int) -> list[_Piece]:
    count = stage_count(section)
    partition = partition_layers(shape, count, shape.max_position_embeddings)
    pieces = []
    for number in stage_numbers(section, rank):
        first, last, layers = number == 0, number == count - 1, partition[number]
        kept = stage_bytes(shape, run, layers, first, last, section.recompute_layers)
        # Its output is held until its backward pass, as is its input.
        kept += stream_bytes(shape, run) * (not last)
        # torch's first stage has nobody to send gradients of inputs to, and computes all in the second half.
        pending = pending_bytes(shape, run, len(layers)) if run.split and not first else 0
        pieces.append(_Piece(kept, pending, first, last))
    return pieces


def _travelling(
    shape: ModelShape, section: ParallelSection, run: ForwardPass, pieces: list[_Piece], rank: int, count: int
) -> int:
    """Hidden states and their gradients on their way, at most."""
    return stream_bytes(shape, run) * in_transit(section.schedule, section.pipeline, len(pieces), rank, count)


def _flying(
    section: ParallelSection, run: ForwardPass, shape: ModelShape, pieces: list[_Piece], rank: int, microbatches: int
) -> _Flying:
    """The dearest moment. A loss in flight keeps its gradients, but that of the newest is counted at its peak."""
    loss = loss_kept_bytes(shape, run)
    best = _Flying(-1, 0, 0)
    for moment in microbatches_in_flight(section.schedule, section.pipeline, len(pieces), rank, microbatches):
        kept = sum(
            held * piece.kept + pending * piece.pending + (max(0, held - 1) * loss if piece.last else 0)
            for held, pending, piece in zip(moment.held, moment.pending, pieces, strict=True)
        )
        if kept > best.kept:
            best = _Flying(kept, sum(moment.held), max(piece.kept for piece in pieces))
    return best
