"""The comparison can fail: faults that parallel training is prone to, each planted in the ranks of a layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from layouts.cases import BY_NAME
from layouts.conftest import Reference
from layouts.curves import compare, whole_curves
from ranks import run_ranks

SEEN = 1e-3
"""Far above what rounding does in any precision."""


def average_over_data_ranks() -> None:
    """FSDP2's habit, which divides once too often a loss that is divided already."""
    from torch.distributed.fsdp import FSDPModule

    FSDPModule.set_gradient_divide_factor = lambda self, factor: None  # type: ignore[method-assign]


def leave_parts_of_norms_apart() -> None:
    """Each tensor rank keeps the gradient of its own part of the sequence."""
    from megatron.engines import torch_engine

    finish = torch_engine.finish_gradients

    def without(held: Any, mesh: Any, *rest: Any) -> None:
        finish([replace(item, partial=False) for item in held], mesh, *rest)

    torch_engine.finish_gradients = without


def leave_tied_copies_apart() -> None:
    """The embedding on the first stage and its copy on the last learn on their own."""
    from megatron.engines import torch_engine

    finish = torch_engine.finish_gradients

    def without(held: Any, mesh: Any, *rest: Any) -> None:
        finish([item for item in held if item.name != "embedding.weight"], mesh, *rest)

    torch_engine.finish_gradients = without


def count_replicas_in_the_norm() -> None:
    """Every rank adds what it holds, whether others hold the same or not."""
    from megatron.engines import torch_engine

    norm = torch_engine.squared_norm

    def without(gradients: Any, held: Any, *rest: Any) -> Any:
        return norm(gradients, [replace(item, owned=True) for item in held], *rest)

    torch_engine.squared_norm = without


def draw_dropout_by_rank() -> None:
    """Each rank keys its dropout by the rows' places in its own batch, as a generator of its own would."""
    from megatron.engines import torch_engine

    place = torch_engine.TorchEngine._place

    def local(self: Any, microbatch: Any) -> Any:
        rows = place(self, microbatch)
        return replace(rows, sample_numbers=rows.sample_numbers - rows.sample_numbers[0])

    torch_engine.TorchEngine._place = local  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("layout", "variant", "plant"),
    [
        ("dp2", "sgd", average_over_data_ranks),
        ("tp2+sp", "sgd", leave_parts_of_norms_apart),
        ("pp2", "sgd", leave_tied_copies_apart),
        ("tp2", "sgd", count_replicas_in_the_norm),
        ("dp2", "sgd, clipped", draw_dropout_by_rank),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_planted_fault_is_seen(
    layout: str, variant: str, plant: Callable[[], None], corpora: Path, one_process: Reference
) -> None:
    case, key = BY_NAME[layout], ("fp64", variant)
    curves = run_ranks(case.ranks, whole_curves, case, corpora, [key], case.layers, plant, timeout=240)[0]
    assert compare(curves[key], one_process(key, case.layers)).worst > SEEN
