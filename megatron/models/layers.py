"""The parts that hold parameters: linear, norm and embedding, each with its part of them on the tensor axis.

Constructors leave parameters unset; `initialise` or a checkpoint fills them. Each part computes in the dtype of the
tensors that it is given, and says in `cuts` how each of its parameters lies on the tensor ranks. Matrices are cut
Megatron-LM's way (arXiv 1909.08053): those that read the residual stream by outputs, those that write to it by inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from megatron.config.model_shape import ModelShape
from megatron.kernels.choice import Kernels, fp8_casts, fp8_products, norms
from megatron.kernels.embedding import embedding
from megatron.kernels.fp8 import Fp8Weight
from megatron.kernels.matrix_product import linear_of, product_of
from megatron.kernels.weight_gradient import MainGradient, linear_into
from megatron.parallel.model_place import ONE_PROCESS, ModelPlace, ParameterCut
from megatron.parallel.tensor_mappings import enter, gathered_linears, leave


def replicated(place: ModelPlace) -> ParameterCut:
    """The cut of a parameter that every tensor rank holds whole and applies to its part of the residual stream."""
    return ParameterCut(None, partial=place.sequence and not place.tensor.alone)


class Linear(nn.Module):
    """y = x W^T + b with weight [outputs, inputs], whole on every rank or cut by outputs."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool,
        kernels: Kernels,
        residual: bool = False,
        cut: ParameterCut | None = None,
    ) -> None:
        """outputs: those held here. residual: y is added to the residual stream, so that initial weights are scaled by
        depth. cut: of weight and bias alike."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.residual, self.library = residual, kernels.product
        self.linear, self.fp8 = linear_of(kernels.product), kernels.fp8
        self.casts: Literal["eager", "triton"] = "triton" if kernels.norm == "triton" else "eager"
        self.multiply = fp8_products(self.casts) if kernels.fp8 else None
        self.fp8_weight: Fp8Weight | None = None
        """The cast of the weight, where somebody refreshes it (`keep_cast`); else it is cast in each forward pass."""
        self.main_gradient: MainGradient | None = None
        """Where the weight's gradient is added by the product that makes it; None: autograd is given it."""
        self.cuts = dict.fromkeys(("weight", "bias"), cut or ParameterCut())
        self.used: slice | None = None
        """The outputs that this rank computes, where it holds more; None for all."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mapped(x, *self.operands())

    def mapped(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b of this map's own weight, or of the part of it that is used."""
        if self.multiply is not None:
            y = self.multiply(x, weight, self.fp8_weight)
            return y if bias is None else y + bias
        if self.main_gradient is not None and torch.is_grad_enabled():
            return linear_into(x, weight, bias, *self.main_gradient.place())
        return self.linear(x, weight, bias)

    def keep_cast(self) -> None:
        """From now on forward passes multiply by the cast that `cast_weight` made last."""
        self.fp8_weight = Fp8Weight(fp8_casts(self.casts))

    def cast_weight(self) -> None:
        """Casts the weight as it is now, into the memory of the cast before."""
        assert self.fp8_weight is not None
        self.fp8_weight.refresh(self.weight)

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the outputs that this rank computes."""
        if self.used is None:
            return self.weight, self.bias
        return self.weight[self.used], None if self.bias is None else self.bias[self.used]


class RowLinear(Linear):
    """A linear map cut by inputs, from parts of x to the residual stream; the bias is added once, after the sum."""

    def __init__(self, inputs: int, outputs: int, bias: bool, kernels: Kernels, place: ModelPlace) -> None:
        """inputs: all of them."""
        super().__init__(inputs // place.tensor.size, outputs, bias, _splittable(kernels, place), residual=True)
        self.cuts = {"weight": ParameterCut(1), "bias": replicated(place)}
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        if self.place.tensor.alone:
            return self.mapped(x, self.weight, self.bias)
        y = leave(self.mapped(x, self.weight, None), self.place.tensor, self.place.sequence)
        return y if self.bias is None else y + self.bias


def column_linear(inputs: int, outputs: int, bias: bool, kernels: Kernels, place: ModelPlace) -> Linear:
    """A linear map cut by outputs, of which there are `outputs` in all; to be applied by `project`."""
    return Linear(inputs, outputs // place.tensor.size, bias, _splittable(kernels, place), cut=ParameterCut(0))


def _splittable(kernels: Kernels, place: ModelPlace) -> Kernels:
    """Schedules that run input and weight gradients apart need torch's own linear map, which can compute one alone."""
    return dataclasses.replace(kernels, product="torch") if place.split_backward else kernels


def project(x: Tensor, linears: Sequence[Linear], place: ModelPlace) -> tuple[Tensor, ...]:
    """What linear maps cut by outputs make of the residual stream x [batch, T_local, hidden]; x enters once for all."""
    operands = [linear.operands() for linear in linears]
    if place.split_backward or linears[0].fp8:
        x = enter(x, place.tensor, place.sequence)
        return tuple(linear.mapped(x, *operand) for linear, operand in zip(linears, operands, strict=True))
    weights, biases = zip(*operands, strict=True)
    if place.tensor.alone:
        return tuple(linear.mapped(x, *operand) for linear, operand in zip(linears, operands, strict=True))
    return gathered_linears(x, weights, biases, place.tensor, place.sequence, product_of(linears[0].library))


def norm_weight(weight: Tensor, unit_offset: bool) -> Tensor:
    """What an RMSNorm multiplies by: the weight, or (Gemma) 1 + weight, in float32 at least, since bfloat16 has no
    small steps around 1."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) + 1 if unit_offset else weight


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, by the shape's `norm`, computed in float32 at least."""

    def __init__(
        self, shape: ModelShape, kernels: Kernels, place: ModelPlace = ONE_PROCESS, multiplier: float = 1.0
    ) -> None:
        """multiplier: of what it gives, taken into weight and bias while they are wide, so that rows are rounded
        once."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.hidden_size))
        self.bias = nn.Parameter(torch.empty(shape.hidden_size)) if shape.norm == "layernorm" else None
        self.eps, self.functions, self.unit_offset = shape.norm_eps, norms(kernels.norm), shape.norm_unit_offset
        self.centres, self.multiplier = shape.norm != "rmsnorm", multiplier
        self.cuts = dict.fromkeys(("weight", "bias"), replicated(place))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._scale_and_shift()
        if self.centres:
            return self.functions.layer_norm(x, weight, bias, self.eps)
        return self.functions.rms_norm(x, weight, self.eps)

    def after_adding(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """(the norm of x + branch, x + branch): the sum is read once while it is made."""
        weight, bias = self._scale_and_shift()
        if self.centres:
            return self.functions.add_layer_norm(x, branch, weight, bias, self.eps)
        return self.functions.add_rms_norm(x, branch, weight, self.eps)

    def _scale_and_shift(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = norm_weight(self.weight, self.unit_offset), self.bias
        if self.multiplier == 1:
            return weight, bias
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(wide) * self.multiplier, None if bias is None else bias.to(wide) * self.multiplier


class Embedding(nn.Module):
    """Rows of weight [padded vocabulary, hidden], cut by words."""

    def __init__(self, shape: ModelShape, place: ModelPlace = ONE_PROCESS) -> None:
        super().__init__()
        words = shape.padded_vocab_size // place.tensor.size
        self.weight = nn.Parameter(torch.empty(words, shape.hidden_size))
        self.cuts = {"weight": ParameterCut(0)}
        self.place, self.first = place, None if place.tensor.alone else place.tensor.rank * words

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [batch, T] -> [batch, T_local, hidden]."""
        return leave(embedding(tokens, self.weight, self.first), self.place.tensor, self.place.sequence)
