"""Operations of a training step on one rank: what they multiply and what they move, by arithmetic. Nothing is measured.

Bytes count every tensor that must be read or written once; operations count multiplications and additions of matrix
products. `benchmarks/roofline.py` prints these as limits, `planner/step_time.py` adds them up at the rates that are
reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron.config.model_shape import ModelShape
from megatron.config.schema import OptimizerSection
from megatron.planner.forward_pass import heads_here

Pass = Literal["forward", "backward", "both"]


@dataclass(frozen=True)
class Operation:
    """flops: of matrix products. bytes_moved: read and written. kind: what bounds it. sizes: m, k, n of a product
    [m, k] x [k, n] (of each, where there are several), () for none. when: in which pass."""

    name: str
    flops: float
    bytes_moved: float
    kind: Literal["product", "attention", "memory"]
    when: Pass
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rows:
    """A microbatch on one rank. tokens: rows x positions that its matrices see. residual: that its residual stream has.
    length: positions of a whole row. narrow: bytes of a number that computes."""

    tokens: int
    residual: int
    length: int
    narrow: int = 2


def layer_operations(shape: ModelShape, rows: Rows, tensor: int = 1) -> Iterator[Operation]:
    """Of one layer, one microbatch. Query, key and value are one product, and gate and up (in one process they are;
    over several ranks their sizes are so much the smaller, which nobody has measured)."""
    yield from _products(shape, rows, tensor)
    yield from _attention(shape, rows, tensor)
    yield from _elementwise(shape, rows, tensor)


def _products(shape: ModelShape, rows: Rows, tensor: int) -> Iterator[Operation]:
    h, f = shape.hidden_size, shape.intermediate_size // tensor
    heads, groups = heads_here(shape, tensor)
    query, key = heads * shape.head_dim, groups * shape.head_dim
    tokens, e = rows.tokens, rows.narrow
    for name, inputs, outputs in (
        ("query, key, value", h, query + 2 * key),
        ("attention output", query, h),
        ("gate, up", h, 2 * f) if shape.gated_mlp else ("up", h, f),
        ("down", f, h),
    ):
        flops, moved = 2.0 * tokens * inputs * outputs, e * (tokens * (inputs + outputs) + inputs * outputs)
        sizes = (tokens, inputs, outputs)
        yield Operation(f"{name}: product", flops, moved, "product", "forward", sizes)
        yield Operation(f"{name}: both gradients", 2 * flops, 2 * moved, "product", "backward", sizes)


def _attention(shape: ModelShape, rows: Rows, tensor: int) -> Iterator[Operation]:
    heads, groups = heads_here(shape, tensor)
    query, key = heads * shape.head_dim, groups * shape.head_dim
    attended = shape.attended_lengths(rows.length) / shape.num_hidden_layers
    pairs = 2.0 * rows.tokens * attended * query  # half of the square: 2 products x 2 operations / 2
    moved = rows.narrow * rows.tokens * (2 * query + 2 * key)
    yield Operation("attention, forward", pairs, moved, "attention", "forward")
    yield Operation("attention, backward", 2.5 * pairs, 2 * moved, "attention", "backward")


def _elementwise(shape: ModelShape, rows: Rows, tensor: int) -> Iterator[Operation]:
    """Each kind in one pass over memory, as fused kernels do it."""
    h, f = shape.hidden_size, shape.intermediate_size // tensor
    heads, groups = heads_here(shape, tensor)
    turned = (heads + groups) * shape.head_dim
    residual, tokens = rows.residual * rows.narrow, rows.tokens * rows.narrow
    kinds: list[tuple[str, float, Pass]] = []
    if shape.shared_norm:
        kinds += [("norm of both, forward", residual * 2 * h, "forward")]
        kinds += [("norm of both, backward", residual * 6 * h, "backward")]  # the sum of two gradients among it
    elif shape.norms_before:
        kinds += [("norm + add and norm, forward", residual * 6 * h, "forward")]
        kinds += [("norm + add and norm, backward", residual * 8 * h, "backward")]
    if shape.norms_after:
        kinds += [("norms behind, forward", residual * 4 * h, "forward")]
        kinds += [("norms behind, backward", residual * 6 * h, "backward")]
    kinds += [("residual addition", residual * (6 if shape.shared_norm else 3) * h, "forward")]
    if shape.qk_norm != "none":
        kinds += [("norms of queries and keys, forward", tokens * 2 * turned, "forward")]
        kinds += [("norms of queries and keys, backward", tokens * 3 * turned, "backward")]
    if shape.position_embedding == "rope":
        kinds += [("rotary positions, forward and backward", tokens * 4 * turned, "both")]
    gated, words = (3, "gated activation") if shape.gated_mlp else (2, "activation")
    kinds += [(f"{words}, forward", tokens * gated * f, "forward")]
    kinds += [(f"{words}, backward", tokens * (5 if shape.gated_mlp else 3) * f, "backward")]
    if shape.hidden_dropout:
        kinds += [("dropout, forward and backward", residual * 8 * h, "both")]
    for name, moved, when in kinds:
        yield Operation(name, 0.0, moved, "memory", when)


def head_operations(shape: ModelShape, rows: Rows, tensor: int = 1) -> Iterator[Operation]:
    """Of the head and the loss, one microbatch; forward and backward happen together."""
    h, v = shape.hidden_size, shape.padded_vocab_size // tensor
    tokens, e = rows.tokens, rows.narrow
    moved = 3 * e * tokens * (h + v)
    name = "head: product and both gradients"
    yield Operation(name, 6.0 * tokens * h * v, moved, "product", "both", (tokens, h, v))
    yield Operation("cross-entropy: read, read and write", 0.0, 3.0 * e * tokens * v, "memory", "both")


def update_bytes(optimizer: OptimizerSection, wide: int = 4, copy: int = 0) -> int:
    """Moved by an optimizer's step for each element: parameter, gradient and state read, parameter and state written.
    copy: bytes of a narrow copy that is written besides."""
    states = 1 if optimizer.name == "muon" else (1 if optimizer.momentum else 0) if optimizer.name == "sgd" else 2
    return wide * (3 + 2 * states) + copy


ADDED_BYTES = 10
"""Moved for each weight and microbatch where a bf16 gradient is written, read, and added to a float32 sum."""


def muon_flops(rows: int, width: int) -> float:
    """Of Muon's five Newton-Schulz iterations on one matrix (optim/muon.py): X X^T, its square, and their product with
    X, with the shorter side as rows."""
    short, long = sorted((rows, width))
    return 5 * (4.0 * short * short * long + 2.0 * short**3)
