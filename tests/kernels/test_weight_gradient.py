"""Weight gradients that a product adds to a float32 sum, against float64 and against what autograd makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron.kernels.weight_gradient import MainGradient, add_weight_gradient, linear_into


def drawn(*shape: int, seed: int = 0, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(device, dtype)


class Holder:
    """What stands for a master."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.grad: Tensor | None = None


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 1, 1), (37, 24, 56), (512, 33, 17), (0, 8, 16)])
def test_sums_are_float32s_and_nothing_is_rounded_between(
    rows: int, outputs: int, inputs: int, device: torch.device
) -> None:
    total = torch.full((outputs, inputs), torch.nan, device=device)  # the first is written, not added
    fresh = torch.tensor(True)
    wanted = torch.zeros(outputs, inputs, dtype=torch.float64, device=device)
    size = torch.zeros_like(wanted)
    for number in range(5):
        grad, x = drawn(rows, outputs, seed=number, device=device), drawn(rows, inputs, seed=90 + number, device=device)
        add_weight_gradient(total, fresh, grad, x)
        assert not fresh
        wanted += grad.double().t() @ x.double()
        size += grad.double().abs().t() @ x.double().abs()
    # float32 sums of exact products: each of at most rows + 5 additions rounds by 2^-24 of what is there
    assert ((total.double() - wanted).abs() <= (rows + 5) * 2.0**-24 * size).all()
    if rows > 1:
        rounded = sum(
            (drawn(rows, outputs, seed=n, device=device).t() @ drawn(rows, inputs, seed=90 + n, device=device)).double()
            for n in range(5)
        )
        assert (total.double() - wanted).norm() < 0.01 * (rounded - wanted).norm(), "bfloat16 between costs digits"


@pytest.mark.parametrize("large", [2.0**60, 2.0**-60])
def test_large_small_and_strided(large: float, device: torch.device) -> None:
    grad = drawn(24, 40, device=device).mul_(large)[:, ::2]
    x = drawn(16, 24, seed=1, device=device).t()
    total = torch.ones(20, 16, device=device)
    add_weight_gradient(total, torch.tensor(False), grad, x)
    torch.testing.assert_close(total.double(), 1 + grad.double().t() @ x.double(), rtol=1e-5, atol=large * 1e-5)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    one = torch.ones(4, 4, device=device, dtype=torch.bfloat16)
    for total, grad in ((one.float()[:3], one), (one, one), (one.double(), one), (one.float(), one.float())):
        with pytest.raises(ValueError, match="the sum is float32"):
            add_weight_gradient(total, torch.tensor(True), grad, one)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_map_gives_autograd_all_but_its_weights_gradient(bias: bool, device: torch.device) -> None:
    x, weight = (drawn(2, 9, 16, device=device), drawn(24, 16, seed=1, device=device))
    offset = drawn(24, seed=2, device=device) if bias else None
    leaves = [tensor for tensor in (x, weight, offset) if tensor is not None]
    holder, up = Holder(), drawn(2, 9, 24, seed=3, device=device)
    main = MainGradient([holder], [weight])
    for leaf in leaves:
        leaf.requires_grad_()
    want = functional.linear(x, weight, offset)
    want.backward(up)
    wanted = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    with pytest.raises(AssertionError, match="prepare"):
        main.place()
    main.prepare()
    got = linear_into(x, weight, offset, *main.place())
    main.hand_out()
    assert holder.grad is None, "nothing was added yet"
    got.backward(up)
    main.hand_out()
    assert torch.equal(got, want) and weight.grad is None and holder.grad is not None
    for leaf, grad in zip(leaves, wanted, strict=True):
        if leaf is not weight:
            torch.testing.assert_close(leaf.grad, grad)
    exact = up.flatten(0, 1).double().t() @ x.detach().flatten(0, 1).double()
    torch.testing.assert_close(holder.grad.double(), exact, rtol=1e-5, atol=1e-5)
    assert wanted[1] is not None
    torch.testing.assert_close(holder.grad.bfloat16(), wanted[1])


def test_several_weights_share_a_sum_and_begin_anew_when_it_is_dropped(device: torch.device) -> None:
    holders = [Holder(), Holder(), Holder()]
    main = MainGradient(holders, [torch.empty(rows, 8, device=device) for rows in (4, 2, 6)])
    grads, x = drawn(5, 12, device=device), drawn(5, 8, seed=1, device=device)
    exact = grads.double().t() @ x.double()
    for turn in range(2):
        for times in (1, 2, 3):
            main.prepare()
            add_weight_gradient(*main.place(), grads, x)
            main.hand_out()
            parts = [holder.grad for holder in holders]
            for part, want in zip(parts, (times * exact).split([4, 2, 6]), strict=True):
                assert part is not None
                torch.testing.assert_close(part.double(), want, rtol=1e-5, atol=1e-5)
        main.grad = None
        for holder in holders:
            holder.grad = None
        assert turn in (0, 1)
