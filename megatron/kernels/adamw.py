"""AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), the steps of `torch.optim.AdamW`, over many tensors.

For each element with gradient g, at its tensor's step t:

    p <- p - lr * decay * p
    m <- beta1 * m + (1 - beta1) * g              v <- beta2 * v + (1 - beta2) * g^2
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Learning rate, steps, the factor on gradients and the flag that stops a step are tensors on the parameters' device, so
that the host neither waits for a number nor bakes one into a CUDA graph.

A master in two halves. A float32 master may be kept as a bfloat16 `high`, which is what the model computes with, and
an int16 `low`, so that the copy that computes costs no memory of its own. With `bits` the master as an integer:

    high = (bits + 0x8000) >> 16                  the nearest bfloat16
    low  = bits - (high << 16)                    in [-32768, 32767]
    bits = (high << 16) + low                     modulo 2^32

This is exact for every float32 but what is not a number. Ties are rounded away from zero: rounding them to even is
impossible in this form, as 65537 masters would then share an even high half, more than 16 bits tell apart. Floats are
ordered by sign and magnitude, so one addition rounds both signs, and carries into the exponent as it should: what is
nearer to infinity than to bfloat16's largest number has an infinite high half, and still its exact master. Of numbers
that are none, only that is kept: they become 0x7fc00000, as otherwise the carry would make some of them zeros.

A bfloat16 copy beside a whole float32 master is rounded by the same rule (`rounded_copy`), so that a run computes with
the same weights, bit for bit, however its masters are kept. From rounding to even it differs where the low half is
exactly -32768, one master in 65536, and there in every second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_NOT_A_NUMBER = 0x7FC00000
_HALF = 0x8000
_PIECE = 1 << 24
"""Elements that are joined, split or rounded at once: integers of 4 bytes beside them, a few times over."""


@dataclass(frozen=True)
class AdamWTensors:
    """What one step reads and writes; all sequences are of one length, all tensors contiguous and of one device.

    parameters: float32 or float64 masters; or bfloat16 high halves, each with its int16 low half in `lows`.
    gradients: of the parameters' shapes, of any floating dtype. means, squares: the moments "exp_avg" and "exp_avg_sq",
    float64 where the parameter is, else float32. copies: narrow tensors that get the new masters, rounded (bfloat16 of
    float32 as `rounded_copy` does it), or None for one that has none. Where copies or lows are empty, none has any.
    """

    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    means: Sequence[Tensor]
    squares: Sequence[Tensor]
    copies: Sequence[Tensor | None] = ()
    lows: Sequence[Tensor | None] = ()

    def extras(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """Copy and low half of each parameter."""
        none = [None] * len(self.parameters)
        return list(zip(self.copies or none, self.lows or none, strict=True))

    def check(self, steps: Tensor, lr: Tensor, weight_decays: Sequence[float]) -> None:
        """Raises ValueError where a shape, a dtype or a length does not fit."""
        count = len(self.parameters)
        moments = (self.gradients, self.means, self.squares)
        if any(len(part) != count for part in (*moments, weight_decays)) or steps.shape != (count,):
            raise ValueError(f"{count} parameters need as many gradients, moments, steps and weight decays")
        if steps.dtype != torch.float32 or not steps.is_contiguous() or lr.numel() not in (1, count):
            raise ValueError(f"steps must be contiguous float32, and lr one number or {count}")
        for tensors in zip(self.parameters, *moments, self.extras(), strict=True):
            _check(*tensors)


def _check(parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, extra: tuple[Tensor | None, ...]) -> None:
    copy, low = extra
    what = f"parameter {parameter.dtype} {list(parameter.shape)}"
    if parameter.dtype not in (torch.float64, torch.float32, torch.bfloat16):
        raise ValueError(f"{what}: masters are float32, float64, or bfloat16 with a low half")
    if (parameter.dtype == torch.bfloat16) != (low is not None) or (low is not None and copy is not None):
        raise ValueError(f"{what}: a low half belongs to a bfloat16 high half, which is its own copy, and to no other")
    if low is not None and low.dtype != torch.int16:
        raise ValueError(f"{what}: its low half is {low.dtype}, not int16")
    if mean.dtype != wide_dtype(parameter) or square.dtype != mean.dtype or not gradient.is_floating_point():
        raise ValueError(f"{what}: its moments must be {wide_dtype(parameter)}, and its gradient floating")
    held = [tensor for tensor in (parameter, gradient, mean, square, copy, low) if tensor is not None]
    if any(tensor.shape != parameter.shape or not tensor.is_contiguous() for tensor in held):
        raise ValueError(f"{what}: gradient, moments, copy and low half must have its shape, and all be contiguous")


def wide_dtype(parameter: Tensor) -> torch.dtype:
    """What a parameter's moments are kept and its step is computed in."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 master as its bfloat16 high and int16 low half, both new, by the formula above."""
    master = master.contiguous()
    high, low = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    for values, to_high, to_low in _pieces(master, high, low):
        bits, top = _bits_and_high(values)
        to_high.view(torch.int16).copy_(top)
        to_low.copy_(bits - (top << 16))
    return high, low


def join_master(high: Tensor, low: Tensor) -> Tensor:
    """The float32 master of a bfloat16 high and an int16 low half, new."""
    high, low = high.contiguous(), low.contiguous()
    master = torch.empty_like(high, dtype=torch.float32)
    for to, top, bottom in _pieces(master, high, low):
        to.view(torch.int32).copy_((top.view(torch.int16).to(torch.int32) << 16) + bottom)
    return master


def rounded_copy(master: Tensor, copy: Tensor) -> None:
    """Fills copy with master, rounded: bfloat16 of float32 to the nearest, ties away from zero, which is its high half;
    what else there is as torch does it."""
    if (master.dtype, copy.dtype) != (torch.float32, torch.bfloat16):
        copy.copy_(master)
        return
    for values, to in _pieces(master, copy):
        to.view(torch.int16).copy_(_bits_and_high(values)[1])


def _bits_and_high(values: Tensor) -> tuple[Tensor, Tensor]:
    """int32 each: float32 values as integers, and their high halves."""
    bits = torch.where(values.isnan(), _NOT_A_NUMBER, values.view(torch.int32))
    return bits, (bits + _HALF) >> 16


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Contiguous tensors of one shape, flat and part by part."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("masters, halves and copies must be contiguous")
    yield from zip(*(tensor.view(-1).split(_PIECE) for tensor in tensors), strict=True)


@torch.no_grad()
def adamw_step(
    tensors: AdamWTensors,
    steps: Tensor,
    lr: Tensor,
    weight_decays: Sequence[float],
    betas: tuple[float, float],
    eps: float,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step, in place.

    steps: float32 [n], steps done of each parameter; counted up. lr: floating, of one number or [n]. weight_decays: n
    numbers. scale: one number, what gradients are multiplied by on the way (they are not changed). found_inf: one
    number; where it is not zero nothing at all changes. Raises ValueError for what does not fit.
    """
    tensors.check(steps, lr, weight_decays)
    if not tensors.parameters:
        return
    go = torch.ones_like(steps[0], dtype=torch.bool) if found_inf is None else found_inf.reshape(()) == 0
    counted = (steps + 1).double()
    rates = lr.double().reshape(-1).expand(len(steps))
    sizes = rates / (1 - betas[0] ** counted)
    roots = (1 - betas[1] ** counted).sqrt()
    columns = (tensors.parameters, tensors.gradients, tensors.means, tensors.squares, tensors.extras())
    for index, (parameter, gradient, mean, square, (copy, low)) in enumerate(zip(*columns, strict=True)):
        wide = mean.dtype
        g = gradient.to(wide) if scale is None else gradient.to(wide) * scale.to(wide)
        new_mean = mean * betas[0] + g * (1 - betas[0])
        new_square = square * betas[1] + g * g * (1 - betas[1])
        master = parameter if low is None else join_master(parameter, low)
        kept = master * (1 - rates[index] * weight_decays[index]).to(wide)
        moved = new_mean * sizes[index].to(wide) / (new_square.sqrt() / roots[index].to(wide) + eps)
        mean.copy_(torch.where(go, new_mean, mean))
        square.copy_(torch.where(go, new_square, square))
        master = torch.where(go, kept - moved, master)
        if low is not None:
            high, new_low = split_master(master)
            parameter.copy_(high)
            low.copy_(new_low)
            continue
        parameter.copy_(master)
        if copy is not None:
            fresh = torch.empty_like(copy)
            rounded_copy(master, fresh)
            copy.copy_(torch.where(go, fresh, copy))
    steps.add_(go.to(steps.dtype))
