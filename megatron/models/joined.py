"""Projections of one input as one matrix product: query, key and value; gate and up.

Parameters keep their names, shapes and gradients. Where their weights lie one behind the other in memory, as the engine
of one process lays them (`join`), one product makes all outputs, one the gradient of the input and one all weight
gradients. Over several ranks FSDP2 gathers each parameter into memory of its own, and `project` makes a product of
each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron.kernels.matrix_product import Library, linear_value, product_of
from megatron.kernels.weight_gradient import HasGradient, MainGradient, add_weight_gradient
from megatron.models.layers import Linear


@dataclass(frozen=True)
class Joined:
    """Weights [outputs of all, inputs] and biases [outputs of all] whose parts are the parameters of the linears."""

    weight: Tensor
    bias: Tensor | None


class JoinedProjections(nn.Module):
    """A module with linear maps that read the same input. joined: set by `join`; None where they lie apart."""

    joined: Joined | None = None
    main_gradient: MainGradient | None = None
    """Where the weights' gradients are added by their one product; None: autograd is given them."""

    def together(self) -> tuple[Linear, ...]:
        """The maps, in the order of their outputs."""
        raise NotImplementedError

    def project_joined(self, x: Tensor) -> Tensor:
        """[batch, T, outputs of all] of x [batch, T, hidden]; only where they are joined."""
        assert self.joined is not None
        linears = self.together()
        weights = [linear.weight for linear in linears]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        library = linears[0].library
        whole = (self.joined.weight, self.joined.bias)
        sums: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.main_gradient is not None and torch.is_grad_enabled():
            sums = self.main_gradient.place()
        return _JoinedLinear.apply(x, library, *whole, *sums, len(weights), *weights, *biases)  # type: ignore[no-any-return]


class _JoinedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        library: Library,
        weight: Tensor,
        bias: Tensor | None,
        total: Tensor | None,
        fresh: Tensor | None,
        count: int,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, total, fresh)
        ctx.sizes, ctx.biased = [part.shape[0] for part in parameters[:count]], len(parameters) > count
        ctx.product = product_of(library)
        return linear_value(library, x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, total, fresh = ctx.saved_tensors
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        x_grad = ctx.product(rows, weight).view(x.shape)
        weight_grads: Sequence[Tensor | None] = [None] * len(ctx.sizes)
        if total is None:
            weight_grads = ctx.product(rows.t(), inputs).split(ctx.sizes)
        else:
            add_weight_gradient(total, fresh, rows, inputs)
        bias_grads = rows.sum(0).split(ctx.sizes) if ctx.biased else ()
        return x_grad, *(None,) * 6, *weight_grads, *bias_grads


def join(model: nn.Module) -> None:
    """Lays the parameters of all joined projections of a model one behind the other. They stay the same Parameters;
    whoever holds their memory by another name must ask again. For models whose matrices no tensor ranks share.
    """
    for module in model.modules():
        if isinstance(module, JoinedProjections) and len(module.together()) > 1:
            linears = module.together()
            biases = [linear.bias for linear in linears if linear.bias is not None]
            bias = _behind_each_other(biases) if biases else None
            module.joined = Joined(_behind_each_other([linear.weight for linear in linears]), bias)


def add_gradients_in_products(layers: nn.Module, sums: Mapping[nn.Parameter, HasGradient]) -> list[MainGradient]:
    """From now on the linear maps of `layers` add their weights' gradients to the sums themselves; what they add to.

    sums: by weight. Where maps are joined, their sums lie one behind the other too.
    """
    made, done = [], set()
    for module in layers.modules():
        if isinstance(module, JoinedProjections) and module.joined is not None:
            module.main_gradient = _main_gradient(module.together(), sums)
            made.append(module.main_gradient)
            done.update(module.together())
    for module in layers.modules():
        if isinstance(module, Linear) and module not in done:
            module.main_gradient = _main_gradient([module], sums)
            made.append(module.main_gradient)
    return made


def _main_gradient(linears: Sequence[Linear], sums: Mapping[nn.Parameter, HasGradient]) -> MainGradient:
    weights = [linear.weight for linear in linears]
    return MainGradient([sums[weight] for weight in weights], weights)


def _behind_each_other(parameters: Sequence[nn.Parameter]) -> Tensor:
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, whole.split([p.shape[0] for p in parameters]), strict=True):
        parameter.data = part
    return whole
