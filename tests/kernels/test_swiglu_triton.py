"""The kernels of the activations against their eager definitions and against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron.config.errors import UnavailableError
from megatron.kernels import launch_triton, swiglu_triton
from megatron.kernels.swiglu import activate, gated, gated_halves
from megatron.kernels.swiglu_triton import activate_triton, gated_halves_triton, gated_triton

NAMES = ["silu", "gelu", "gelu_tanh"]
# relative: one ulp in half precision, which interpreted kernels lose whole because they do not round to nearest
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# absolute: where the gate is nearly shut, 1 + erf and torch's 1 + tanh lose digits in float32
SMALLEST = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2**-14}


def formula(x: Tensor, name: str) -> Tensor:
    """Of float64, written out: no torch activation, whose backward is written by hand."""
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "gelu":
        return x * torch.special.erfc(-x / 2**0.5) / 2
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


def values(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (torch.randn(*shape) * 2).to(device, dtype).requires_grad_()


def with_gradients(out: Tensor, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


def assert_near(got: list[Tensor], want: list[Tensor], dtype: torch.dtype, times: float = 1) -> None:
    for here, there in zip(got, want, strict=True):
        torch.testing.assert_close(
            here.double(), there.double(), atol=times * SMALLEST[dtype], rtol=times * ROUNDING[dtype]
        )


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which kernels a test launches."""
    made: list[str] = []

    class Noting:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(swiglu_triton, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            made.append(self.name)
            return self.kernel[grid]  # type: ignore[no-any-return]

    for name in ("_forward_kernel", "_backward_kernel"):
        monkeypatch.setattr(swiglu_triton, name, Noting(name))
    return made


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 257), (2, 1100)])
def test_gated(shape: tuple[int, ...], name: str, dtype: torch.dtype, device: torch.device) -> None:
    gate, up = (values(*shape, dtype=dtype, device=device) for _ in range(2))
    upstream = torch.randn(shape).to(device, dtype)
    ours = with_gradients(gated_triton(gate, up, name), [gate, up], upstream)
    defined = with_gradients(gated(gate, up, name), [gate, up], upstream)
    wide = [x.detach().double().requires_grad_() for x in (gate, up)]
    exact = with_gradients(formula(wide[0], name) * wide[1], wide, upstream)
    assert all(x.dtype == dtype and x.is_contiguous() for x in ours)
    assert_near(ours, exact, dtype)
    assert_near(ours, defined, dtype, times=3)  # which rounds thrice where they round once


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_plain(name: str, dtype: torch.dtype, device: torch.device, launches: list[str]) -> None:
    x = values(3, 5, 33, dtype=dtype, device=device)
    upstream = torch.randn(x.shape).to(device, dtype)
    ours = with_gradients(activate_triton(x, name), [x], upstream)
    assert launches == ["_forward_kernel", "_backward_kernel"]
    wide = x.detach().double().requires_grad_()
    assert_near(ours, with_gradients(formula(wide, name), [wide], upstream), dtype)
    assert_near(ours, with_gradients(activate(x, name), [x], upstream), dtype, times=2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("shape", [(2,), (3, 14), (2, 3, 514), (2, 2200)])
def test_halves(
    shape: tuple[int, ...], name: str, dtype: torch.dtype, device: torch.device, launches: list[str]
) -> None:
    gate_up = values(*shape, dtype=dtype, device=device)
    inner = shape[-1] // 2
    upstream = torch.randn(*shape[:-1], inner).to(device, dtype)
    ours = with_gradients(gated_halves_triton(gate_up, name), [gate_up], upstream)
    assert launches == ["_forward_kernel", "_backward_kernel"]
    assert all(x.is_contiguous() for x in ours)
    wide = gate_up.detach().double().requires_grad_()
    exact = formula(wide[..., :inner], name) * wide[..., inner:]
    assert_near(ours, with_gradients(exact, [wide], upstream), dtype)
    assert_near(ours, with_gradients(gated_halves(gate_up, name), [gate_up], upstream), dtype, times=3)


def test_gradients_of_two_halves_are_two_halves(device: torch.device, launches: list[str]) -> None:
    fused = torch.randn(2, 3, 10, dtype=torch.float64, device=device)
    gate, up = (half.detach().requires_grad_() for half in fused.chunk(2, -1))
    _, gate_grad, up_grad = with_gradients(gated_triton(gate, up, "silu"), [gate, up], torch.ones(2, 3, 5).to(device))
    assert launches == ["_forward_kernel", "_backward_kernel"]
    assert gate_grad.untyped_storage().data_ptr() == up_grad.untyped_storage().data_ptr()
    assert gate_grad.stride() == up_grad.stride() == (30, 10, 1)
    assert (gate_grad.storage_offset(), up_grad.storage_offset()) == (0, 5)
    _, *want = with_gradients(gated(gate, up, "silu"), [gate, up], torch.ones(2, 3, 5).to(device))
    assert_near([gate_grad, up_grad], want, torch.float64)
    # in the other order they are not, nor are other slices
    for pair in ((up, gate), (fused[..., :4], fused[..., 5:9]), (fused[:, :1, :5], fused[:, 1:2, :5])):
        gate, up = (half.detach().requires_grad_() for half in pair)
        _, *got = with_gradients(gated_triton(gate, up, "gelu"), [gate, up], torch.ones_like(gate))
        _, *want = with_gradients(gated(gate, up, "gelu"), [gate, up], torch.ones_like(gate))
        assert_near(got, want, torch.float64)
        assert all(x.is_contiguous() for x in got)


@pytest.mark.parametrize("name", NAMES)
def test_any_strides(name: str, device: torch.device) -> None:
    base = torch.randn(4, 6, 9, dtype=torch.float64, device=device)
    gates = [base.permute(2, 1, 0), base[::2, 1:4, ::2], base[:1].expand(3, 6, 9), base[..., :5], base.mT]
    ups = [x.detach().clone().mT.contiguous().mT for x in gates]
    for pair in (*zip(gates, ups, strict=True), *zip(ups, gates, strict=True)):
        gate, up = (x.detach().requires_grad_() for x in pair)
        upstream = torch.randn_like(gate.mT).mT
        ours = with_gradients(gated_triton(gate, up, name), [gate, up], upstream)
        assert_near(ours, with_gradients(gated(gate, up, name), [gate, up], upstream), torch.float64)
        one = torch.ones((), dtype=torch.float64, device=device).expand(gate.shape)
        ours = with_gradients(activate_triton(gate, name), [gate], one)
        assert_near(ours, with_gradients(activate(gate, name), [gate], one), torch.float64)
    fused = base[:, :, 1:7].detach().requires_grad_()
    upstream = torch.randn(4, 6, 1, dtype=torch.float64, device=device).expand(4, 6, 3)
    ours = with_gradients(gated_halves_triton(fused, name), [fused], upstream)
    assert_near(ours, with_gradients(gated_halves(fused, name), [fused], upstream), torch.float64)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's words for what a GPU does in silence
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_far_from_zero_the_gate_is_open_or_shut(name: str, dtype: torch.dtype, device: torch.device) -> None:
    far = torch.tensor([30.0, 1e2, 1e4, 1e8, 1e18, 3e38]).to(device, dtype)
    for sign, wanted in ((1, torch.ones_like(far)), (-1, torch.zeros_like(far))):
        x = (far * sign).requires_grad_()
        out, slope = with_gradients(activate_triton(x, name), [x], torch.ones_like(x))
        atol = 0 if sign == 1 else 1e-10  # silu(-30) is -3e-12
        rtol = 2**-7 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(out, wanted * x.detach(), atol=atol, rtol=rtol)
        torch.testing.assert_close(slope, wanted, atol=atol, rtol=rtol)


@pytest.mark.parametrize("name", NAMES)
def test_near_zero_and_in_the_tail_nothing_is_lost(name: str, device: torch.device) -> None:
    """Relative to the result, in float64: of gelu_tanh's negative tail (1 + tanh) / 2 would lose all digits."""
    x = torch.tensor([-5.0, -3.0, -1e-3, -1e-12, 0.0, 1e-12, 1e-3, 3.0, 5.0], dtype=torch.float64, device=device)
    x.requires_grad_()
    ours = with_gradients(activate_triton(x, name), [x], torch.ones_like(x))
    wide = x.detach().requires_grad_()
    exact = with_gradients(formula(wide, name), [wide], torch.ones_like(x))
    for here, there in zip(ours, exact, strict=True):
        torch.testing.assert_close(here, there, atol=0, rtol=1e-9)


def test_nan_stays(device: torch.device) -> None:
    x = torch.tensor([float("nan"), 1.0], device=device, requires_grad=True)
    for name in NAMES:
        for result in with_gradients(activate_triton(x, name), [x], torch.ones_like(x)):
            assert result.isnan().tolist() == [True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_rounded_once(name: str, device: torch.device) -> None:
    if launch_triton.INTERPRETED:
        pytest.skip("interpreted kernels cut off where they should round")
    gate, up = (values(64, 1024, dtype=torch.bfloat16, device=device) for _ in range(2))
    exact = formula(gate.double(), name) * up.double()
    torch.testing.assert_close(gated_triton(gate, up, name).double(), exact, atol=1e-6, rtol=2**-8 * 1.01)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)])
def test_nothing_is_nothing(shape: tuple[int, ...], device: torch.device, launches: list[str]) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    gated_triton(x, x, "silu").sum().backward()
    gated_halves_triton(x, "silu").sum().backward()
    activate_triton(x, "gelu").sum().backward()
    assert x.grad is not None and x.grad.shape == shape and not launches


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, device: torch.device) -> None:
    gate, up = (torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(lambda a, b: gated_triton(a, b, name), (gate, up), fast_mode=True)
    torch.autograd.gradcheck(lambda a: gated_triton(a, a[:, [2, 0, 1]], name), (gate,), fast_mode=True)
    torch.autograd.gradcheck(lambda a: activate_triton(a, name), (gate,), fast_mode=True)
    fused = torch.randn(2, 6, dtype=torch.float64, device=device, requires_grad=True)
    torch.autograd.gradcheck(lambda a: gated_halves_triton(a, name), (fused,), fast_mode=True)
    torch.autograd.gradcheck(lambda a: gated_triton(*a.chunk(2, -1), name), (fused,), fast_mode=True)


def test_backward_may_run_again(device: torch.device) -> None:
    """As in a zero-bubble pipeline: nothing that is kept, nor the gradient that comes in, is written."""
    gate_up = torch.randn(3, 8, device=device, requires_grad=True)
    out = gated_halves_triton(gate_up, "silu")
    upstream = torch.randn_like(out)
    first, second = (torch.autograd.grad(out, gate_up, upstream, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_what_is_refused(device: torch.device) -> None:
    x = torch.randn(2, 3, device=device)
    for wrong in (torch.randn(2, 4, device=device), x.double()):
        with pytest.raises(ValueError, match="one shape and dtype"):
            gated_triton(x, wrong, "silu")
    with pytest.raises(ValueError, match="even"):
        gated_halves_triton(x, "silu")
    for door in (activate_triton, activate):
        call: Callable[..., Any] = door
        with pytest.raises(KeyError, match="relu"):
            call(x, "relu")


def test_no_triton_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_triton, "INTERPRETED", False)
    with pytest.raises(UnavailableError, match="eager"):
        activate_triton(torch.randn(2, 3), "silu")


def test_the_oracle_is_torchs(device: torch.device) -> None:
    x = torch.linspace(-6, 6, 50, dtype=torch.float64, device=device)
    torch.testing.assert_close(formula(x, "silu"), functional.silu(x), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(formula(x, "gelu"), functional.gelu(x), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(formula(x, "gelu_tanh"), functional.gelu(x, approximate="tanh"), atol=1e-12, rtol=1e-12)
