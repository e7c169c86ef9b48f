"""Casts to 8-bit floats and products of them: against the bounds of their rounding, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernels.counted_launches import counted
from torch import Tensor

from megatron.config.errors import UnavailableError
from megatron.kernels import fp8, fp8_triton
from megatron.kernels.fp8 import E4M3, E5M2, LARGEST, Cast, Fp8Tensor, Fp8Weight, fp8_cast, fp8_linear
from megatron.kernels.fp8_triton import fp8_cast_triton, fp8_linear_triton

CASTS = pytest.mark.parametrize("cast", [fp8_cast, fp8_cast_triton], ids=["eager", "triton"])
LINEARS = pytest.mark.parametrize("linear", [fp8_linear, fp8_linear_triton], ids=["eager", "triton"])
FORMATS = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
UNIT = {E4M3: 2.0**-4, E5M2: 2.0**-3}
"""Rounding of normal numbers, relative."""
FLOOR = {E4M3: 2.0**-10 / 448, E5M2: 2.0**-17 / 57344}
"""Rounding of the others, in parts of the largest element."""
Linear = Callable[..., Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # the interpreter's numpy


def drawn(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Numbers of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return (normal * torch.exp(torch.randn(rows, columns, generator=generator, dtype=torch.float64))).to(dtype)


def undone(cast: Fp8Tensor) -> Tensor:
    return cast.values.double() * cast.inverse.double()


def error_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a cast may be off, element by element; a trifle more for the rounding of scale."""
    wide = x.double().abs()
    return 1.00001 * torch.maximum(UNIT[dtype] * wide, FLOOR[dtype] * wide.max())


@CASTS
@FORMATS
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float16, torch.float64], ids=str)
def test_a_cast_is_off_by_its_rounding_and_no_more(
    cast: Cast, dtype: torch.dtype, given: torch.dtype, device: torch.device
) -> None:
    for rows, columns in ((1, 1), (37, 48), (70, 300)):
        x = drawn(rows, columns, dtype=given).to(device)
        narrow = cast(x, dtype, None)
        assert (narrow.values.dtype, narrow.inverse.dtype, narrow.inverse.shape) == (dtype, torch.float32, ())
        assert ((undone(narrow) - x.double()).abs() <= error_of(x, dtype)).all()
        assert narrow.values.float().abs().max() == LARGEST[dtype]
        padded = narrow.transposed.float()
        assert padded.shape == (columns, -(-rows // 16) * 16)
        assert torch.equal(padded[:, :rows], narrow.values.float().t()) and not padded[:, rows:].any()


@FORMATS
@pytest.mark.parametrize("size", [1.0, 1e4, 1e-30, 1e30])
def test_the_kernels_numbers_are_the_definitions(dtype: torch.dtype, size: float, device: torch.device) -> None:
    x = (drawn(70, 300) * size).to(device)
    ours, definition = fp8_cast_triton(x.t(), dtype), fp8_cast(x.t(), dtype)
    assert torch.equal(ours.inverse, definition.inverse)
    assert torch.equal(ours.values.float(), definition.values.float())
    assert torch.equal(ours.transposed.float(), definition.transposed.float())


@CASTS
@FORMATS
def test_zeros_and_the_smallest_numbers(cast: Cast, dtype: torch.dtype, device: torch.device) -> None:
    zeros = cast(torch.zeros(3, 16, device=device), dtype, None)
    assert not zeros.values.float().any() and not zeros.transposed.float().any() and zeros.inverse.isfinite()
    least = torch.full((3, 16), 2.0**-130, device=device)
    small = cast(least, dtype, None)
    assert small.inverse == 2.0**-126
    assert (undone(small) - 2.0**-130).abs().max() <= 2.0**-126 * 2.0**-10


@CASTS
@FORMATS
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_one_element_that_is_not_finite_spoils_the_whole_tensor(
    cast: Cast, dtype: torch.dtype, bad: float, device: torch.device
) -> None:
    x = drawn(40, 48).to(device)
    x[3, 5] = bad
    narrow = cast(x, dtype, None)
    assert not narrow.inverse.isfinite()
    assert not undone(narrow).isfinite().any()


@CASTS
def test_a_cast_into_memory_that_is_there(cast: Cast, device: torch.device) -> None:
    first = cast(drawn(20, 48, 1).to(device), E4M3, None)
    places = [tensor.data_ptr() for tensor in first]
    again, anew = cast(drawn(20, 48, 2).to(device), E4M3, first), cast(drawn(20, 48, 2).to(device), E4M3, None)
    assert [tensor.data_ptr() for tensor in again] == places
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(again, anew, strict=True))


def passed(linear: Linear, x: Tensor, weight: Tensor, grad: Tensor, held: Fp8Weight | None = None) -> list[Tensor]:
    """Output, and gradients of x and weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = linear(x, weight, held)
    out.backward(grad)
    assert x.grad is not None and weight.grad is not None
    return [out.detach(), x.grad, weight.grad]


@LINEARS
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 24, 33])
def test_products_are_off_by_the_rounding_of_both_factors(
    linear: Linear, given: torch.dtype, rows: int, device: torch.device
) -> None:
    """Against the exact products of what was cast, where only sums are rounded, and of what was given."""
    x, weight, grad = (
        drawn(*shape, seed, given).to(device) for seed, shape in enumerate(((rows, 48), (32, 48), (rows, 32)))
    )
    e4 = {name: undone(fp8_cast(tensor, E4M3)) for name, tensor in (("x", x), ("w", weight))}
    g = undone(fp8_cast(grad, E5M2))
    exact = [e4["x"] @ e4["w"].t(), g @ e4["w"], g.t() @ e4["x"]]
    pairs = [((x, E4M3), (weight.t(), E4M3)), ((grad, E5M2), (weight, E4M3)), ((grad.t(), E5M2), (x, E4M3))]
    # where they are asked to be fast, Hopper's tensor cores keep about 14 bits of sums (arXiv 2412.19437, 3.3.2)
    summed = 2.0**-8 if given == torch.bfloat16 else (2.0**-12 if device.type == "cuda" else 2.0**-20)
    for out, right, ((a, a_dtype), (b, b_dtype)) in zip(passed(linear, x, weight, grad), exact, pairs, strict=True):
        assert out.dtype == given
        product = a.double().abs() @ b.double().abs()
        assert ((out.double() - right).abs() <= 2 * summed * product).all()
        a_error, b_error = error_of(a, a_dtype), error_of(b, b_dtype)
        bound = a_error @ b.double().abs() + a.double().abs() @ b_error + a_error @ b_error + 2 * summed * product
        assert ((out.double() - a.double() @ b.double()).abs() <= bound).all()


def test_both_linears_agree_on_batches_views_and_held_weights(device: torch.device) -> None:
    x = drawn(6 * 7, 48).to(device).view(6, 7, 48).transpose(0, 1)
    weight, grad = drawn(32, 48, 1).to(device), drawn(6 * 7, 32, 2).to(device).view(7, 6, 32)
    expected = passed(fp8_linear, x, weight, grad)
    for linear, cast in ((fp8_linear, fp8_cast), (fp8_linear_triton, fp8_cast_triton)):
        held = Fp8Weight(cast)
        held.refresh(weight)
        for got, right in zip(passed(linear, x, weight, grad, held), expected, strict=True):
            assert got.shape == right.shape and torch.equal(got, right)


@LINEARS
def test_a_held_weight_is_used_until_it_is_refreshed(linear: Linear, device: torch.device) -> None:
    x, weight = drawn(8, 48).to(device), drawn(32, 48, 1).to(device)
    held = Fp8Weight()
    with pytest.raises(ValueError, match="no cast yet: call refresh"):
        linear(x, weight, held)
    held.refresh(weight)
    before = linear(x, weight, held)
    weight.neg_()
    assert torch.equal(linear(x, weight, held), before)
    held.refresh(weight)
    assert torch.equal(linear(x, weight, held), -before)


@LINEARS
def test_no_rows_and_gradients_that_nobody_asks_for(linear: Linear, device: torch.device) -> None:
    weight = drawn(32, 48, 1).to(device)
    out, x_grad, weight_grad = passed(linear, weight.new_zeros(0, 2, 48), weight, weight.new_zeros(0, 2, 32))
    assert (out.shape, x_grad.shape) == ((0, 2, 32), (0, 2, 48)) and not weight_grad.any()
    x = drawn(8, 48).to(device)
    half = weight.clone().requires_grad_()
    linear(x, half).float().sum().backward()
    assert half.grad is not None and x.grad is None


@LINEARS
def test_what_is_not_finite_reaches_the_output(linear: Linear, device: torch.device) -> None:
    x = drawn(8, 48).to(device)
    x[0, 0] = float("inf")
    assert not linear(x, drawn(32, 48, 1).to(device)).isfinite().any()


@LINEARS
def test_what_cannot_run_is_refused(linear: Linear, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for x_shape, weight_shape in (((8, 40), (32, 40)), ((8, 48), (30, 48)), ((8, 32), (32, 48)), ((8, 48), (48,))):
        with pytest.raises(ValueError, match="features must agree, and be multiples of 16"):
            linear(torch.zeros(x_shape, device=device), torch.zeros(weight_shape, device=device))
    monkeypatch.setattr(fp8, "fp8_obstacle", lambda device: "an A100 (sm_80) has no 8-bit products")
    with pytest.raises(UnavailableError, match="fp8 cannot run: an A100 .* set kernels.fp8 = false"):
        linear(torch.zeros(8, 48, device=device), torch.zeros(32, 48, device=device))


def test_a_cast_is_two_launches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = counted(monkeypatch, fp8_triton, "_maximum_kernel", "_cast_kernel")
    x, weight = drawn(24, 48).to(device), drawn(32, 48, 1).to(device)
    passed(fp8_linear_triton, x, weight, drawn(24, 32, 2).to(device))
    assert launches == ["_maximum_kernel", "_cast_kernel"] * 3
