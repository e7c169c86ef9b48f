"""Rotary embedding against complex multiplication, its definition."""

from __future__ import annotations

import pytest
import torch

from megatron.kernels.rope import rope, rope_table


@pytest.mark.parametrize(("size", "rotary"), [(8, 8), (8, 2), (6, 4)])
def test_turns_pairs_as_complex_numbers_do(size: int, rotary: int) -> None:
    x = torch.randn(2, 3, 5, 2, size, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]])
    out = rope(x, rope_table(positions, rotary, 100.0, torch.float64))
    half = rotary // 2
    angles = positions[:, None, :, None, None] * 100.0 ** (-2 * torch.arange(half, dtype=torch.float64) / rotary)
    turned = torch.complex(x[..., :half], x[..., half:rotary]) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag, x[..., rotary:]), -1)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    assert out.is_contiguous()


def test_gradcheck_through_a_view() -> None:
    x = torch.randn(1, 4, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    table = rope_table(torch.arange(4)[None], 4, 10.0, torch.float64)
    torch.autograd.gradcheck(lambda y: rope(y.transpose(1, 2), table), (x,))
