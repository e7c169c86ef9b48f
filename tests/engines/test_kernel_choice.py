"""Kernels by config and by measurement, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.config.errors import UnavailableError
from megatron.config.kernel_checks import compiling_obstacle
from megatron.config.model_shape import resolve_model
from megatron.config.schema import KernelsSection, ModelSection, ParallelSection
from megatron.engines import kernel_choice, kernel_obstacles
from megatron.engines.base import KernelChoice
from megatron.engines.kernel_choice import choose_kernels
from megatron.kernels.choice import Kernels

SHAPE = resolve_model(ModelSection(preset="llama-tiny", seq_length=16), 64)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def choose(measure: Callable[[Kernels], float] | None = None, **asked: Any) -> KernelChoice:
    section = KernelsSection(**asked)
    return choose_kernels(section, SHAPE, torch.float32, (2, 16), device=CPU, measure=measure)


def test_on_a_cpu_the_definitions_run_and_it_is_said() -> None:
    choice = choose()
    kernels = Kernels(**choice.kernels)
    assert (kernels.norm, kernels.rope, kernels.activation, kernels.cross_entropy) == ("eager",) * 4
    assert kernels.attention == "blockwise" and not kernels.compile_layers
    assert "on CPUs the definitions run" in choice.reason


def test_what_is_asked_for_is_taken_without_a_clock() -> None:
    choice = choose(norm="compile", rope="compile", compile="layers", product="torch", attention="sdpa")
    kernels = Kernels(**choice.kernels)
    assert (kernels.norm, kernels.rope, kernels.activation) == ("compile", "compile", "eager")
    assert kernels.compile_layers and kernels.attention == "sdpa" and kernels.product == "torch"
    assert "norm, rope, attention, product, compile as asked for" in choice.reason


def test_the_quickest_of_each_operation_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "backend_obstacle", lambda backend, device: None)
    seconds = {"norm": {"eager": 5, "compile": 3, "triton": 1}, "rope": {"eager": 1, "compile": 2, "triton": 0.995}}
    tried = []

    def clock(kernels: Kernels) -> float:
        tried.append(kernels)
        return 10 + sum(times[getattr(kernels, operation)] for operation, times in seconds.items())

    choice = choose(clock, activation="eager", cross_entropy="eager", attention="sdpa", compile="none")
    kernels = Kernels(**choice.kernels)
    assert kernels.norm == "triton"
    assert kernels.rope == "eager", "half a percent is noise"
    assert kernels.activation == "eager" and kernels.attention == "sdpa"
    assert len(tried) == 1 + 2 + 2 and choice.milliseconds["norm triton"] == 1000 * (10 + 1 + 1)
    assert "norm triton 12000.00 ms" in choice.reason


def test_a_kernel_that_fails_is_passed_over_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "backend_obstacle", lambda backend, device: None)

    def clock(kernels: Kernels) -> float:
        if kernels.norm == "triton":
            raise RuntimeError("out of registers")
        return 1.0

    choice = choose(clock)
    assert Kernels(**choice.kernels).norm == "eager"
    assert "norm triton failed (RuntimeError: out of registers)" in choice.reason


def test_layers_that_cannot_be_compiled_run_as_they_are_unless_compiling_was_asked_for() -> None:
    def clock(kernels: Kernels) -> float:
        if kernels.compile_layers:
            raise RuntimeError("no compiler found\nsecond line")
        return 1.0

    choice = choose(clock)
    assert not Kernels(**choice.kernels).compile_layers
    assert "compiled layers failed (RuntimeError: no compiler found)" in choice.reason
    with pytest.raises(RuntimeError, match="no compiler found"):
        choose(clock, compile="layers")


def test_the_real_clock_times_a_step() -> None:
    probe = kernel_choice._Probe(SHAPE, torch.float32, (2, 16), CPU)
    assert probe.seconds(Kernels()) > 0 and probe.seconds(Kernels(attention="sdpa")) > 0


@pytest.mark.parametrize("operation", ["norm", "rope", "activation", "cross_entropy"])
def test_triton_without_a_gpu_is_refused_by_key(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.kernels import launch_triton

    monkeypatch.setattr(launch_triton, "INTERPRETED", False)
    with pytest.raises(UnavailableError, match=f"kernels.{operation} = triton cannot run here: Triton kernels run on"):
        choose(**{operation: "triton"})


def test_triton_that_is_not_installed_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_obstacles.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="the triton package is not installed"):
        choose(norm="triton")


@pytest.mark.parametrize("attention", ["varlen", "cudnn"])
def test_attention_of_gpus_is_refused_on_a_cpu(attention: str) -> None:
    with pytest.raises(UnavailableError, match=f"kernels.attention = {attention} cannot run here"):
        choose(attention=attention)


def test_fp8_is_refused_on_a_cpu() -> None:
    with pytest.raises(UnavailableError, match="kernels.fp8 = true cannot run here: it needs a GPU"):
        choose(fp8=True)


def test_layers_are_not_compiled_where_a_layout_forbids_it() -> None:
    why = compiling_obstacle(ParallelSection(pipeline=2, schedule="zero-bubble"), SHAPE)
    assert why is not None and "zero-bubble" in why
    tried: list[Kernels] = []

    def clock(kernels: Kernels) -> float:
        tried.append(kernels)
        return 1.0

    choose_kernels(KernelsSection(), SHAPE, torch.float32, (2, 16), why, device=CPU, measure=clock)
    assert tried and not any(kernels.compile_layers for kernels in tried)
    selective = ParallelSection(recompute="selective", recompute_policy="operations")
    assert compiling_obstacle(selective, SHAPE) is not None
    assert compiling_obstacle(ParallelSection(), replace(SHAPE, hidden_dropout=0.1)) is not None
    assert compiling_obstacle(ParallelSection(recompute="full"), SHAPE) is None


def test_interpreted_kernels_are_not_compiled_into_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.kernels import launch_triton

    monkeypatch.setattr(launch_triton, "INTERPRETED", True)
    with pytest.raises(UnavailableError, match="Triton is interpreted .* with norm; set kernels.compile to none"):
        choose(norm="triton", compile="layers")


def test_the_winner_of_the_products_is_named() -> None:
    choice = choose()
    assert f"matrix products by {choice.kernels['product']}: a linear map took by torch" in choice.reason
    assert "fp8" not in choice.reason and "product as asked for" in choose(product="torch").reason
