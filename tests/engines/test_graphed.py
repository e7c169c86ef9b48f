"""Microbatches by CUDA graphs: what is recorded and replayed, with a recorder of the test's own; and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engines.made_rows import Micro, two_rows
from torch import Tensor

from megatron.config.model_shape import resolve_model
from megatron.config.schema import ModelSection, OptimizerSection, ParallelSection, TrainSection
from megatron.engines.base import Engine
from megatron.engines.build import build_engine
from megatron.engines.graphed import cuda_capture
from megatron.kernels.choice import Kernels
from megatron.parallel.mesh import one_process_mesh

SHAPE = resolve_model(ModelSection(preset="llama-tiny", head_dim=64, hidden_dropout=0.1, seq_length=32), 100)


def engine(device: str = "cpu") -> Engine:
    # Without clipping a wrong scale of the gradients shows in the norm and in the curve.
    section = OptimizerSection(clip_grad_norm=0.0, eps=1e-3)
    mesh, kernels = one_process_mesh(torch.device(device)), Kernels(attention="sdpa")
    train = TrainSection(global_batch_size=4, micro_batch_size=2)
    return build_engine(SHAPE, section, ParallelSection(), train, 3, "bf16", mesh, kernels=kernels)


def batches(step: int) -> list[Micro]:
    """Lengths change and come back; documents differ each time."""
    length = (32, 32, 24, 32)[step % 4]
    return [two_rows(2 * step, 100, length, 0.1), two_rows(2 * step + 1, 100, length, 0.1)]


def compare(graphed: Engine, plain: Engine, steps: int, rel: float) -> None:
    for step in range(steps):
        got, want = (one.train_step(batches(step), 1e-2) for one in (graphed, plain))
        assert got.loss == pytest.approx(want.loss, rel=rel)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=20 * rel)
        for source, (total, count) in want.loss_by_source.items():
            assert got.loss_by_source[source][1] == count
            assert got.loss_by_source[source][0] == pytest.approx(total, rel=rel)


def test_what_is_replayed_trains_as_what_is_run() -> None:
    """The recorder hands out the same memory at each replay, as a graph does, and counts."""
    graphed = engine()
    parameters = graphed._weights.computing()  # type: ignore[attr-defined]
    recorded: list[int] = []

    def capture(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        losses = call()
        held = [parameter.grad for parameter in parameters]
        recorded.append(0)

        def replay() -> None:
            recorded[-1] += 1
            again = call()
            losses.copy_(again)
            for mine, parameter in zip(held, parameters, strict=True):
                assert mine is not None and parameter.grad is not None
                mine.copy_(parameter.grad)
                parameter.grad = None

        return replay, losses

    graphed.use_graphs(capture)  # type: ignore[attr-defined]
    compare(graphed, engine(), 6, 2e-3)
    assert len(recorded) == 2, "one recording for each length"


def test_evaluation_runs_without_graphs() -> None:
    graphed = engine()

    def never(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise AssertionError("recorded")

    graphed.use_graphs(never)  # type: ignore[attr-defined]
    assert graphed.evaluate([two_rows(1, 100, 32, 0.1)]) == engine().evaluate([two_rows(1, 100, 32, 0.1)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none")
def test_a_graph_on_a_gpu_trains_as_what_is_run() -> None:
    graphed = engine("cuda")
    graphed.use_graphs(cuda_capture)  # type: ignore[attr-defined]
    compare(graphed, engine("cuda"), 6, 2e-3)
