"""Triton kernels run in Triton's interpreter where there is no GPU, and compiled where there is one."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreted"),
        pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a Triton kernel is tested: the CPU, by interpretation, or a GPU (marked gpu; skipped without one)."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch sees none")
    if name == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled on this machine, not interpreted")
    return torch.device(name)
