"""Products by oneDNN against float64, and linear maps made of them against torch's."""

from __future__ import annotations

import pytest
import torch

from megatron.kernels import cross_entropy, matrix_product
from megatron.kernels.matrix_product import linear_of, onednn_obstacle, product_of, quicker_library

pytestmark = pytest.mark.skipif(onednn_obstacle() is not None, reason=f"{onednn_obstacle()}")


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_product, "SMALL", 1)


@pytest.mark.parametrize(("n", "k", "m"), [(1, 1, 1), (5, 7, 3), (64, 33, 257), (0, 4, 3), (4, 3, 0)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_product_of_any_strides(n: int, k: int, m: int, turned: bool) -> None:
    a, b = (
        torch.randn(k, n).t() if turned else torch.randn(n, k),
        torch.randn(m, k).t() if turned else torch.randn(k, m),
    )
    torch.testing.assert_close(product_of("onednn")(a, b).double(), a.double() @ b.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs(dtype: torch.dtype) -> None:
    a, b = torch.randn(9, 8).to(dtype), torch.randn(8, 7).to(dtype)
    assert torch.equal(product_of("onednn")(a, b), a @ b)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (0, 5)])
def test_a_linear_map_and_its_gradients_equal_torchs(shape: tuple[int, ...], biased: bool) -> None:
    x = torch.randn(*shape, requires_grad=True)
    weight, bias = torch.randn(4, 5, requires_grad=True), torch.randn(4, requires_grad=True) if biased else None
    inputs = [x, weight, *([bias] if bias is not None else [])]
    ours, theirs = (linear_of(name)(x, weight, bias) for name in ("onednn", "torch"))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(theirs)
    wanted = torch.autograd.grad(theirs, inputs, upstream)
    for got, want in zip(torch.autograd.grad(ours, inputs, upstream), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_small_products_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_product, "SMALL", 1 << 24)
    a, b = torch.randn(17, 8), torch.randn(8, 9)
    assert torch.equal(product_of("onednn")(a, b), a @ b)


def test_the_quicker_library_is_measured_in_turns() -> None:
    name, best = quicker_library(64, 32, 48)
    assert set(best) == {"torch", "onednn"} and all(value > 0 for value in best.values())
    assert name == ("onednn" if best["onednn"] < 0.9 * best["torch"] else "torch")


@pytest.mark.parametrize("rows", [1, 70])
def test_the_head_by_onednn_equals_torchs(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 32)
    hidden, weight = torch.randn(rows, 24, requires_grad=True), torch.randn(64, 24, requires_grad=True)
    targets = torch.randint(0, 60, (rows,))
    found = {}
    for library in ("torch", "onednn"):
        total, losses = cross_entropy.linear_cross_entropy(hidden, weight, targets, 60, 0.5, library=library)
        plain = cross_entropy.linear_losses(hidden, weight, targets, 60, library=library)
        found[library] = (total, losses, plain, *torch.autograd.grad(total, (hidden, weight)))
    for got, want in zip(found["onednn"], found["torch"], strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
