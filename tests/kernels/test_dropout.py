"""Dropout by name: the statistics of the hash, and that a mask knows nothing of how the work is cut."""

from __future__ import annotations

import pytest
import torch

from megatron.kernels.dropout import ATTENTION, EMBEDDING, MLP, _mix, _mix_, dropout, kept, row_keys

SEED = 1234
POSITIONS = torch.arange(512)
SAMPLES = torch.arange(16)


def mask(rate: float = 0.1, *, seed: int = SEED, layer: int = 3, site: int = ATTENTION) -> torch.Tensor:
    """Kept or not, as float64 [16, 512, 256]: two million elements."""
    return kept(row_keys(seed, SAMPLES, layer, site), POSITIONS, 256, rate).double()


def test_the_hash_is_splitmix64() -> None:
    # first outputs of the reference implementation (prng.di.unimi.it/splitmix64.c) seeded with 1234567
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    gamma = 0x9E3779B97F4A7C15
    assert [_mix(1234567 + n * gamma) for n in range(1, 5)] == expected
    numbers = [(1234567 + n * gamma) % 2**64 for n in range(1, 5)]
    signed = torch.tensor([n - 2**64 if n >= 2**63 else n for n in numbers])
    assert [n % 2**64 for n in _mix_(signed).tolist()] == expected


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_mean_and_chi_square(rate: float) -> None:
    drawn = 1 - mask(rate)
    deviation = (rate * (1 - rate) / drawn.numel()) ** 0.5
    assert abs(drawn.mean() - rate) < 5 * deviation + 2**-17
    for dims in ((0, 1), (0, 2), (1, 2)):  # by channel, by position, by row
        counts = drawn.sum(dims)
        each = drawn.numel() / counts.numel()
        statistic = (counts - each * rate).square().sum() / (each * rate * (1 - rate))
        assert abs(statistic - counts.numel()) < 5 * (2 * counts.numel()) ** 0.5


def test_the_bits_of_all_lanes_are_even() -> None:
    """Of the sixteen bits each, by the rates 2^-1 to 2^-8 that cut at one bit after the other."""
    for power in range(1, 9):
        drawn = (1 - mask(2.0**-power)).view(-1, 4).mean(0)
        deviation = (2.0**-power / (mask().numel() / 4)) ** 0.5
        assert ((drawn - 2.0**-power).abs() < 5 * deviation).all()


def test_neighbours_know_nothing_of_each_other() -> None:
    base = mask(0.5) - 0.5
    limit = 5 * 0.25 / base.numel() ** 0.5
    for shift in (1, 2, 3, 4, 5, 8, 64):
        for dim in (0, 1, 2):
            if shift < base.shape[dim]:
                here, there = (
                    base.narrow(dim, 0, base.shape[dim] - shift),
                    base.narrow(dim, shift, base.shape[dim] - shift),
                )
                assert abs((here * there).mean()) < limit * (base.numel() / here.numel()) ** 0.5
    others = [mask(0.5, seed=SEED + 1), mask(0.5, layer=4), mask(0.5, site=MLP), mask(0.5, layer=0, site=EMBEDDING)]
    for other in others:
        assert abs((base * (other - 0.5)).mean()) < limit


def test_names_do_not_meet() -> None:
    keys = [
        row_keys(seed, torch.arange(-1, 40), layer, site)
        for seed in (0, 1, 2)
        for layer in range(8)
        for site in range(3)
    ]
    assert torch.cat(keys).unique().numel() == 3 * 8 * 3 * 41


def test_the_mask_is_the_same_however_the_work_is_cut() -> None:
    x = torch.randn(4, 24, 10, dtype=torch.float64)
    keys, positions = row_keys(SEED, torch.tensor([7, 900, 3, 2**40]), 2, MLP), torch.arange(24)
    whole = dropout(x, 0.4, keys, positions)
    assert torch.equal(whole[1:3], dropout(x[1:3], 0.4, row_keys(SEED, torch.tensor([900, 3]), 2, MLP), positions))
    for cut in (positions[6:12], torch.tensor([0, 1, 22, 23])):
        assert torch.equal(whole[:, cut], dropout(x[:, cut], 0.4, keys, cut))
    assert not torch.equal(whole[:, 6:12] == 0, dropout(x[:, 6:12], 0.4, keys, positions[:6]) == 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_are_scaled_and_the_gradient_meets_the_same_mask(dtype: torch.dtype) -> None:
    x = torch.ones(16, 512, 30, dtype=dtype, requires_grad=True)
    keys = row_keys(SEED, SAMPLES, 0, EMBEDDING)
    out = dropout(x, 0.1, keys, POSITIONS)
    assert out.dtype == dtype
    left = out.detach() != 0
    # 6554 of 65536 are dropped: the scale is that of the chance which elements truly have
    torch.testing.assert_close(
        out[left].double(), torch.full_like(out[left], 65536 / 58982).double(), atol=0, rtol=4e-3
    )
    upstream = torch.randn(x.shape).to(dtype)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    assert torch.equal(gradient, (upstream * left) * (65536 / 58982))


def test_bfloat16_has_no_bias() -> None:
    x = torch.rand(16, 512, 64, generator=torch.Generator().manual_seed(0)).add(1).bfloat16()
    out = dropout(x, 0.1, row_keys(SEED, SAMPLES, 0, EMBEDDING), POSITIONS).double()
    left = out != 0
    assert abs(out[left].sum() / x.double()[left].sum() * (58982 / 65536) - 1) < 2e-4


def test_gradcheck_and_nothing_is_kept_for_the_backward_pass() -> None:
    keys, positions = row_keys(SEED, torch.arange(2), 1, MLP), torch.arange(3)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda y: dropout(y, 0.3, keys, positions), x)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        dropout(x, 0.3, keys, positions)
    assert sum(saved) == 2 + 3


def test_rates() -> None:
    x, keys, positions = torch.ones(2, 3, 5), row_keys(SEED, torch.arange(2), 1, MLP), torch.arange(3)
    assert dropout(x, 0.0, keys, positions) is x
    for rate in (1.0, -0.1, 0.999999, float("nan")):
        with pytest.raises(ValueError, match="dropout rate"):
            dropout(x, rate, keys, positions)
