"""AdamW in one launch against torch's own, and a float32 master in two halves of 16 bits against its bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from kernels.counted_launches import counted
from torch import Tensor

from megatron.kernels import adamw, adamw_triton, tensor_table
from megatron.kernels.adamw import AdamWTensors, adamw_step, join_master, rounded_copy, split_master
from megatron.kernels.adamw_triton import adamw_step_triton

SHAPES = ((3, 7), (2048,), (5, 1000), (), (0, 4), (2049,))
DECAYS = (0.1, 0.0, 0.3, 0.1, 0.1, 0.0)
BETAS, EPS = (0.9, 0.95), 1e-8
STEPS = 12
Step = Callable[..., None]
BOTH = pytest.mark.parametrize("step", [adamw_step, adamw_step_triton], ids=["eager", "triton"])
CLOSE = {torch.float32: {"rtol": 1e-6, "atol": 5e-7}, torch.float64: {"rtol": 1e-13, "atol": 1e-15}}
"""Eight ulp of float32 after a dozen steps; atol is two of a parameter of 3, which it keeps where it passes zero."""


def drawn(seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in SHAPES]


def zeros(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [torch.zeros(shape, dtype=dtype, device=device) for shape in SHAPES]


def made(device: torch.device, dtype: torch.dtype = torch.float32) -> AdamWTensors:
    return AdamWTensors(drawn(0, device, dtype), (), zeros(device, dtype), zeros(device, dtype))


def train(
    step: Step,
    tensors: AdamWTensors,
    device: torch.device,
    gradient_dtype: torch.dtype,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    steps = torch.zeros(len(SHAPES), device=device)
    lr = torch.zeros((), dtype=torch.float64, device=device)
    for number in range(STEPS):
        gradients = drawn(100 + number, device, gradient_dtype)
        lr.fill_(0.01 * (number + 1))
        step(replace(tensors, gradients=gradients), steps, lr, DECAYS, BETAS, EPS, scale, found_inf)
    return steps


def torchs(device: torch.device, dtype: torch.dtype, gradient_dtype: torch.dtype, scale: float = 1.0) -> AdamWTensors:
    """The same by `torch.optim.AdamW`, tensor by tensor."""
    parameters = drawn(0, device, dtype)
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(parameters, DECAYS, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS, foreach=False)
    for number in range(STEPS):
        for parameter, gradient in zip(parameters, drawn(100 + number, device, gradient_dtype), strict=True):
            parameter.grad = gradient.to(dtype) * scale
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (number + 1)
        optimizer.step()
    states = [optimizer.state[parameter] for parameter in parameters]
    return AdamWTensors(parameters, (), [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states])


def masters(tensors: AdamWTensors) -> Sequence[Tensor]:
    if not tensors.lows:
        return tensors.parameters
    return [join_master(p, low) for p, low in zip(tensors.parameters, tensors.lows, strict=True) if low is not None]


def assert_same(ours: AdamWTensors, theirs: AdamWTensors, dtype: torch.dtype) -> None:
    for mine, its in (
        (masters(ours), theirs.parameters),
        (ours.means, theirs.means),
        (ours.squares, theirs.squares),
    ):
        for left, right in zip(mine, its, strict=True):
            torch.testing.assert_close(left, right.to(left.dtype), **CLOSE[dtype])


def in_halves(tensors: AdamWTensors) -> AdamWTensors:
    halves = [split_master(parameter) for parameter in tensors.parameters]
    return replace(tensors, parameters=[high for high, _ in halves], lows=[low for _, low in halves])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_steps_are_torchs(step: Step, dtype: torch.dtype, device: torch.device) -> None:
    ours = made(device, dtype)
    steps = train(step, ours, device, dtype)
    assert steps.tolist() == [STEPS] * len(SHAPES)
    assert_same(ours, torchs(device, dtype, dtype), dtype)
    assert_same(ours, torchs(device, torch.float64, dtype), dtype)


@BOTH
def test_narrow_gradients_are_scaled_and_a_copy_is_written(step: Step, device: torch.device) -> None:
    """The copy is the master rounded to the nearest, ties away from zero: what its high half would be."""
    ours = replace(made(device), copies=[*zeros(device, torch.bfloat16)[:-1], None])
    scale = torch.tensor(0.25, dtype=torch.float64, device=device)
    train(step, ours, device, torch.bfloat16, scale)
    assert_same(ours, torchs(device, torch.float32, torch.bfloat16, 0.25), torch.float32)
    for parameter, copy in zip(ours.parameters[:-1], ours.copies[:-1], strict=True):
        assert copy is not None
        assert torch.equal(copy, split_master(parameter)[0])


@BOTH
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_halves_step_as_their_master(step: Step, gradient: torch.dtype, device: torch.device) -> None:
    """Bit for bit: only where the master lies is different."""
    whole, halves = made(device), in_halves(made(device))
    train(step, whole, device, gradient)
    train(step, halves, device, gradient)
    for master, high, joined in zip(whole.parameters, halves.parameters, masters(halves), strict=True):
        assert torch.equal(joined, master)
        torch.testing.assert_close(high.float(), master, rtol=2.0**-8, atol=0.0)
    assert all(torch.equal(a, b) for a, b in zip(whole.squares, halves.squares, strict=True))


@BOTH
@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
def test_a_step_that_is_stopped_changes_nothing(step: Step, halves: bool, device: torch.device) -> None:
    tensors = in_halves(made(device)) if halves else replace(made(device), copies=drawn(7, device, torch.bfloat16))
    kept = [t.clone() for t in (*tensors.parameters, *tensors.means, *tensors.squares)]
    extras = [low if copy is None else copy for copy, low in tensors.extras()]
    kept_extras = [extra.clone() for extra in extras if extra is not None]
    steps = train(step, tensors, device, torch.float32, found_inf=torch.ones((), device=device))
    assert not steps.any()
    for before, after in zip(kept, (*tensors.parameters, *tensors.means, *tensors.squares), strict=True):
        assert torch.equal(before, after)
    assert all(torch.equal(a, b) for a, b in zip(kept_extras, extras, strict=True))
    train(step, tensors, device, torch.float32, found_inf=torch.zeros((), device=device))
    assert not torch.equal(kept[0], tensors.parameters[0])


@BOTH
def test_tensors_of_every_kind_step_together(step: Step, device: torch.device) -> None:
    """Masters, halves, copies, dtypes and views that no wide load may touch, each with its own steps and rate."""
    buffer = torch.zeros(1 + 300, device=device)
    odd = buffer[1:].copy_(torch.arange(300.0))
    double = torch.linspace(1, 2, 5, dtype=torch.float64, device=device)
    high, low = split_master(torch.linspace(-3, 3, 70, device=device))
    parameters = [odd, double, high]
    gradients = [torch.ones_like(odd), torch.ones_like(double), torch.full_like(high, 2.0)]
    moments = [[torch.zeros(p.shape, dtype=g, device=device) for p, g in zip(parameters, wide, strict=True)]
               for wide in [(torch.float32, torch.float64, torch.float32)] * 2]  # fmt: skip
    tensors = AdamWTensors(
        parameters, gradients, *moments, [torch.zeros_like(odd).half(), None, None], [None, None, low]
    )
    steps = torch.tensor([0.0, 3.0, 9.0], device=device)
    rates = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, device=device)
    expected = []
    for index, start in enumerate((torch.arange(300.0), torch.linspace(1, 2, 5), torch.linspace(-3, 3, 70))):
        g, t, lr = (1.0, 1.0, 2.0)[index], float(steps[index]) + 1, float(rates[index])
        mean, square = 0.1 * g / (1 - 0.9**t), 0.05 * g * g / (1 - 0.95**t)
        expected.append(start.double() * (1 - lr * DECAYS[index]) - lr * mean / (square**0.5 + EPS))
    step(tensors, steps, rates, DECAYS[:3], BETAS, EPS)
    assert steps.tolist() == [1.0, 4.0, 10.0]
    for master, right in zip((odd, double, join_master(high, low)), expected, strict=True):
        torch.testing.assert_close(master.double().cpu(), right, rtol=3e-7, atol=3e-7)
    assert buffer[0] == 0


@BOTH
def test_large_and_unusable_gradients(step: Step, device: torch.device) -> None:
    """1e30 squared is beyond float32, as in torch's own; a gradient that is no number reaches its own element only."""
    parameter, ours = torch.ones(40, device=device), torch.full((40,), 1e4, device=device)
    ours[3] = float("nan")
    means, squares = torch.zeros_like(parameter), torch.zeros_like(parameter)
    tensors = AdamWTensors([parameter], [ours], [means], [squares])
    step(tensors, torch.zeros(1, device=device), torch.tensor([0.5], device=device), [0.0], BETAS, EPS)
    assert parameter.isnan().nonzero().flatten().tolist() == [3]
    torch.testing.assert_close(parameter[:3], torch.full((3,), 0.5, device=device))


def special_patterns() -> Tensor:
    """Bits of float32: ends of every range, ties above and below even and odd halves, and a million drawn ones."""
    ends = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x7FFFFF, 0x800000, 0x3F800000, 0x7F7FFFFF, 0x7F7F8000]
    ties = [upper << 16 | lower for upper in (0x3F80, 0x3F81, 0x0000, 0x7F7F) for lower in (0x7FFF, 0x8000, 0x8001)]
    patterns = np.array([*ends, *ties, 0x7F800000], dtype=np.uint32)
    random = np.random.default_rng(0).integers(0, 1 << 32, 1_000_000, dtype=np.uint32)
    bits = np.concatenate([patterns, patterns | np.uint32(1 << 31), random])
    return torch.from_numpy(bits.view(np.int32))


def test_halves_are_exact_and_the_high_one_is_nearest() -> None:
    bits = special_patterns()
    masters = bits.view(torch.float32)
    number = ~masters.isnan()
    high, low = split_master(masters)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    joined = join_master(high, low)
    assert torch.equal(joined.view(torch.int32)[number], bits[number])
    assert torch.equal(joined.isnan(), masters.isnan()) and torch.equal(high.isnan(), masters.isnan())
    ties = (bits & 0xFFFF) == 0x8000
    even = masters.to(torch.bfloat16)
    assert torch.equal(high.view(torch.int16)[number & ~ties], even.view(torch.int16)[number & ~ties])
    away = number & ties & high.isfinite()
    error = (high.double() - masters.double()).abs()
    assert torch.equal(error[away], (even.double() - masters.double()).abs()[away])
    assert (high.double().abs() > masters.double().abs())[away].all()


def test_a_copy_is_the_high_half_and_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    masters = special_patterns().view(torch.float32)
    masters = masters[: len(masters) // 6 * 6].view(-1, 6)
    high, low = split_master(masters)
    monkeypatch.setattr(adamw, "_PIECE", 1000)
    copy = torch.zeros_like(high)
    rounded_copy(masters, copy)
    assert torch.equal(copy.view(torch.int16), high.view(torch.int16))
    for whole, part in zip((high, low), split_master(masters), strict=True):
        assert torch.equal(whole.view(torch.int16), part.view(torch.int16))
    number = ~masters.isnan()
    assert torch.equal(join_master(high, low)[number], masters[number])
    strided = join_master(high.t(), low.t()).t()
    assert torch.equal(strided[number], masters[number])
    with pytest.raises(ValueError, match="contiguous"):
        rounded_copy(masters.t(), copy.t())
    for master, narrow in ((masters.double(), torch.bfloat16), (masters, torch.float16)):
        copy = torch.zeros_like(master, dtype=narrow)
        rounded_copy(master, copy)
        assert torch.equal(copy.view(torch.int16), master.to(narrow).view(torch.int16)), "as torch rounds"


def test_a_kernel_splits_as_the_definition_does(device: torch.device) -> None:
    """A step of rate 0 joins and splits again; the moments are not asked."""
    bits = special_patterns()[:4096].to(device)
    masters = bits.view(torch.float32)
    high, low = split_master(masters)
    before = high.clone(), low.clone()
    still = [torch.zeros_like(masters) for _ in range(3)]
    tensors = AdamWTensors([high], still[:1], still[1:2], still[2:], lows=[low])
    adamw_step_triton(tensors, torch.zeros(1, device=device), torch.zeros((), device=device), [0.0], BETAS, EPS)
    assert torch.equal(high.view(torch.int16), before[0].view(torch.int16))
    assert torch.equal(low, before[1])


@BOTH
def test_what_does_not_fit_is_refused(step: Step, device: torch.device) -> None:
    one, steps, lr = torch.zeros(4, 2, device=device), torch.zeros(1, device=device), torch.zeros((), device=device)
    good = AdamWTensors([one], [one], [one], [one])

    def refused(words: str, steps: Tensor = steps, **changed: list[Tensor]) -> None:
        with pytest.raises(ValueError, match=words):
            step(replace(good, **changed), steps, lr, [0.0], BETAS, EPS)

    refused("1 parameters need as many gradients", gradients=[])
    refused("steps must be contiguous float32", steps=steps.double())
    refused("masters are float32, float64, or bfloat16", parameters=[one.half()])
    refused("a low half belongs to a bfloat16 high half", parameters=[one.bfloat16()])
    refused("a low half belongs to a bfloat16 high half", lows=[one.short()])
    refused("its low half is torch.int32, not int16", parameters=[one.bfloat16()], lows=[one.int()])
    refused("its moments must be torch.float32", means=[one.double()])
    refused("must have its shape, and all be contiguous", gradients=[one.t()])
    refused("must have its shape, and all be contiguous", gradients=[torch.zeros(2, 4, device=device).t()])
    step(AdamWTensors([], [], [], []), torch.zeros(0, device=device), lr, [], BETAS, EPS)


def test_a_step_is_two_launches_and_its_tables_are_made_once(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = counted(monkeypatch, adamw_triton, "_count_kernel", "_step_kernel")
    tensors = replace(made(device), gradients=drawn(1, device))
    steps, lr = torch.zeros(len(SHAPES), device=device), torch.zeros((), device=device)
    adamw_step_triton(tensors, steps, lr, DECAYS, BETAS, EPS)
    assert launches == ["_count_kernel", "_step_kernel"]
    monkeypatch.setattr(tensor_table, "_to_device", lambda *_: pytest.fail("a table was made again"))
    adamw_step_triton(tensors, steps, lr, DECAYS, BETAS, EPS)
