"""The door to apex, with stand-ins for both packages of that name: neither is installed where tests run.

The stand-in for NVIDIA's has the shape of its sources of July 2026: state of moments only, steps counted by group, and
a kernel that is launched at the last chunk of a list, so that tensors before an empty last one are left alone.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatron.config.errors import CheckpointError, ConfigError, UnavailableError
from megatron.config.schema import OptimizerSection
from megatron.optim import apex_adam
from megatron.optim.build import build_optimizer, flatten_state, load_state

TORCH = OptimizerSection(weight_decay=0.3)
APEX = OptimizerSection(implementation="apex", weight_decay=0.3)
SHAPES = {"embedding.weight": (9, 4), "layers.0.mlp.up.weight": (8, 4), "final_norm.weight": (4,), "head.bias": (0,)}


class FusedAdam(torch.optim.Optimizer):
    def __init__(  # type: ignore[no-untyped-def]
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0
    ) -> None:
        assert bias_correction
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        assert adam_w_mode

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            with_gradient = [p for p in group["params"] if p.grad is not None]
            for p in with_gradient:
                if len(self.state[p]) == 0:
                    self.state[p] |= {key: torch.zeros_like(p.data).float() for key in ("exp_avg", "exp_avg_sq")}
            if with_gradient and with_gradient[-1].numel():
                for p in with_gradient:
                    self._kernel(p, p.grad, group)

    def _kernel(self, p: Tensor, gradient: Tensor, group: dict) -> None:  # type: ignore[type-arg]
        (first, second), steps, moments = group["betas"], group["step"], self.state[p]
        moments["exp_avg"].mul_(first).add_(gradient, alpha=1 - first)
        moments["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        mean, square = moments["exp_avg"] / (1 - first**steps), moments["exp_avg_sq"] / (1 - second**steps)
        p.sub_(group["lr"] * (mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * p))


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: object) -> None:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    made.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "apex", __path__=[])
    module(monkeypatch, "apex.optimizers", FusedAdam=FusedAdam)
    module(monkeypatch, "amp_C")
    monkeypatch.setattr(apex_adam, "_has_gpu", lambda: True)


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def step(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor], number: int) -> None:
    for name, gradient in weights(100 + number).items():
        parameters[name].grad = gradient
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * (number + 1)
    optimizer.step()


@pytest.mark.usefixtures("nvidias")
def test_a_run_changes_between_apex_and_torch_at_every_step() -> None:
    """Each step by a new optimizer that takes over the last one's state, against one optimizer of torch."""
    plain, mixed = weights(0), weights(0)
    reference = build_optimizer(plain, TORCH)
    state: dict[str, Tensor] = {}
    for number in range(6):
        step(reference, plain, number)
        section = (APEX, TORCH)[number % 2]
        optimizer = build_optimizer(mixed, section)
        load_state(optimizer, mixed, section, state)
        step(optimizer, mixed, number)
        state = {place: value.clone() for place, value in flatten_state(optimizer, mixed).items()}
        expected = flatten_state(reference, plain)
        assert state.keys() == expected.keys()
        assert {float(state[place]) for place in state if place.endswith("/step")} == {number + 1}
        for place, value in expected.items():
            torch.testing.assert_close(state[place], value, msg=place)
    for name in SHAPES:
        torch.testing.assert_close(mixed[name], plain[name], msg=name)


@pytest.mark.usefixtures("nvidias")
def test_a_reset_starts_counting_anew() -> None:
    used, fresh = weights(0), weights(0)
    optimizer = build_optimizer(used, APEX)
    for number in range(3):
        step(optimizer, used, number)
    for name, tensor in weights(0).items():
        used[name].copy_(tensor)
    optimizer.state.clear()
    step(optimizer, used, 0)
    step(build_optimizer(fresh, APEX), fresh, 0)
    assert all(torch.equal(used[name], fresh[name]) for name in SHAPES)


@pytest.mark.usefixtures("nvidias")
def test_a_rank_may_hold_nothing_at_all() -> None:
    empty = {"head.weight": torch.empty(0, 4)}
    optimizer = build_optimizer(empty, APEX)
    empty["head.weight"].grad = torch.empty(0, 4)
    optimizer.step()
    assert {place: tuple(value.shape) for place, value in flatten_state(optimizer, empty).items()} == {
        "head.weight/exp_avg": (0, 4),
        "head.weight/exp_avg_sq": (0, 4),
        "head.weight/step": (),
    }


@pytest.mark.usefixtures("nvidias")
def test_what_fused_adam_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="updates float32 weights, and these are torch.float64"):
        build_optimizer({"head.weight": torch.zeros(2, 2, dtype=torch.float64)}, APEX)
    parameters = weights(0)
    optimizer = build_optimizer(parameters, APEX)
    step(optimizer, parameters, 0)
    state = flatten_state(optimizer, parameters) | {"embedding.weight/step": torch.tensor(7.0)}
    load_state(optimizer, parameters, APEX, state)
    with pytest.raises(CheckpointError, match="parameters after 1 and after 7 steps"):
        step(optimizer, parameters, 1)


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(words: str) -> None:
        with pytest.raises(UnavailableError, match=words):
            build_optimizer(weights(0), APEX)

    monkeypatch.setitem(sys.modules, "apex", None)
    monkeypatch.delitem(sys.modules, "apex")
    refused(r"NVIDIA apex is not installed \(PyPI's apex is another package\): install NVIDIA's from its sources \(git")
    module(monkeypatch, "apex", __path__=[])
    refused(r"has no apex.optimizers.FusedAdam .*pip uninstall apex, then install NVIDIA's")
    module(monkeypatch, "apex.optimizers", FusedAdam=FusedAdam)
    refused("without its CUDA extension amp_C")
    module(monkeypatch, "amp_C")
    monkeypatch.setattr(apex_adam, "_has_gpu", lambda: False)
    refused("there is no GPU here")
