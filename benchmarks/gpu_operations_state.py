"""Operations over a whole model's tensors, as `gpu.py` checks and times them: AdamW, and the norm of all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_operations import Call, Inputs, Maker, Operation, Sizes, Traffic, Way, imported
from torch import Tensor

from megatron.kernels.adamw import AdamWTensors, join_master, split_master

BETAS, EPS, LR, DECAY, STEPS = (0.9, 0.95), 1e-8, 1e-3, 0.1, 7.0
BF16, FP32 = torch.bfloat16, torch.float32


def _cut(sizes: Sizes) -> list[int]:
    """A model's tensors: large ones, one of an odd size, and a few small ones, together `elements`."""
    small = [2048, 1, 7] if sizes["elements"] > 1 << 16 else [3, 1]
    large = (sizes["elements"] - sum(small)) // 3
    return [large, large, sizes["elements"] - sum(small) - 2 * large, *small]


def _adamw_inputs(gradient: torch.dtype, copied: bool, split: bool) -> Callable[[Sizes, Maker], Inputs]:
    def inputs(sizes: Sizes, make: Maker) -> Inputs:
        masters = [make.normal(n, grad=False, dtype=FP32) for n in _cut(sizes)]
        made: Inputs = {
            "parameters": masters,
            "gradients": [make.normal(len(p), scale=0.1, grad=False, dtype=gradient) for p in masters],
            "means": [make.normal(len(p), scale=0.1, grad=False, dtype=FP32) for p in masters],
            "squares": [make.normal(len(p), scale=0.1, grad=False, dtype=FP32).square_() for p in masters],
            "copies": [p.to(BF16) for p in masters] if copied else [],
            "lows": [],
        }
        if split:
            made["parameters"], made["lows"] = map(list, zip(*map(split_master, masters), strict=True))
        return made

    return inputs


def _numbers(device: torch.device, count: int) -> tuple[Any, ...]:
    """Steps, rate and decays; a factor on gradients and no reason to stop, as the engine gives them on a GPU."""
    steps = torch.full((count,), STEPS, device=device)
    rate, factor = (torch.tensor(x, dtype=torch.float64, device=device) for x in (LR, 0.5))
    return steps, rate, [DECAY] * count, BETAS, EPS, factor, torch.zeros((), device=device)


def _adamw(module: str, name: str) -> Way:
    def way(inputs: Inputs) -> Call:
        function, tensors = imported(module, name), AdamWTensors(**inputs)
        numbers = _numbers(tensors.parameters[0].device, len(tensors.parameters))

        def call() -> Any:
            function(tensors, *numbers)
            return _after(tensors)

        return call

    return way


def _after(tensors: AdamWTensors) -> tuple[Any, ...]:
    return tensors.parameters, tensors.means, tensors.squares, tensors.copies, tensors.lows


def _settled(result: Any) -> Any:
    """Halves are compared as the masters that they make up."""
    parameters, means, squares, copies, lows = result
    masters = [join_master(*halves) for halves in zip(parameters, lows, strict=True)] if lows else parameters
    return masters, means, squares, copies


def _adamw_reference(inputs: Inputs) -> Call:
    """float64 of the same numbers; a copy is its master."""
    function = imported("adamw", "adamw_step")
    lows, copies = inputs["lows"], inputs["copies"]
    masters = [join_master(*halves) for halves in zip(inputs["parameters"], lows, strict=True)] if lows else None
    wide = {key: [x.double() for x in inputs[key]] for key in ("gradients", "means", "squares")}
    tensors = AdamWTensors([x.double() for x in masters or inputs["parameters"]], **wide)
    numbers = _numbers(tensors.parameters[0].device, len(tensors.parameters))

    def call() -> Any:
        function(tensors, *numbers)
        return tensors.parameters, tensors.means, tensors.squares, tensors.parameters if copies else []

    return call


def _torch_fused(inputs: Inputs) -> Call:
    """torch's own fused AdamW over the same float32 tensors; copies, where there are any, by one more pass."""
    masters = [torch.nn.Parameter(x) for x in inputs["parameters"]]
    optimizer: Any = torch.optim.AdamW(masters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
    device = masters[0].device
    if device.type == "cuda":
        optimizer.grad_scale, optimizer.found_inf = torch.full((), 2.0, device=device), torch.zeros((), device=device)
    factor = 1.0 if device.type == "cuda" else 0.5
    for index, master in enumerate(masters):
        master.grad = inputs["gradients"][index].to(FP32) * factor
        state = {"step": torch.full((), STEPS, device=device), "exp_avg": inputs["means"][index]}
        optimizer.state[master] = state | {"exp_avg_sq": inputs["squares"][index]}

    def call() -> Any:
        optimizer.step()
        if inputs["copies"]:
            torch._foreach_copy_(inputs["copies"], [p.detach() for p in masters])
        return [p.detach() for p in masters], inputs["means"], inputs["squares"], inputs["copies"], []

    return call


def _state_traffic(bytes_an_element: int) -> Callable[[Sizes, int], Traffic]:
    return lambda sizes, _: Traffic(bytes_an_element * sizes["elements"])


def _adamw_operation(name: str, moved: int, gradient: torch.dtype, copied: bool, split: bool) -> Operation:
    ways: dict[str, Way] = {"eager": _adamw("adamw", "adamw_step")}
    if not split and gradient == FP32:
        ways["torch, fused"] = _torch_fused
    ways["triton"] = _adamw("adamw_triton", "adamw_step_triton")
    return Operation(
        name,
        _adamw_inputs(gradient, copied, split),
        ways,
        _state_traffic(moved),
        ({"elements": 1 << 24}, {"elements": 99991}),
        ({"elements": 1 << 29},),
        ({"elements": 300},),
        reference=_adamw_reference,
        settled=_settled,
        dtypes=(FP32,),
    )


def _norm_inputs(sizes: Sizes, make: Maker) -> Inputs:
    return {"tensors": [make.normal(n, grad=False) for n in _cut(sizes)]}


def _foreach(inputs: Inputs) -> Call:
    """As engines/held.py sums them: one norm a tensor, in float32, then their squares."""

    def call() -> Tensor:
        norms = torch._foreach_norm(inputs["tensors"], 2, FP32)
        return torch.stack(norms).double().square().sum()

    return call


def _norm_way(module: str, name: str) -> Way:
    def way(inputs: Inputs) -> Call:
        function = imported(module, name)
        return lambda: function(inputs["tensors"])

    return way


STATE = (
    _adamw_operation("adamw, fp32 gradient, bf16 copy", 30, FP32, copied=True, split=False),
    _adamw_operation("adamw, two halves, bf16 gradient", 26, BF16, copied=False, split=True),
    _adamw_operation("adamw, bf16 gradient and copy", 28, BF16, copied=True, split=False),
    _adamw_operation("adamw, fp32", 28, FP32, copied=False, split=False),
    Operation(
        "squared_norm",
        _norm_inputs,
        {
            "eager": _norm_way("gradient_norm", "squared_norm"),
            "torch, foreach": _foreach,
            "triton": _norm_way("gradient_norm_triton", "squared_norm_triton"),
        },
        lambda sizes, item: Traffic(item * sizes["elements"]),
        ({"elements": 1 << 24}, {"elements": 99991}),
        ({"elements": 1 << 30},),
        ({"elements": 300},),
        tolerances={torch.float64: 1e-5},
    ),
)
