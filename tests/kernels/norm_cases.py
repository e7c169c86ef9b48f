"""What tests of both norms share: inputs, the definition written out in float64, and comparisons within rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

EPS = 1e-5
ROUNDING = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""One unit in the last place of a half dtype (the interpreter truncates); for the others what long sums lose."""

CASES = [
    ((1, 1), torch.float64, torch.float64),
    ((3, 5), torch.float32, torch.float32),
    ((2, 4, 64), torch.bfloat16, torch.bfloat16),
    ((40, 300), torch.float64, torch.float64),
    ((40, 300), torch.bfloat16, torch.float32),
    ((19, 1000), torch.float16, torch.float32),
    ((3, 2050), torch.float32, torch.float32),
]
"""Shapes of rows, their dtype and that of weights: tiles of several rows, tiles beyond the first, odd sizes."""


def rows(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, count: int, seed: int = 0, scale: float = 1.0
) -> list[Tensor]:
    """Random leaves. They are sixteenths, so that a sum of two has no rounding in bfloat16 (which the interpreter would
    do by truncation).
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randint(-90, 91, shape, generator=generator) / 16 * scale for _ in range(count)]
    return [n.to(device=device, dtype=dtype).requires_grad_() for n in numbers]


def weights(size: int, dtype: torch.dtype, device: torch.device, biased: bool) -> list[Tensor]:
    """A weight around 1 and, in LayerNorm, a bias around 0; leaves."""
    generator = torch.Generator().manual_seed(9)
    found = [torch.rand(size, generator=generator) + 0.5, torch.rand(size, generator=generator) - 0.5]
    return [w.to(device=device, dtype=dtype).requires_grad_() for w in found[: 1 + biased]]


def written_out(x: Tensor, weight: Tensor, bias: Tensor | None = None, centres: bool = False) -> Tensor:
    """The definition in float64, on the CPU. centres: LayerNorm, which it also is where there is a bias."""
    x = x.cpu().double()
    if centres or bias is not None:
        x = x - x.sum(-1, keepdim=True) / x.shape[-1]
    y = x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt() * weight.cpu().double()
    return y if bias is None else y + bias.cpu().double()


def close(found: Tensor, wanted: Tensor, twice: bool = False) -> None:
    """found equals wanted (any dtype and device) within the rounding of found's dtype, of each element, and a little of
    the largest or of 1. twice: it was rounded before a sum and after it, so that rounding is of the largest, too.
    """
    rounding = ROUNDING[found.dtype]
    wanted = wanted.detach().cpu().double()
    slack = rounding if twice or found.dtype == torch.float64 else 1e-5
    atol = slack * max(1.0, float(wanted.abs().max())) if wanted.numel() else 0.0
    torch.testing.assert_close(found.detach().cpu().double(), wanted, rtol=rounding, atol=atol)


def compare(
    norm: Callable[..., Any],
    leaves: Sequence[Tensor],
    added: bool,
    upstreams: Sequence[Tensor | None],
    twice: bool = False,
    centres: bool = False,
) -> None:
    """A norm's results and gradients against the definition in float64, and the dtypes of both.

    leaves: x, branch where `added`, weight, bias in LayerNorm. upstreams: by result; None where it is not used. twice:
    the gradient of the sum is rounded twice, as the eager definition does. centres: a LayerNorm without a bias.
    """
    results = norm(*leaves, EPS)
    results = results if added else (results,)
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    summed = exact[0] + exact[1] if added else exact[0]
    wanted = (written_out(summed, *exact[1 + added :], centres=centres), summed)
    for result, want in zip(results, wanted, strict=False):
        assert result.dtype == leaves[0].dtype and result.shape == leaves[0].shape
        close(result, want)
    used = [(number, upstream) for number, upstream in enumerate(upstreams) if upstream is not None]
    gradients = [
        torch.autograd.grad([out[n] for n, _ in used], inputs, [up.to(out[n]) for n, up in used], allow_unused=True)
        for out, inputs in ((results, leaves), (wanted, exact))
    ]
    for leaf, found, want in zip(leaves, *gradients, strict=True):
        if want is None or found is None:
            assert want is found or not bool(found.any())
            continue
        assert found.dtype == leaf.dtype and found.shape == leaf.shape
        close(found, want, twice)


def uneven_rows(device: torch.device) -> list[tuple[Tensor, ...]]:
    """x, branch and two upstream gradients [4, 6] with all kinds of strides."""
    square = rows((6, 4), torch.float64, device, 1)[0].detach().t()
    stepped = rows((4, 12), torch.float64, device, 1, 1)[0].detach()[:, ::2]
    spread = torch.ones((), dtype=torch.float64, device=device).expand(4, 6)
    return [(square, stepped, spread, square), (stepped, square, stepped, spread)]


class Launches:
    """Stands in for kernels of a module and notes, in order, which are launched."""

    def __init__(self, patch: pytest.MonkeyPatch, module: Any) -> None:
        self.names: list[str] = []
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            patch.setattr(module, name, _Noted(self.names, name, getattr(module, name)))


class _Noted:
    def __init__(self, names: list[str], name: str, kernel: Any) -> None:
        self.names, self.name, self.kernel = names, name, kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        self.names.append(self.name)
        return self.kernel[grid]  # type: ignore[no-any-return]
