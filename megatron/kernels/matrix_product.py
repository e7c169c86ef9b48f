"""Matrix products, by the library that is quicker here, and linear maps made of them.

On CPUs torch multiplies float32 matrices by MKL, which on AMD's processors runs at half of what oneDNN does: one core
of an EPYC with AVX-512 made 100 GFLOP/s of MKL and 230 of oneDNN for 4096 x 704 x 256. torch itself takes oneDNN for
bfloat16. Other dtypes, devices and small matrices always go to torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Library = Literal["torch", "onednn"]
Product = Callable[[Tensor, Tensor], Tensor]
"""(a [n, k], b [k, m]) -> a @ b [n, m]; any strides."""
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""As torch.nn.functional.linear."""

SMALL = 1 << 24
"""Below so many multiplications oneDNN's preparation costs more than it saves."""


def onednn_obstacle() -> str | None:
    """Why oneDNN cannot multiply here; None where it can."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this build of torch has no oneDNN"
    return None


def _by_torch(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    if not _worth_it(a, b):
        return a @ b
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")  # type: ignore[no-any-return]


def _worth_it(a: Tensor, b: Tensor) -> bool:
    return a.dtype == torch.float32 and a.device.type == "cpu" and a.numel() * b.shape[-1] >= SMALL


torch_product: Product = _by_torch


def product_into(library: Library, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b, in `out` where the library can write there; else in a tensor of its own, which is given."""
    return _by_onednn(a, b) if library == "onednn" and _worth_it(a, b) else torch.mm(a, b, out=out)


def product_of(library: Library) -> Product:
    """A library's product of two matrices; it has no gradient of its own."""
    return _by_onednn if library == "onednn" else _by_torch


def add_product(to: Tensor, a: Tensor, b: Tensor, product: Product) -> Tensor:
    """to + a @ b, in the place of `to`."""
    return to.addmm_(a, b) if product is _by_torch else to.add_(product(a, b))


def linear_of(library: Library) -> Linear:
    """A library's linear map x W^T + b, with gradients."""
    return _onednn_linear if library == "onednn" else functional.linear


def linear_value(library: Library, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b without a gradient; torch's in memory of its own, no view, so that it may be changed in place."""
    if library == "onednn" and _worth_it(x, weight.t()):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    if torch.compiler.is_compiling():
        return functional.linear(x, weight, bias)  # a compiled program knows no views
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows, flat = x.reshape(-1, x.shape[-1]), out.view(-1, weight.shape[0])
    if bias is None:
        torch.mm(rows, weight.t(), out=flat)
    else:
        torch.addmm(bias, rows, weight.t(), out=flat)
    return out


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _worth_it(x, weight.t()):
        return functional.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        out = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        x_grad = _by_onednn(rows, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        weight_grad = _by_onednn(rows.t(), inputs) if ctx.needs_input_grad[1] else None
        return x_grad, weight_grad, rows.sum(0) if ctx.biased else None


@cache
def quicker_library(rows: int, inputs: int, outputs: int) -> tuple[Library, dict[str, float]]:
    """(the library whose three products of a linear map take less time, best milliseconds of each), in float32.

    rows of x [rows, inputs], W [outputs, inputs]. Taken in turns, so that a busy machine is unfair to neither.
    """
    if onednn_obstacle():
        return "torch", {}
    drawn = torch.Generator().manual_seed(0)  # the run's own random state stays as it is
    sizes = (rows, inputs), (outputs, inputs), (rows, outputs)
    x, weight, grad = (torch.randn(*size, generator=drawn) for size in sizes)
    calls = {name: partial(_three, product_of(name), x, weight, grad) for name in ("torch", "onednn")}
    best: dict[str, float] = {}
    for turn in range(6):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            passed = 1000 * (time.perf_counter() - begin)
            if turn:
                best[name] = min(passed, best.get(name, passed))
    return ("onednn" if best["onednn"] < 0.9 * best["torch"] else "torch"), best


def _three(product: Product, x: Tensor, weight: Tensor, grad: Tensor) -> None:
    product(x, weight.t())
    product(grad, weight)
    product(grad.t(), x)
