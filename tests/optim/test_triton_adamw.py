"""The optimizer around Triton's AdamW, by the calls that engines make, against torch's; interpreted without a GPU."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from torch import Tensor

from megatron.config.errors import CheckpointError, UnavailableError
from megatron.config.schema import OptimizerSection
from megatron.kernels.adamw import join_master, split_master
from megatron.optim import triton_adamw
from megatron.optim.build import build_optimizer, describe_optimizer, flatten_state, load_state, state_keys
from megatron.optim.triton_adamw import TritonAdamW

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any test imports a kernel: Triton reads it when one is declared
launch_triton = importlib.import_module("megatron.kernels.launch_triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TORCH = OptimizerSection(weight_decay=0.3)
OURS = OptimizerSection(implementation="triton", weight_decay=0.3)
SHAPES = {"embedding.weight": (9, 4), "layers.0.mlp.up.weight": (8, 4), "final_norm.weight": (4,), "head.bias": (0,)}
CLOSE = {"rtol": 1e-6, "atol": 3e-7}


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    return {name: tensor.to(DEVICE, dtype) for name, tensor in drawn.items()}


def step(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor], number: int) -> None:
    for name, gradient in weights(100 + number, next(iter(parameters.values())).dtype).items():
        parameters[name].grad = gradient
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * (number + 1)
    optimizer.step()


def triton(parameters: dict[str, Tensor]) -> TritonAdamW:
    optimizer = build_optimizer(parameters, OURS)
    assert isinstance(optimizer, TritonAdamW)
    return optimizer


def by_parameter(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> dict[Tensor, Tensor]:
    return {parameters[name]: value for name, value in values.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_a_run_changes_between_triton_and_torch_at_every_step(dtype: torch.dtype) -> None:
    """Each step by a new optimizer that takes over the last one's state, against one optimizer of torch."""
    plain, mixed = weights(0, dtype), weights(0, dtype)
    reference = build_optimizer(plain, TORCH)
    state: dict[str, Tensor] = {}
    for number in range(6):
        step(reference, plain, number)
        section = (OURS, TORCH)[number % 2]
        optimizer = build_optimizer(mixed, section)
        load_state(optimizer, mixed, section, state)
        step(optimizer, mixed, number)
        state = {place: value.clone() for place, value in flatten_state(optimizer, mixed).items()}
        expected = flatten_state(reference, plain)
        assert state.keys() == expected.keys()
        assert state.keys() == {f"{n}/{key}" for n, s in SHAPES.items() for key in state_keys(OURS, n, len(s))}
        for place, value in expected.items():
            torch.testing.assert_close(state[place], value, **CLOSE)
    for name in SHAPES:
        torch.testing.assert_close(mixed[name], plain[name], **CLOSE)


def test_a_reset_starts_counting_anew_and_a_resumed_state_goes_on() -> None:
    used, fresh = weights(0), weights(0)
    optimizer = triton(used)
    for number in range(3):
        step(optimizer, used, number)
    saved = {place: value.clone() for place, value in flatten_state(optimizer, used).items()}
    there = {name: value.clone() for name, value in used.items()}
    resumed = triton(there)
    load_state(resumed, there, OURS, saved)
    step(optimizer, used, 3)
    step(resumed, there, 3)
    assert all(torch.equal(used[name], there[name]) for name in SHAPES)
    for name, tensor in weights(0).items():
        used[name].copy_(tensor)
    optimizer.state.clear()
    step(optimizer, used, 0)
    step(triton(fresh), fresh, 0)
    assert all(torch.equal(used[name], fresh[name]) for name in SHAPES)
    assert float(flatten_state(optimizer, used)["embedding.weight/step"]) == 1


def test_gradients_are_given_narrow_clipped_and_dropped_by_a_flag() -> None:
    """What needs no host: gradients by parameter in bfloat16, a factor and a flag on the device, copies."""
    ours, theirs = weights(0), weights(0)
    copies = {name: torch.zeros_like(value, dtype=torch.bfloat16) for name, value in ours.items()}
    optimizer, reference = triton(ours), build_optimizer(theirs, TORCH)
    optimizer.write_copies(by_parameter(ours, copies))
    scale, flag = torch.tensor(0.5, dtype=torch.float64, device=DEVICE), torch.zeros((), device=DEVICE)
    for number in range(4):
        flag.fill_(float(number == 2))
        gradients = weights(100 + number, torch.bfloat16)
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 0.1
        optimizer.step(gradients=by_parameter(ours, gradients), scale=scale, found_inf=flag)
        for name, gradient in gradients.items():
            theirs[name].grad = gradient.float() * 0.5
        if number != 2:
            reference.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], **CLOSE)
        torch.testing.assert_close(copies[name].float(), ours[name], rtol=2.0**-7, atol=0.0)
    steps = [value for place, value in flatten_state(optimizer, ours).items() if place.endswith("/step")]
    assert [float(value) for value in steps] == [3.0] * len(SHAPES)


def test_masters_in_halves_step_as_whole_ones_and_their_state_is_wide() -> None:
    whole = weights(0)
    halves = {name: split_master(value) for name, value in weights(0).items()}
    highs, lows = ({name: pair[place] for name, pair in halves.items()} for place in (0, 1))
    plain, split = triton(whole), triton(highs)
    split.in_halves(by_parameter(highs, lows))
    for number in range(3):
        gradients = weights(100 + number, torch.bfloat16)
        for optimizer, parameters in ((plain, whole), (split, highs)):
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            optimizer.step(gradients=by_parameter(parameters, gradients))
        state = {place: value.clone() for place, value in flatten_state(split, highs).items()}
        load_state(split, highs, OURS, state)
    for name in SHAPES:
        torch.testing.assert_close(join_master(highs[name], lows[name]), whole[name], rtol=0.0, atol=0.0)
    assert state["embedding.weight/exp_avg"].dtype == torch.float32
    state["embedding.weight/exp_avg"] = state["embedding.weight/exp_avg"].bfloat16()
    with pytest.raises(CheckpointError, match="the model needs torch.float32"):
        load_state(split, highs, OURS, state)


def test_a_parameter_without_a_gradient_keeps_its_count_and_rates_may_be_tensors() -> None:
    """Groups may differ in their rate, and a rate on the device is read at each step."""
    ours, theirs = weights(0), weights(0)
    optimizer, reference = triton(ours), build_optimizer(theirs, TORCH)
    rate = torch.zeros((), device=DEVICE)
    for number in range(4):
        rate.fill_(0.01 * (number + 1))
        for made, parameters in ((optimizer, ours), (reference, theirs)):
            for name, gradient in weights(100 + number).items():
                parameters[name].grad = None if number % 2 and name != "final_norm.weight" else gradient
            made.param_groups[0]["lr"] = rate if made is optimizer else 0.01 * (number + 1)
            made.param_groups[1]["lr"] = 0.5
            made.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], **CLOSE)
    state = flatten_state(optimizer, ours)
    assert [float(state[f"{name}/step"]) for name in SHAPES] == [2.0, 2.0, 4.0, 2.0]
    for parameter in ours.values():
        parameter.grad = None
    optimizer.step()
    assert float(state["final_norm.weight/step"]) == 4.0


def test_where_it_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_optimizer(OURS) == "AdamW, this project's Triton kernel"
    on_a_cpu = {"head.weight": torch.zeros(2, 2)}
    monkeypatch.setattr(launch_triton, "INTERPRETED", False)
    with pytest.raises(UnavailableError, match="its kernels run on GPUs, and weights are on cpu; set optimizer"):
        build_optimizer(on_a_cpu, OURS)
    monkeypatch.setattr(triton_adamw, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="triton is not installed: pip install triton, or set optimizer"):
        build_optimizer(on_a_cpu, OURS)
