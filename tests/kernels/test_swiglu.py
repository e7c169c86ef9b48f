"""Activations against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.kernels.swiglu import activate, gated


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("silu", lambda v: v / (1 + math.exp(-v))),
        ("gelu", lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2),
        ("gelu_tanh", lambda v: v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2),
    ],
)
def test_formulas(name: str, formula) -> None:
    x = torch.linspace(-4, 4, 17, dtype=torch.float64)
    expected = torch.tensor([formula(float(v)) for v in x], dtype=torch.float64)
    torch.testing.assert_close(activate(x, name), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gated(x, x + 1, name), expected * (x + 1), atol=1e-12, rtol=1e-12)
