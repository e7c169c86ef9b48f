"""What only a GPU can show of the engine: no wait in a step, and the same losses as on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engines.made_rows import two_rows

from megatron.config.model_shape import resolve_model
from megatron.config.schema import ModelSection, OptimizerSection, ParallelSection, TrainSection
from megatron.engines.base import Engine
from megatron.engines.build import build_engine
from megatron.kernels.choice import Kernels
from megatron.parallel.mesh import one_process_mesh

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none"),
]
SHAPE = resolve_model(ModelSection(preset="llama-tiny", head_dim=64, seq_length=128), 500)
TRAIN = TrainSection(global_batch_size=4, micro_batch_size=2)
TRITON = {"norm": "triton", "rope": "triton", "activation": "triton", "cross_entropy": "triton"}
COMPILED = {"norm": "compile", "rope": "compile", "activation": "compile", "compile_layers": True}


def engine(device: str, precision: str, implementation: str = "torch", **kernels: object) -> Engine:
    chosen = Kernels(**({"attention": "blockwise" if device == "cpu" else "sdpa"} | kernels))  # type: ignore[arg-type]
    section = OptimizerSection.model_validate({"implementation": implementation})
    mesh = one_process_mesh(torch.device(device))
    return build_engine(SHAPE, section, ParallelSection(), TRAIN, 3, precision, mesh, kernels=chosen)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """torch raises where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernels", [{}, TRITON, COMPILED, {"attention": "varlen"}, {"attention": "flex"}], ids=str)
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_the_losses_of_a_cpu(kernels: dict[str, object], implementation: str) -> None:
    ours, theirs = engine("cuda", "bf16", implementation, **kernels), engine("cpu", "fp32")
    for step in range(4):
        batch = [two_rows(2 * step, 500, 128, 0.03), two_rows(2 * step + 1, 500, 128, 0.03)]
        got, want = (one.train_step(batch, 1e-3) for one in (ours, theirs))
        assert got.loss == pytest.approx(want.loss, rel=1e-2)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=5e-2)
        assert got.valid_targets == want.valid_targets and got.updated


@pytest.mark.parametrize("kernels", [{}, TRITON, COMPILED], ids=str)
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_step_is_launched_without_a_wait(
    kernels: dict[str, object], implementation: str, request: pytest.FixtureRequest
) -> None:
    ours = engine("cuda", "bf16", implementation, **kernels)
    for seed in range(3):  # compiles, and makes what is made once
        ours.train_step([two_rows(seed, 500, 128, 0.03), two_rows(seed + 9, 500, 128, 0.03)], 1e-3)
    batch = [two_rows(5, 500, 128, 0.03), two_rows(6, 500, 128, 0.03)]
    torch.cuda.synchronize()
    request.getfixturevalue("no_waiting")
    step = ours.launch_step(batch, 1e-3)
    assert not step.ready
    torch.cuda.set_sync_debug_mode("default")
    assert step.result().updated


def test_a_step_is_looked_at_while_later_work_runs() -> None:
    """Its numbers are copied behind what computes them, and nobody waits for what was launched since."""
    ours = engine("cuda", "bf16")
    for seed in range(2):
        ours.train_step([two_rows(seed, 500, 128, 0.03)], 1e-3)
    torch.cuda.synchronize()
    step = ours.launch_step([two_rows(5, 500, 128, 0.03)], 1e-3)
    torch.cuda._sleep(1 << 31)  # about a second
    assert step.result().updated
    assert not torch.cuda.current_stream().query(), "the host waited for what came after the step"
    torch.cuda.synchronize()
