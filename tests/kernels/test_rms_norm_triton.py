"""RMSNorm in Triton against the formula in float64 and the eager definition, and what it launches."""

from __future__ import annotations

import pytest
import torch
from kernels.norm_cases import CASES, EPS, Launches, close, compare, rows, uneven_rows, weights

from megatron.config.errors import UnavailableError
from megatron.kernels import launch_triton
from megatron.kernels import row_norm_backward_triton as backward
from megatron.kernels import row_norm_triton as forward
from megatron.kernels.rms_norm import add_rms_norm, rms_norm
from megatron.kernels.rms_norm_triton import add_rms_norm_triton, rms_norm_triton


@pytest.mark.parametrize("shape, dtype, weight_dtype", CASES)
def test_equals_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device
) -> None:
    x, branch, up, onward = rows(shape, dtype, device, 4)
    weight = weights(shape[-1], weight_dtype, device, False)
    compare(rms_norm_triton, [x, *weight], False, [up])
    compare(add_rms_norm_triton, [x, branch, *weight], True, [up, onward])


@pytest.mark.parametrize(
    "size, dtype, by_rows",
    [(9000, torch.bfloat16, True), (9000, torch.float32, False), (16388, torch.bfloat16, False)],
)
def test_wide_rows_equal_the_formula(
    size: int, dtype: torch.dtype, by_rows: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, branch, up, onward = rows((3, size), dtype, device, 4)
    weight = weights(size, torch.float32, device, False)
    before, after = Launches(monkeypatch, forward), Launches(monkeypatch, backward)
    compare(add_rms_norm_triton, [x, branch, *weight], True, [up, onward])
    assert before.names == ["_forward_kernel" if size <= forward.HELD else "_forward_pieces_kernel"]
    ways = ["_backward_kernel"] if by_rows else ["_row_means_kernel", "_columns_kernel"]
    assert after.names == [*ways, "_column_sums_kernel"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_values(dtype: torch.dtype, device: torch.device) -> None:
    x, branch = rows((6, 96), dtype, device, 2, scale=2048.0)
    up, onward = rows((6, 96), dtype, device, 2, seed=1)
    weight = weights(96, torch.float32, device, False)
    assert float(x.detach().max()) > 1e4
    compare(rms_norm_triton, [x, *weight], False, [up])
    compare(add_rms_norm_triton, [x, branch, *weight], True, [up, onward])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_eager_definition(dtype: torch.dtype, device: torch.device) -> None:
    x, branch, up, onward = rows((3, 7, 130), dtype, device, 4)
    (weight,) = weights(130, torch.float32, device, False)
    close(rms_norm_triton(x, weight, EPS), rms_norm(x, weight, EPS))
    found, wanted = add_rms_norm_triton(x, branch, weight, EPS), add_rms_norm(x, branch, weight, EPS)
    assert torch.equal(found[1], wanted[1])
    gradients = [torch.autograd.grad(out, (x, branch, weight), (up, onward)) for out in (found, wanted)]
    for ours, theirs in zip((found[0], *gradients[0]), (wanted[0], *gradients[1]), strict=True):
        close(ours, theirs, twice=True)


@pytest.mark.parametrize("used", [(True, False), (False, True)])
def test_results_that_are_not_used(used: tuple[bool, bool], device: torch.device) -> None:
    x, branch, *upstreams = rows((5, 40), torch.float64, device, 4)
    leaves = [x, branch, *weights(40, torch.float64, device, False)]
    compare(add_rms_norm_triton, leaves, True, [up if use else None for up, use in zip(upstreams, used, strict=True)])


def test_rows_that_are_not_contiguous(device: torch.device) -> None:
    weight = weights(12, torch.float64, device, False)[0].detach()[::2].requires_grad_()
    for x, branch, up, onward in uneven_rows(device):
        leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_(), branch.requires_grad_()]
        compare(rms_norm_triton, [leaves[0], weight], False, [up])
        compare(add_rms_norm_triton, [*leaves, weight], True, [up, onward])


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows_launch_nothing(shape: tuple[int, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = [Launches(monkeypatch, module) for module in (forward, backward)]
    x, branch = rows(shape, torch.bfloat16, device, 2)
    (weight,) = weights(8, torch.float32, device, False)
    normed, summed = add_rms_norm_triton(x, branch, weight, EPS)
    assert normed.shape == summed.shape == shape
    gradients = torch.autograd.grad((normed.sum(), summed.sum()), (x, branch, weight))
    assert gradients[0].shape == gradients[1].shape == shape and not bool(gradients[2].any())
    assert [launched.names for launched in launches] == [[], []]


def test_gradcheck(device: torch.device) -> None:
    x, branch = rows((2, 3), torch.float64, device, 2)
    (weight,) = weights(3, torch.float64, device, False)
    torch.autograd.gradcheck(lambda a, w: rms_norm_triton(a, w, 1e-3), (x, weight))
    torch.autograd.gradcheck(lambda a, b, w: add_rms_norm_triton(a, b, w, 1e-3), (x, branch, weight))


def test_launches_once_forward_and_twice_backward(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = Launches(monkeypatch, forward), Launches(monkeypatch, backward)
    x, branch, up, onward = rows((9, 32), torch.float32, device, 4)
    (weight,) = weights(32, torch.float32, device, False)
    torch.autograd.backward(add_rms_norm_triton(x, branch, weight, EPS), (up, onward))
    assert before.names == ["_forward_kernel"]
    assert after.names == ["_backward_kernel", "_column_sums_kernel"]


def test_the_same_bits_each_time(device: torch.device) -> None:
    x, up = rows((50, 200), torch.float32, device, 2)
    (weight,) = weights(200, torch.float32, device, False)
    runs = [torch.autograd.grad(rms_norm_triton(x, weight, EPS), (x, weight), up) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_the_sum_is_rounded_as_torch_rounds() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch sees none (the interpreter truncates)")
    x, branch = (torch.randn(64, 1024, device="cuda").bfloat16() for _ in range(2))
    _, summed = add_rms_norm_triton(x, branch, torch.ones(1024, device="cuda"), EPS)
    assert torch.equal(summed, x + branch)


@pytest.mark.parametrize("element_size", [2, 4, 8])
@pytest.mark.parametrize("sums", [1, 2])
@pytest.mark.parametrize("streams", [2, 3])
def test_programs_of_the_backward_pass_are_resident_at_once(element_size: int, sums: int, streams: int) -> None:
    """Within a processor's 65,536 registers and the least shared memory of a GPU; no tile has idle rows only."""
    found = [backward.rows_launch(size, element_size, streams, sums) for size in (1, 64, 128, 1000, 2048, 4096, 8192)]
    assert found[0] is not None and found[-3] is not None
    for how in filter(None, found):
        assert how.programs * how.warps * 32 * how.registers <= 65536
        copied = (how.stages - 1) * how.tile * how.block * element_size * streams
        assert copied <= 96 << 10 and how.programs * copied <= 200 << 10
    assert backward.rows_launch(16385, element_size, streams, sums) is None


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    x, branch = rows((2, 8), torch.float32, torch.device("cpu"), 2)
    with pytest.raises(ValueError, match="must be alike"):
        add_rms_norm_triton(x, branch[:1], torch.ones(8), EPS)
    monkeypatch.setattr(launch_triton, "INTERPRETED", False)
    with pytest.raises(UnavailableError, match="Triton kernels run on GPUs"):
        rms_norm_triton(x, torch.ones(8), EPS)
    with pytest.raises(ValueError, match=r"weight of shape \[7\]"):
        rms_norm_triton(x.to("meta"), torch.ones(7), EPS)
