"""The engine with Triton's kernels, interpreted, against the definitions."""

from __future__ import annotations

import pytest
import torch
from engines.made_rows import two_rows

from megatron.config.model_shape import resolve_model
from megatron.config.schema import ModelSection, OptimizerSection, ParallelSection, TrainSection
from megatron.engines.build import build_engine
from megatron.kernels.choice import Kernels
from megatron.kernels.launch_triton import INTERPRETED

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="Triton was loaded for GPUs, and torch sees none"
)
SHAPE = resolve_model(ModelSection(preset="llama-tiny", hidden_size=32, intermediate_size=48, seq_length=8), 60)
TRITON = Kernels(attention="sdpa", norm="triton", rope="triton", activation="triton", cross_entropy="triton")


@pytest.mark.parametrize("gradients", ["fp32", "bf16"])
def test_a_bf16_step_of_triton_kernels_alone(gradients: str) -> None:
    """Norms, positions, activations, loss, norm of the gradient, clipping, AdamW and the copy that computes."""
    train = TrainSection(global_batch_size=2, gradients=gradients)  # type: ignore[arg-type]
    ours = build_engine(
        SHAPE, OptimizerSection(implementation="triton"), ParallelSection(), train, 3, "bf16", kernels=TRITON
    )
    theirs = build_engine(SHAPE, OptimizerSection(), ParallelSection(), train, 3, "bf16")
    assert ours.describe()["optimizer"] == "AdamW, this project's Triton kernel"
    for step in range(3):
        got, want = (engine.train_step([two_rows(step, 60, 8, 0.2)], 1e-3) for engine in (ours, theirs))
        assert got.loss == pytest.approx(want.loss, rel=5e-3)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=3e-2)
    copies = ours._weights.copies()  # type: ignore[attr-defined]
    for item in ours._weights.held:  # type: ignore[attr-defined]
        torch.testing.assert_close(copies[item.name].float(), item.local, atol=0, rtol=2**-7)


def test_an_fp32_step_of_triton_kernels_is_the_definitions_but_for_rounding() -> None:
    train = TrainSection(global_batch_size=2)
    section = OptimizerSection(implementation="triton", eps=1e-3)
    ours = build_engine(SHAPE, section, ParallelSection(), train, 3, "fp32", kernels=TRITON)
    theirs = build_engine(SHAPE, OptimizerSection(eps=1e-3), ParallelSection(), train, 3, "fp32")
    for step in range(2):
        got, want = (
            engine.train_step([two_rows(step, 60, 8, 0.2), two_rows(step + 9, 60, 8, 0.2)], 1e-3)
            for engine in (ours, theirs)
        )
        assert got.loss == pytest.approx(want.loss, rel=1e-5)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
