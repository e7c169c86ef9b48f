"""LayerNorm in Triton against the formula in float64 and the eager definition, and what it launches."""

from __future__ import annotations

import pytest
import torch
from kernels.norm_cases import CASES, EPS, Launches, close, compare, rows, uneven_rows, weights, written_out

from megatron.kernels import row_norm_backward_triton as backward
from megatron.kernels import row_norm_triton as forward
from megatron.kernels.layer_norm import add_layer_norm, layer_norm
from megatron.kernels.layer_norm_triton import add_layer_norm_triton, layer_norm_triton


@pytest.mark.parametrize("shape, dtype, weight_dtype", CASES)
def test_equals_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device
) -> None:
    x, branch, up, onward = rows(shape, dtype, device, 4)
    weight = weights(shape[-1], weight_dtype, device, True)
    compare(layer_norm_triton, [x, *weight], False, [up])
    compare(add_layer_norm_triton, [x, branch, *weight], True, [up, onward])


@pytest.mark.parametrize(
    "size, dtype, by_rows",
    [(5000, torch.bfloat16, True), (5000, torch.float32, False), (16388, torch.bfloat16, False)],
)
def test_wide_rows_equal_the_formula(
    size: int, dtype: torch.dtype, by_rows: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, branch, up, onward = rows((3, size), dtype, device, 4)
    weight = weights(size, torch.float32, device, True)
    before, after = Launches(monkeypatch, forward), Launches(monkeypatch, backward)
    compare(add_layer_norm_triton, [x, branch, *weight], True, [up, onward])
    assert before.names == ["_forward_kernel" if size <= forward.HELD else "_forward_pieces_kernel"]
    ways = ["_backward_kernel"] if by_rows else ["_row_means_kernel", "_columns_kernel"]
    assert after.names == [*ways, "_column_sums_kernel"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_values(dtype: torch.dtype, device: torch.device) -> None:
    x, branch = rows((6, 96), dtype, device, 2, scale=2048.0)
    up, onward = rows((6, 96), dtype, device, 2, seed=1)
    weight = weights(96, torch.float32, device, True)
    assert float(x.detach().max()) > 1e4
    compare(layer_norm_triton, [x, *weight], False, [up])
    compare(add_layer_norm_triton, [x, branch, *weight], True, [up, onward])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_eager_definition(dtype: torch.dtype, device: torch.device) -> None:
    x, branch, up, onward = rows((3, 7, 130), dtype, device, 4)
    weight, bias = weights(130, torch.float32, device, True)
    close(layer_norm_triton(x, weight, bias, EPS), layer_norm(x, weight, bias, EPS))
    found, wanted = add_layer_norm_triton(x, branch, weight, bias, EPS), add_layer_norm(x, branch, weight, bias, EPS)
    assert torch.equal(found[1], wanted[1])
    gradients = [torch.autograd.grad(out, (x, branch, weight, bias), (up, onward)) for out in (found, wanted)]
    for ours, theirs in zip((found[0], *gradients[0]), (wanted[0], *gradients[1]), strict=True):
        close(ours, theirs, twice=True)


@pytest.mark.parametrize("used", [(True, False), (False, True)])
def test_results_that_are_not_used(used: tuple[bool, bool], device: torch.device) -> None:
    x, branch, *upstreams = rows((5, 40), torch.float64, device, 4)
    leaves = [x, branch, *weights(40, torch.float64, device, True)]
    compare(add_layer_norm_triton, leaves, True, [up if use else None for up, use in zip(upstreams, used, strict=True)])


def test_the_norm_is_of_the_sum_as_it_is_rounded(device: torch.device) -> None:
    """Around 100 the sum's rounding in bfloat16 is of the size of the deviation."""
    x, branch = (torch.randn(4, 96, device=device) + 50 for _ in range(2))
    weight, bias = weights(96, torch.float32, device, True)
    normed, summed = add_layer_norm_triton(x.bfloat16(), branch.bfloat16(), weight, bias, EPS)
    close(normed, written_out(summed, weight, bias))


def test_rows_that_are_read_twice(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only RMSNorm's rows of more than 8192 elements are, with the mean of LayerNorm."""
    monkeypatch.setattr(backward, "_KEPT", 0)
    x, branch, up, onward = rows((5, 40), torch.float64, device, 4)
    compare(add_layer_norm_triton, [x, branch, *weights(40, torch.float64, device, True)], True, [up, onward])


def test_column_sums_of_more_parts_than_are_read_at_once(device: torch.device) -> None:
    parts = [torch.randn(70, 45, dtype=torch.float64, device=device) for _ in range(2)]
    sums = [torch.empty(45, dtype=torch.float64, device=device) for _ in range(2)]
    backward._column_sums_kernel[(2, 2)](*parts, *sums, 70, 45, ROWS=16, BLOCK=32)
    for found, part in zip(sums, parts, strict=True):
        close(found, part.sum(0))


def test_rows_that_are_not_contiguous(device: torch.device) -> None:
    stepped = [w.detach()[::2].requires_grad_() for w in weights(12, torch.float64, device, True)]
    for x, branch, up, onward in uneven_rows(device):
        leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_(), branch.requires_grad_()]
        compare(layer_norm_triton, [leaves[0], *stepped], False, [up])
        compare(add_layer_norm_triton, [*leaves, *stepped], True, [up, onward])


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows_launch_nothing(shape: tuple[int, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = [Launches(monkeypatch, module) for module in (forward, backward)]
    x, branch = rows(shape, torch.bfloat16, device, 2)
    weight, bias = weights(8, torch.float32, device, True)
    normed, summed = add_layer_norm_triton(x, branch, weight, bias, EPS)
    assert normed.shape == summed.shape == shape
    gradients = torch.autograd.grad((normed.sum(), summed.sum()), (x, branch, weight, bias))
    assert gradients[0].shape == gradients[1].shape == shape and not bool(gradients[2].any())
    assert torch.equal(gradients[3], torch.zeros_like(bias))
    assert [launched.names for launched in launches] == [[], []]


def test_gradcheck(device: torch.device) -> None:
    x, branch = rows((2, 3), torch.float64, device, 2)
    weight, bias = weights(3, torch.float64, device, True)
    torch.autograd.gradcheck(lambda a, w, c: layer_norm_triton(a, w, c, 1e-3), (x, weight, bias))
    torch.autograd.gradcheck(lambda a, b, w, c: add_layer_norm_triton(a, b, w, c, 1e-3), (x, branch, weight, bias))


def test_launches_once_forward_and_twice_backward(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = Launches(monkeypatch, forward), Launches(monkeypatch, backward)
    x, branch, up, onward = rows((9, 32), torch.float32, device, 4)
    weight, bias = weights(32, torch.float32, device, True)
    torch.autograd.backward(add_layer_norm_triton(x, branch, weight, bias, EPS), (up, onward))
    assert before.names == ["_forward_kernel"]
    assert after.names == ["_backward_kernel", "_column_sums_kernel"]


def test_the_same_bits_each_time(device: torch.device) -> None:
    x, up = rows((50, 200), torch.float32, device, 2)
    weight, bias = weights(200, torch.float32, device, True)
    runs = [torch.autograd.grad(layer_norm_triton(x, weight, bias, EPS), (x, weight, bias), up) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_bias_of_another_size_is_refused() -> None:
    x = torch.empty(2, 8, device="meta")
    with pytest.raises(ValueError, match=r"bias of shape \[7\]"):
        layer_norm_triton(x, torch.ones(8, device="meta"), torch.ones(7, device="meta"), EPS)
