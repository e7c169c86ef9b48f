"""Products of layers in 8-bit floats (Micikevicius et al., arXiv 2209.05433), each tensor with one scale of its own.

A tensor x is kept as values in float8 and one float32 number:

    scale = min(L / max |x|, 2^126)               L: 448 in e4m3, 57344 in e5m2
    values = x * scale, kept within [-L, L], rounded to the nearest float8
    x is about values * (1 / scale)

The maximum is that of this very tensor, taken just before its cast: there is no history that could be too old. The
bound on scale keeps its reciprocal a normal number; a tensor of zeros gets it, and stays zero. Where an element is
infinite or not a number, 1 / scale is as well, and everything computed from the tensor is not a number: nothing hides
it. Rounding is off by at most 2^-4 of an element in e4m3 and 2^-3 in e5m2, down to normal numbers of 2^-6 / 448 and
2^-14 / 57344 of the tensor's maximum, and below them by at most half of the least step, 2^-10 / 448 and 2^-17 / 57344.

Forward and weights are cast to e4m3, gradients to e5m2, and all three products of a linear layer run on casts. Hopper's
8-bit products want both factors along the summed dimension, so each cast is made together with its transpose. Sums are
float32's but for the forward product's on a GPU, whose tensor cores may keep fewer bits between partial sums
(`use_fast_accum`): backward, where sums run over all tokens, they may not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.config.errors import UnavailableError

E4M3: Final = torch.float8_e4m3fn
E5M2: Final = torch.float8_e5m2
LARGEST: Final = {E4M3: 448.0, E5M2: 57344.0}
LARGEST_SCALE: Final = 2.0**126
SUMMED_MULTIPLE: Final = 16
"""Of this must be the length of each dimension that a product sums over, and of a layer's features."""

_PRODUCT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Fp8Tensor(NamedTuple):
    """A cast matrix [rows, columns]: values of that shape, transposed [columns, rows], both contiguous, and inverse,
    float32 of no dimension, by which values are multiplied to be the matrix again. Columns of `transposed` are filled
    up with zeros to a multiple of 16."""

    values: Tensor
    transposed: Tensor
    inverse: Tensor


Cast = Callable[[Tensor, torch.dtype, Fp8Tensor | None], Fp8Tensor]


def fp8_cast(x: Tensor, dtype: torch.dtype, into: Fp8Tensor | None = None) -> Fp8Tensor:
    """The cast of x [rows, columns], at least one element of any floating dtype, to E4M3 or E5M2.

    into: an earlier cast of a matrix of this shape to this dtype, whose tensors are filled anew and given back.
    """
    largest = LARGEST[dtype]
    wide = x.float()
    most = wide.abs().amax()
    # a tensor divided by: torch makes of a number divided by a tensor a reciprocal, which is rounded once more
    scale = (torch.full_like(most, largest) / most).clamp(max=LARGEST_SCALE)
    cast = into or empty_cast(x, dtype)
    cast.values.copy_((wide * scale).clamp(-largest, largest).to(dtype))
    cast.transposed.zero_()[:, : x.shape[0]].copy_(cast.values.t())
    cast.inverse.copy_(1 / scale)
    return cast


def empty_cast(x: Tensor, dtype: torch.dtype) -> Fp8Tensor:
    """Memory for the cast of a matrix like x."""
    rows, columns = x.shape
    padded = -(-rows // SUMMED_MULTIPLE) * SUMMED_MULTIPLE
    values, transposed = x.new_empty(rows, columns, dtype=dtype), x.new_empty(columns, padded, dtype=dtype)
    return Fp8Tensor(values, transposed, x.new_empty((), dtype=torch.float32))


class Fp8Weight:
    """The cast of a weight, made at each `refresh`, say once an optimizer step, instead of in each forward pass."""

    def __init__(self, cast: Cast = fp8_cast) -> None:
        """cast: `fp8_cast`, or Triton's."""
        self._cast = cast
        self._held: Fp8Tensor | None = None

    def refresh(self, weight: Tensor) -> None:
        """Casts weight [out, in], always into the same memory. Not between a forward pass and its backward pass, which
        reads it."""
        self._held = self._cast(weight.detach(), E4M3, self._held)

    def held(self) -> Fp8Tensor:
        """The cast of the last refresh, before which there is none: ValueError."""
        if self._held is None:
            raise ValueError("this weight has no cast yet: call refresh(weight) before the first forward pass")
        return self._held


@cache
def fp8_obstacle(device: torch.device) -> str | None:
    """Why 8-bit products cannot run on a device, or None where they can."""
    if device.type != "cuda":
        return None if device.type in ("cpu", "meta") else f"torch has no 8-bit products on {device.type}"
    # Of the properties, which torch's compiler takes for constants: asked for anything else it would leave its program.
    found = torch.cuda.get_device_properties(device)
    if (found.major, found.minor) >= (8, 9):
        return None
    return f"{found.name} (sm_{found.major}{found.minor}) has no 8-bit products: Ada, Hopper and later have"


def linear_with(cast: Cast, x: Tensor, weight: Tensor, held: Fp8Weight | None) -> Tensor:
    """`fp8_linear`, by one or the other cast."""
    if obstacle := fp8_obstacle(x.device):
        raise UnavailableError(f"fp8 cannot run: {obstacle}; set kernels.fp8 = false")
    features = (*weight.shape, x.shape[-1])
    if weight.ndim != 2 or features[1] != features[2] or any(size % SUMMED_MULTIPLE for size in features):
        raise ValueError(
            f"x {list(x.shape)} and weight {list(weight.shape)}: features must agree, and be multiples of "
            f"{SUMMED_MULTIPLE} for 8-bit products"
        )
    return _Fp8Linear.apply(x, weight, None if held is None else held.held(), cast)


def fp8_linear(x: Tensor, weight: Tensor, held: Fp8Weight | None = None) -> Tensor:
    """x [..., in] times the transpose of weight [out, in], in x's dtype, by 8-bit products forward and backward.

    held: the weight's cast; without one it is cast here. The results of a row depend a little on the other rows, by
    their common scale. Raises ValueError for features that are no multiples of 16, UnavailableError on GPUs without
    8-bit products.
    """
    return linear_with(fp8_cast, x, weight, held)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, held: Fp8Tensor | None, cast: Cast) -> Tensor:
        ctx.cast, ctx.shape, ctx.dtypes = cast, x.shape, (x.dtype, weight.dtype)
        if not x.numel():
            ctx.save_for_backward(weight)
            return x.new_zeros(*x.shape[:-1], weight.shape[0])
        narrow = cast(x.reshape(-1, x.shape[-1]), E4M3, None)
        by = cast(weight, E4M3, None) if held is None else held
        ctx.save_for_backward(narrow.transposed, narrow.inverse, by.transposed, by.inverse)
        out = _product(narrow.values, by.values, narrow.inverse, by.inverse, x.dtype, True)
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_dtype, weight_dtype = ctx.dtypes
        if not grad.numel():
            (weight,) = ctx.saved_tensors
            return grad.new_zeros(ctx.shape, dtype=x_dtype), torch.zeros_like(weight), None, None
        x, x_inverse, weight, weight_inverse = ctx.saved_tensors
        narrow = ctx.cast(grad.reshape(-1, grad.shape[-1]), E5M2, None)
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = _product(narrow.values, weight, narrow.inverse, weight_inverse, x_dtype, False).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            weight_grad = _product(narrow.transposed, x, narrow.inverse, x_inverse, weight_dtype, False)
        return x_grad, weight_grad, None, None


def _product(a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """a [m, k] times the transpose of b [n, k], both contiguous float8, times both inverses: [m, n] in dtype."""
    made = dtype if dtype in _PRODUCT_DTYPES else torch.float32
    out = torch._scaled_mm(a, b.t(), scale_a=a_inverse, scale_b=b_inverse, out_dtype=made, use_fast_accum=fast)
    return out.to(dtype)
