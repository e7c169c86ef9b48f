"""Both norms in Triton against the formula in float64 and their eager definitions, and what they launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kernels.norm_cases import CASES, EPS, Launches, close, compare, rows, uneven_rows, weights, written_out
from torch import Tensor

from megatron.config.errors import UnavailableError
from megatron.kernels import launch_triton
from megatron.kernels import row_norm_backward_triton as backward
from megatron.kernels import row_norm_triton as forward
from megatron.kernels.layer_norm import add_layer_norm, layer_norm
from megatron.kernels.layer_norm_triton import add_layer_norm_triton, layer_norm_triton
from megatron.kernels.rms_norm import add_rms_norm, rms_norm
from megatron.kernels.rms_norm_triton import add_rms_norm_triton, rms_norm_triton


@dataclass(frozen=True)
class Norm:
    """A norm, alone and after an addition, with its eager definitions; `biased` has a bias besides its weight. wide: a
    size whose rows are too wide for registers in float32, and not in half precision."""

    triton: Callable[..., Tensor]
    add_triton: Callable[..., tuple[Tensor, Tensor]]
    eager: Callable[..., Tensor]
    add_eager: Callable[..., tuple[Tensor, Tensor]]
    biased: bool
    wide: int
    centres: bool = False

    def weights(self, size: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Leaves: the weight, and the bias where there is one."""
        return weights(size, dtype, device, self.biased)

    def compare(self, x: Tensor, branch: Tensor, weight: Sequence[Tensor], up: Tensor, onward: Tensor) -> None:
        """Both calls against the formula."""
        compare(self.triton, [x, *weight], False, [up], centres=self.centres)
        compare(self.add_triton, [x, branch, *weight], True, [up, onward], centres=self.centres)


def _without(norm: Callable[..., Any]) -> Callable[..., Any]:
    """A LayerNorm that is given no bias."""

    def call(*tensors_and_eps: Any) -> Any:
        *tensors, eps = tensors_and_eps
        return norm(*tensors, None, eps)

    return call


LAYER = Norm(layer_norm_triton, add_layer_norm_triton, layer_norm, add_layer_norm, True, 5000)
RMS = Norm(rms_norm_triton, add_rms_norm_triton, rms_norm, add_rms_norm, False, 9000)
WEIGHT_ALONE = Norm(
    *map(_without, (layer_norm_triton, add_layer_norm_triton, layer_norm, add_layer_norm)), False, 9000, centres=True
)
of_both = pytest.mark.parametrize("norm", [LAYER, RMS, WEIGHT_ALONE], ids=["layer", "rms", "layer without bias"])


@of_both
@pytest.mark.parametrize("shape, dtype, weight_dtype", CASES)
def test_equals_the_formula(
    norm: Norm, shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device
) -> None:
    x, branch, up, onward = rows(shape, dtype, device, 4)
    norm.compare(x, branch, norm.weights(shape[-1], weight_dtype, device), up, onward)


@of_both
@pytest.mark.parametrize(
    "size, dtype, by_rows", [(None, torch.bfloat16, True), (None, torch.float32, False), (16388, torch.bfloat16, False)]
)
def test_wide_rows_equal_the_formula(
    norm: Norm,
    size: int | None,
    dtype: torch.dtype,
    by_rows: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = size or norm.wide
    x, branch, up, onward = rows((3, size), dtype, device, 4)
    weight = norm.weights(size, torch.float32, device)
    before, after = Launches(monkeypatch, forward), Launches(monkeypatch, backward)
    compare(norm.add_triton, [x, branch, *weight], True, [up, onward], centres=norm.centres)
    assert before.names == ["_forward_kernel" if size <= forward.HELD else "_forward_pieces_kernel"]
    ways = ["_backward_kernel"] if by_rows else ["_row_means_kernel", "_columns_kernel"]
    assert after.names == [*ways, "_column_sums_kernel"]


@of_both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_values(norm: Norm, dtype: torch.dtype, device: torch.device) -> None:
    x, branch = rows((6, 96), dtype, device, 2, scale=2048.0)
    up, onward = rows((6, 96), dtype, device, 2, seed=1)
    assert float(x.detach().max()) > 1e4
    norm.compare(x, branch, norm.weights(96, torch.float32, device), up, onward)


@of_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_eager_definition(norm: Norm, dtype: torch.dtype, device: torch.device) -> None:
    x, branch, up, onward = rows((3, 7, 130), dtype, device, 4)
    weight = norm.weights(130, torch.float32, device)
    close(norm.triton(x, *weight, EPS), norm.eager(x, *weight, EPS))
    found, wanted = (call(x, branch, *weight, EPS) for call in (norm.add_triton, norm.add_eager))
    assert torch.equal(found[1], wanted[1])
    gradients = [torch.autograd.grad(out, (x, branch, *weight), (up, onward)) for out in (found, wanted)]
    for ours, theirs in zip((found[0], *gradients[0]), (wanted[0], *gradients[1]), strict=True):
        close(ours, theirs, twice=True)


@of_both
@pytest.mark.parametrize("used", [(True, False), (False, True)])
def test_results_that_are_not_used(norm: Norm, used: tuple[bool, bool], device: torch.device) -> None:
    x, branch, *upstreams = rows((5, 40), torch.float64, device, 4)
    leaves = [x, branch, *norm.weights(40, torch.float64, device)]
    ups = [up if use else None for up, use in zip(upstreams, used, strict=True)]
    compare(norm.add_triton, leaves, True, ups, centres=norm.centres)


def test_the_norm_is_of_the_sum_as_it_is_rounded(device: torch.device) -> None:
    """Around 100 the sum's rounding in bfloat16 is of the size of the deviation."""
    x, branch = (torch.randn(4, 96, device=device) + 50 for _ in range(2))
    weight, bias = LAYER.weights(96, torch.float32, device)
    normed, summed = add_layer_norm_triton(x.bfloat16(), branch.bfloat16(), weight, bias, EPS)
    close(normed, written_out(summed, weight, bias))


def test_rows_that_are_read_twice(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only RMSNorm's rows of more than 8192 elements are, with the mean of LayerNorm."""
    monkeypatch.setattr(backward, "_KEPT", 0)
    x, branch, up, onward = rows((5, 40), torch.float64, device, 4)
    compare(add_layer_norm_triton, [x, branch, *LAYER.weights(40, torch.float64, device)], True, [up, onward])


def test_column_sums_of_more_parts_than_are_read_at_once(device: torch.device) -> None:
    parts = [torch.randn(70, 45, dtype=torch.float64, device=device) for _ in range(2)]
    sums = [torch.empty(45, dtype=torch.float64, device=device) for _ in range(2)]
    backward._column_sums_kernel[(2, 2)](*parts, *sums, 70, 45, ROWS=16, BLOCK=32)
    for found, part in zip(sums, parts, strict=True):
        close(found, part.sum(0))


@of_both
def test_rows_that_are_not_contiguous(norm: Norm, device: torch.device) -> None:
    stepped = [w.detach()[::2].requires_grad_() for w in norm.weights(12, torch.float64, device)]
    for x, branch, up, onward in uneven_rows(device):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        norm.compare(leaf, branch.requires_grad_(), stepped, up, onward)


@of_both
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows_launch_nothing(
    norm: Norm, shape: tuple[int, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = [Launches(monkeypatch, module) for module in (forward, backward)]
    x, branch = rows(shape, torch.bfloat16, device, 2)
    weight = norm.weights(8, torch.float32, device)
    normed, summed = norm.add_triton(x, branch, *weight, EPS)
    assert normed.shape == summed.shape == shape
    gradients = torch.autograd.grad((normed.sum(), summed.sum()), (x, branch, *weight))
    assert gradients[0].shape == gradients[1].shape == shape
    assert all(torch.equal(found, torch.zeros_like(of)) for found, of in zip(gradients[2:], weight, strict=True))
    assert [launched.names for launched in launches] == [[], []]


@of_both
def test_gradcheck(norm: Norm, device: torch.device) -> None:
    x, branch = rows((2, 3), torch.float64, device, 2)
    weight = norm.weights(3, torch.float64, device)

    def alone(*leaves: Any) -> Any:
        return norm.triton(*leaves, 1e-3)

    def added(*leaves: Any) -> Any:
        return norm.add_triton(*leaves, 1e-3)

    torch.autograd.gradcheck(alone, (x, *weight))
    torch.autograd.gradcheck(added, (x, branch, *weight))


@of_both
def test_launches_once_forward_and_twice_backward(
    norm: Norm, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = Launches(monkeypatch, forward), Launches(monkeypatch, backward)
    x, branch, up, onward = rows((9, 32), torch.float32, device, 4)
    weight = norm.weights(32, torch.float32, device)
    torch.autograd.backward(norm.add_triton(x, branch, *weight, EPS), (up, onward))
    assert before.names == ["_forward_kernel"]
    assert after.names == ["_backward_kernel", "_column_sums_kernel"]


@of_both
def test_the_same_bits_each_time(norm: Norm, device: torch.device) -> None:
    x, up = rows((50, 200), torch.float32, device, 2)
    weight = norm.weights(200, torch.float32, device)
    runs = [torch.autograd.grad(norm.triton(x, *weight, EPS), (x, *weight), up) for _ in range(2)]
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


def test_a_bias_of_another_size_is_refused() -> None:
    x = torch.empty(2, 8, device="meta")
    with pytest.raises(ValueError, match=r"bias of shape \[7\]"):
        layer_norm_triton(x, torch.ones(8, device="meta"), torch.ones(7, device="meta"), EPS)
