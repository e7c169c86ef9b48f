"""Cross-entropy of a vocabulary that is cut over ranks, against torch's own in float64, and what it holds at once."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config.layout import Layout
from megatron.kernels import cross_entropy as kernel
from megatron.kernels import vocabulary_softmax
from megatron.kernels.cross_entropy import IGNORED, cross_entropy_in_place, linear_cross_entropy, linear_losses
from megatron.kernels.embedding import embedding
from megatron.parallel.axis import ALONE, Axis
from megatron.parallel.mesh import close_mesh, launched, open_mesh

RANKS, WIDTH = 4, 6
PROBLEMS = [(rows, words, size) for rows in (1, 11) for words in (64, 50, 33, 3) for size in (1.0, 1e4)]
"""Rows, words and the size of hidden states; the vocabulary is padded to 64, of which a rank holds 16."""


def problem(rows: int, words: int, size: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + words)
    hidden = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) * size
    weight = torch.randn(64, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, words, (rows,), generator=generator)
    targets[1::3] = IGNORED
    return hidden.to(dtype), weight.to(dtype), targets


def solved(
    rows: int, words: int, size: float, axis: Axis, in_place: bool, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    hidden, weight, targets = problem(rows, words, size, dtype)
    hidden, weight = hidden.requires_grad_(), weight.chunk(axis.size)[axis.rank].clone().requires_grad_()
    ranks = (axis.rank, axis.size, axis.group)
    if in_place:
        total, losses = cross_entropy_in_place(functional.linear(hidden, weight), targets, words, 0.25, *ranks)
    else:
        total, losses = linear_cross_entropy(hidden, weight, targets, words, 0.25, *ranks)
    (3 * total).backward()
    with torch.no_grad():
        alone = linear_losses(hidden, weight, targets, words, *ranks)
    found = {"total": total.detach(), "losses": losses, "alone": alone, "hidden": hidden.grad, "weight": weight.grad}
    assert losses.dtype == alone.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    return {name: value.double().numpy() for name, value in found.items()}


def solved_on_ranks(dtype: torch.dtype) -> list[dict[str, Any]]:
    kernel.CHUNK_ROWS, vocabulary_softmax._SOFTMAX_ELEMENTS = 4, 3 * 16
    mesh = open_mesh(Layout(tensor=RANKS), launched(), 60)
    found = [solved(*case, mesh.tensor, in_place, dtype) for case in PROBLEMS for in_place in (False, True)]
    close_mesh()
    return found


def reference(rows: int, words: int, size: float) -> dict[str, Tensor]:
    hidden, weight, targets = (x.requires_grad_(x.is_floating_point()) for x in problem(rows, words, size))
    losses = functional.cross_entropy((hidden @ weight.t())[:, :words], targets, reduction="none")
    total = 0.25 * losses.sum()
    (3 * total).backward()
    losses = losses.detach()
    found = {"total": total.detach(), "losses": losses, "alone": losses, "hidden": hidden.grad, "weight": weight.grad}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
def test_cut_over_ranks_equals_torch(dtype: torch.dtype, tolerance: float) -> None:
    ranks = run_ranks(RANKS, solved_on_ranks, dtype)
    cases = [case for case in PROBLEMS for _ in range(2)]
    for number, case in enumerate(cases):
        if dtype != torch.float64 and case[2] > 1:
            continue  # logits of 1e4 in float32 differ by more than any tolerance
        for name, expected in reference(*case).items():
            parts = [torch.from_numpy(rank[number][name]).view(-1) for rank in ranks]
            if name == "weight":
                found = torch.cat(parts).view_as(expected)
            elif name == "hidden":
                found = torch.stack(parts).sum(0).view_as(expected)
            else:
                found = parts[0].view_as(expected)
                assert all(torch.equal(part.view_as(expected), found) for part in parts)
            bound = tolerance * max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(found, expected, atol=bound, rtol=tolerance, msg=f"{case} {name}")


@pytest.mark.parametrize("case", PROBLEMS, ids=str)
def test_in_place_and_alone_equals_torch(case: tuple[int, int, float]) -> None:
    for name, expected in reference(*case).items():
        bound = 1e-12 * max(1.0, float(expected.abs().max()))
        found = torch.from_numpy(solved(*case, ALONE, True)[name].reshape(expected.shape))
        torch.testing.assert_close(found, expected, atol=bound, rtol=1e-12, msg=name)


def test_in_place_may_run_backward_twice() -> None:
    """As a schedule does that computes gradients of inputs and of weights apart."""
    hidden, weight, targets = problem(5, 50, 1.0)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    total, _ = cross_entropy_in_place(functional.linear(hidden, weight), targets, 50, 0.25)
    (inputs,) = torch.autograd.grad(3 * total, hidden, retain_graph=True)
    (weights,) = torch.autograd.grad(3 * total, weight)
    expected = reference(5, 50, 1.0)
    torch.testing.assert_close(inputs, expected["hidden"], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(weights, expected["weight"], atol=1e-12, rtol=1e-12)


class Peak(TorchDispatchMode):
    """The bytes held at once by what operations made, and the largest wide tensor among it."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: list[weakref.ref[Tensor]] = []
        self.bytes, self.widest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, Tensor)]
        self._alive = [ref for ref in self._alive if ref() is not None] + [weakref.ref(x) for x in made]
        tensors = [x for ref in self._alive if (x := ref()) is not None]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        self.bytes = max(self.bytes, sum(storages.values()))
        self.widest = max([self.widest, *(x.nbytes for x in made if x.dtype in (torch.float32, torch.float64))])
        return out


def peak_on_ranks(rows: int, words: int, width: int, in_place: bool) -> tuple[int, int]:
    kernel.CHUNK_ROWS, vocabulary_softmax._SOFTMAX_ELEMENTS = 64, 8 * words // 2
    mesh = open_mesh(Layout(tensor=2), launched(), 60)
    axis = mesh.tensor
    hidden = torch.randn(rows, width).bfloat16().requires_grad_()
    weight = torch.randn(words // 2, width).bfloat16().requires_grad_()
    targets, ranks = torch.zeros(rows, dtype=torch.int64), (axis.rank, axis.size, axis.group)
    with Peak() as peak:
        if in_place:
            total, _ = cross_entropy_in_place(functional.linear(hidden, weight), targets, words - 5, 0.25, *ranks)
        else:
            total, _ = linear_cross_entropy(hidden, weight, targets, words - 5, 0.25, *ranks)
        (3 * total).backward()
    close_mesh()
    return peak.bytes, peak.widest


@pytest.mark.parametrize("in_place", [False, True])
def test_peak_is_the_local_logits_and_one_wide_chunk(in_place: bool) -> None:
    """In place: all rows' logits of this rank in bfloat16. Behind the projection: one chunk's."""
    rows, words, width = 512, 1024, 4
    held = words // 2
    logits = (rows if in_place else 64) * held * 2
    wide_chunk = 8 * held * 4
    # Three numbers a row and rank and what is made of them; gradients of hidden and weight, wide and narrow.
    around = rows * 2 * 3 * 4 * 6 + 4 * (rows + held) * width * 6
    for peak, widest in run_ranks(2, peak_on_ranks, rows, words, width, in_place):
        assert logits < peak <= logits + wide_chunk + around
        assert widest <= max(wide_chunk, rows * 2 * 3 * 4, held * width * 4)
    assert wide_chunk + around < rows * held * 2 / 2, "the test would not see a second tensor of logits"


def test_an_embedding_in_parts_sums_to_the_whole() -> None:
    weight = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = [weight[first : first + 4].clone().requires_grad_() for first in (0, 4)]
    tokens = torch.randint(0, 8, (2, 9), generator=torch.Generator().manual_seed(1))
    found = [embedding(tokens, part, first) for part, first in zip(parts, (0, 4), strict=True)]
    expected = functional.embedding(tokens, weight.requires_grad_())
    assert torch.equal(found[0] + found[1], expected)
    upstream = torch.randn(2, 9, 3, dtype=torch.float64)
    expected.backward(upstream)
    for out in found:
        out.backward(upstream)
    torch.testing.assert_close(torch.cat([part.grad for part in parts]), weight.grad, atol=1e-12, rtol=1e-12)
