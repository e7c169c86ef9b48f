"""Activations against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.kernels.swiglu import activate, gated, gated_halves


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


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_the_gate_is_the_first_half(name: str) -> None:
    gate_up = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    out = gated_halves(gate_up, name)
    torch.testing.assert_close(out, gated(gate_up[..., :5], gate_up[..., 5:], name), atol=0, rtol=0)
    assert torch.autograd.gradcheck(lambda x: gated_halves(x, name), (gate_up,))
    with pytest.raises(ValueError, match="even"):
        gated_halves(gate_up[..., :9], name)
