"""Triton's cross-entropy against the eager definition and against formulas in float64."""

from __future__ import annotations

import os
from pathlib import Path
from subprocess import run
from sys import executable
from typing import Any

import pytest
import torch
from kernels.test_cross_entropy import minimised
from ranks import run_ranks
from torch import Tensor
from torch.nn import functional

from megatron.config.errors import UnavailableError
from megatron.config.layout import Layout
from megatron.kernels import cross_entropy as kernel
from megatron.kernels import launch_triton, vocabulary_softmax, vocabulary_softmax_triton
from megatron.kernels.cross_entropy import IGNORED, cross_entropy_in_place, linear_cross_entropy, linear_losses
from megatron.kernels.cross_entropy_triton import cross_entropy_triton, multiply_triton
from megatron.kernels.launch_triton import processors
from megatron.kernels.vocabulary_words import PLAIN, Objective, Words, wide, words_of
from megatron.parallel.mesh import close_mesh, launched, open_mesh

BOTH = Objective(0.01, 0.1)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-7}
"""Of slopes; one unit in the last place of bfloat16, because the interpreter cuts off where it should round."""


def problem(
    rows: int, held: int, vocabulary: int, dtype: torch.dtype, device: torch.device, size: float = 3
) -> tuple[Tensor, Tensor]:
    """Logits [rows, held] and targets; every third row from the second on has none."""
    generator = torch.Generator().manual_seed(rows + held)
    logits = torch.randn(rows, held, generator=generator, dtype=torch.float64) * size
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[1::3] = IGNORED
    return logits.to(device, dtype), targets.to(device)


def reference(logits: Tensor, targets: Tensor, vocabulary: int, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, what is minimised, slopes of its sum) in float64."""
    spread = logits.double().clone().requires_grad_()
    rows = minimised(spread[:, :vocabulary], targets, objective.z_loss, objective.label_smoothing)
    (slopes,) = torch.autograd.grad(rows.sum(), spread)
    return minimised(spread[:, :vocabulary], targets, 0, 0).detach(), rows.detach(), slopes


def close(found: Tensor, expected: Tensor, tolerance: float, bound: float) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance * bound)


# Columns: fewer than a tile; whole tiles, a partial one and padding; a vocabulary that ends in the middle of a tile.
SHAPES = [(300, 297), (5003, 5000), (4500, 2300)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("held", "vocabulary"), SHAPES)
@pytest.mark.parametrize("objective", [PLAIN, BOTH], ids=["plain", "z-loss and smoothing"])
@pytest.mark.parametrize("more", [None, 3], ids=["one row", "more rows than processors"])
def test_losses_and_slopes(
    device: torch.device, dtype: torch.dtype, held: int, vocabulary: int, objective: Objective, more: int | None
) -> None:
    rows = 1 if more is None else processors(device) + more
    logits, targets = problem(rows, held, vocabulary, dtype, device)
    words, scale, tolerance = words_of(held, vocabulary), 1 / 3, TOLERANCE[dtype]
    expected = reference(logits, targets, vocabulary, objective)
    found = []
    for both in (vocabulary_softmax.losses_and_slopes, vocabulary_softmax_triton.losses_and_slopes_triton):
        losses = torch.empty(rows, dtype=wide(dtype), device=device)
        objectives = losses if objective.plain else torch.empty_like(losses)
        slopes = logits.clone()
        both(slopes, targets, words, scale, objective, losses, objectives)
        found.append((losses, objectives, slopes))
    for number, (losses, objectives, slopes) in enumerate(found):
        for pair in (
            (losses, found[0][0]),
            (objectives, found[0][1]),
            (losses, expected[0]),
            (objectives, expected[1]),
        ):
            close(*pair, min(tolerance, 2e-6), 10)
        close(slopes, expected[2] * scale, tolerance, 1e-3)
        assert not slopes[:, vocabulary:].any() and not slopes[targets == IGNORED].any(), number


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 7])
def test_statistics_and_slopes_of_a_part_of_the_vocabulary(device: torch.device, dtype: torch.dtype, rows: int) -> None:
    """As each rank has them: targets before, in and after its words, padding behind them, or nothing but padding."""
    held, tolerance = 2100, TOLERANCE[dtype]
    for rank, vocabulary in ((0, 6000), (1, 6000), (2, 6000), (2, 4000)):
        logits, _ = problem(rows, held, held, dtype, device)
        targets = (torch.arange(rows, device=device) * 997 + 300) % vocabulary
        words = words_of(held, vocabulary, rank)
        for objective in (PLAIN, BOTH):
            expected = vocabulary_softmax.own_statistics(logits, targets, words, objective)
            found = vocabulary_softmax_triton.own_statistics_triton(logits, targets, words, objective)
            torch.testing.assert_close(found, expected, rtol=10 * tolerance, atol=100 * tolerance)
            whole = torch.ones_like(expected) * 20
            whole[:, 2] = expected[:, 2]  # the target's logit, right where it is held
            other = logits.clone()
            vocabulary_softmax.slopes(logits, whole, targets, words, 0.7, objective)
            vocabulary_softmax_triton.slopes_triton(other, whole, targets, words, 0.7, objective)
            torch.testing.assert_close(other, logits, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("objective", [PLAIN, BOTH], ids=["plain", "z-loss and smoothing"])
@pytest.mark.parametrize("layout", ["rows", "columns", "wider"])
def test_of_given_logits(device: torch.device, objective: Objective, layout: str) -> None:
    """Forward and backward, with shapes, an upstream of each row and logits that lie otherwise in memory."""
    logits, targets = problem(6, 300, 300, torch.float32, device)
    if layout == "columns":
        logits = logits.t().contiguous().t()
    elif layout == "wider":
        logits = functional.pad(logits, (0, 5))[:, :300]
    terms = (objective.z_loss, objective.label_smoothing)
    logits = logits.requires_grad_()
    found = cross_entropy_triton(logits.view(2, 3, 300), targets.view(2, 3), *terms)
    close(found, kernel.cross_entropy(logits, targets, *terms).view(2, 3).detach(), 2e-6, 10)
    upstream = torch.linspace(-1, 2, 6, device=device)
    (slopes,) = torch.autograd.grad(found, logits, upstream.view(2, 3))
    _, rows, expected = reference(logits.detach(), targets, 300, objective)
    close(found.view(-1), rows, 2e-6, 10)
    close(slopes, expected * upstream[:, None], 2e-6, 1)
    assert found.shape == (2, 3)


def test_equals_torch_with_smoothed_labels(device: torch.device) -> None:
    logits, targets = problem(5, 301, 301, torch.float64, device)
    expected = functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(cross_entropy_triton(logits, targets, label_smoothing=0.2), expected)
    padded = functional.pad(logits, (0, 3), value=50.0)
    found = cross_entropy_triton(padded, targets, label_smoothing=0.2, vocab_size=301)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_gradcheck(device: torch.device, rows: int) -> None:
    logits, targets = problem(rows, 5, 5, torch.float64, device, 1)
    torch.autograd.gradcheck(lambda x: cross_entropy_triton(x, targets, 0.1, 0.2), logits.requires_grad_())
    hidden, weight = (torch.randn(n, 2, dtype=torch.float64, device=device).requires_grad_() for n in (rows, 5))

    def total(h: Tensor, w: Tensor) -> Tensor:
        terms: Any = {"z_loss": 0.1, "label_smoothing": 0.2}
        return linear_cross_entropy(h, w, targets.clamp(max=3), 4, 0.5, kernels="triton", **terms)[0]

    torch.autograd.gradcheck(total, (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits_stay_finite_and_right(device: torch.device, dtype: torch.dtype) -> None:
    rows = processors(device) + 1
    logits = torch.zeros(rows, 300, device=device, dtype=dtype)
    logits[:, 5], logits[:, 9], logits[:, 11] = 1e4, -1e4, -torch.inf
    high = float(logits[0, 5])
    for word, loss in ((5, 0.0), (9, 2 * high), (0, high)):
        slopes = logits.clone()
        targets = torch.full((rows,), word, device=device)
        total, losses = cross_entropy_in_place(slopes.requires_grad_(), targets, 300, 1.0, kernels="triton")
        assert losses.tolist() == [loss] * rows
        (slopes,) = torch.autograd.grad(total, slopes)
        expected = torch.zeros(300, device=device)
        expected[5] += 1
        expected[word] -= 1
        assert torch.equal(slopes.float(), expected.expand(rows, 300))


def test_what_is_not_a_number_is_not_hidden(device: torch.device) -> None:
    for bad in (torch.nan, torch.inf):
        logits, targets = problem(3, 300, 300, torch.float32, device)
        logits[0, 7], logits[1, 7] = bad, bad  # the second has no target
        losses = cross_entropy_triton(logits, targets)
        assert losses.isnan().tolist() == [True, False, False]


def test_without_rows_or_targets(device: torch.device) -> None:
    for rows in (0, 5):
        logits = torch.randn(rows, 40, device=device, requires_grad=True)
        targets = torch.full((rows,), IGNORED, device=device)
        losses = cross_entropy_triton(logits, targets, 0.1, 0.1)
        losses.sum().backward()
        assert losses.shape == (rows,) and not losses.any() and not logits.grad.any()
        hidden, weight = (torch.randn(n, 4, device=device, requires_grad=True) for n in (rows, 40))
        total, losses = linear_cross_entropy(hidden, weight, targets, 40, 1.0, kernels="triton")
        total.backward()
        assert float(total.detach()) == 0 and not hidden.grad.any() and not weight.grad.any()
        assert linear_losses(hidden, weight, targets, 40, kernels="triton").shape == (rows,)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_linear_equals_eager_in_chunks(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "CHUNK_ROWS", 4)
    monkeypatch.setattr(kernel, "_CHUNK_BYTES", 1)
    terms: Any = {"z_loss": 0.01, "label_smoothing": 0.1}
    generator, rows = torch.Generator().manual_seed(0), 9 if device.type == "cpu" else 2500  # 1024 at once on a GPU
    hidden, weight = (torch.randn(n, 6, generator=generator).to(device, dtype).requires_grad_() for n in (rows, 70))
    targets = torch.randint(0, 65, (rows,), generator=generator).to(device)
    targets[3] = IGNORED
    found = []
    for kernels in ("eager", "triton"):
        total, losses = linear_cross_entropy(hidden, weight, targets, 65, 0.25, kernels=kernels, **terms)
        alone = linear_losses(hidden, weight, targets, 65, kernels=kernels)
        found.append((total, losses, alone, *torch.autograd.grad(3 * total, (hidden, weight))))
        found[-1] += torch.autograd.grad(alone.sum(), (hidden, weight))
    for triton, eager in zip(found[1], found[0], strict=True):
        close(triton, eager, 2 * TOLERANCE[dtype], 10)
    # A value of bfloat16 logits apart from float32's is up to 2^-8 of it: both are compared with the same logits.
    expected = minimised((hidden @ weight.t())[:, :65].double(), targets, 0.01, 0.1)
    close(found[1][0], 0.25 * expected.sum(), max(1e-5, TOLERANCE[dtype] / 100), 1)


def test_in_place_may_run_backward_twice(device: torch.device) -> None:
    logits, targets = problem(4, 300, 297, torch.float32, device)
    _, rows, expected = reference(logits, targets, 297, BOTH)
    terms: Any = {"z_loss": 0.01, "label_smoothing": 0.1}
    own = logits.clone().requires_grad_()
    total, _ = cross_entropy_in_place(own, targets, 297, 0.5, kernels="triton", **terms)
    close(total, 0.5 * rows.sum(), 2e-6, 10)
    for upstream in (3.0, 3.0, 1.0):
        (slopes,) = torch.autograd.grad(upstream * total, own, retain_graph=True)
        close(slopes, expected * 0.5 * upstream, 1e-5, 1)


def test_multiplication_reads_its_factor_on_the_device(device: torch.device) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        values = torch.arange(9000, device=device).to(dtype)
        for factor in (1.0, 0.5):
            found = values.clone()
            multiply_triton(found, torch.tensor(factor, device=device))
            assert torch.equal(found, values * factor)
        gaps = values.clone().view(90, 100)[:, :7]
        multiply_triton(gaps, torch.tensor(2.0, device=device))
        assert torch.equal(gaps, values.view(90, 100)[:, :7] * 2)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_triton, "INTERPRETED", False)
    logits, targets = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UnavailableError, match="eager"):
        cross_entropy_triton(logits, targets)
    with pytest.raises(UnavailableError, match="eager"):
        cross_entropy_in_place(logits, targets, 4, 1.0, kernels="triton")


def test_logits_whose_words_lie_apart_are_not_overwritten(device: torch.device) -> None:
    logits, targets = problem(3, 40, 40, torch.float32, device)
    with pytest.raises(ValueError, match="side by side"):
        cross_entropy_in_place(logits.t().contiguous().t(), targets, 40, 1.0, kernels="triton")


def shared(words: Words, kernels: Any, terms: dict[str, float], dtype: torch.dtype) -> list[Tensor]:
    """What one of two ranks finds with its half of 600 words."""
    device, place = torch.device("cpu"), (words.first // words.held, words.size, words.group)
    logits, targets = problem(5, 600, words.vocabulary, dtype, device)
    own = logits[:, words.first : words.first + words.held].clone().requires_grad_()
    total, losses = cross_entropy_in_place(own, targets, words.vocabulary, 0.25, *place, kernels=kernels, **terms)
    (slopes,) = torch.autograd.grad(3 * total, own)
    eye = torch.eye(5, dtype=dtype)
    weight = logits[:, words.first : words.first + words.held].t().contiguous()
    alone = linear_losses(eye, weight, targets, words.vocabulary, *place, kernels=kernels)
    hidden, weight = eye.requires_grad_(), weight.requires_grad_()
    linear, same = linear_cross_entropy(
        hidden, weight, targets, words.vocabulary, 0.25, *place, kernels=kernels, **terms
    )
    linear.backward()
    assert torch.equal(same, losses)
    return [total.detach(), losses, alone, slopes, linear.detach(), hidden.grad, weight.grad]


def shared_by_two(dtype: torch.dtype) -> list[dict[str, list[Tensor]]]:
    assert os.environ["TRITON_INTERPRET"] == "1"
    kernel.CHUNK_ROWS = 2
    mesh = open_mesh(Layout(tensor=2), launched(), 60)
    axis, found = mesh.tensor, []
    # 290 words: the second rank has padding alone
    for vocabulary in (597, 290):
        words = words_of(300, vocabulary, axis.rank, axis.size, axis.group)
        for terms in ({}, {"z_loss": 0.01}, {"z_loss": 0.01, "label_smoothing": 0.1}):
            found.append({kernels: shared(words, kernels, terms, dtype) for kernels in ("eager", "triton")})
    close_mesh()
    return [{name: [x.numpy() for x in values] for name, values in case.items()} for case in found]


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks share no GPU; the CPU's are interpreted")
def test_a_vocabulary_of_two_ranks() -> None:
    dtype = torch.float64
    both = run_ranks(2, shared_by_two, dtype)
    objectives = [PLAIN, Objective(0.01), BOTH]
    for number, ranks in enumerate(zip(*both, strict=True)):
        vocabulary, objective = (597, 290)[number // 3], objectives[number % 3]
        logits, targets = problem(5, 600, vocabulary, dtype, torch.device("cpu"))
        losses, rows, slopes = reference(logits, targets, vocabulary, objective)
        for kernels in ("eager", "triton"):
            parts = [[torch.from_numpy(x) for x in rank[kernels]] for rank in ranks]
            for total, reported, alone, _, linear, _, _ in parts:
                for found, expected in ((total, rows.sum() / 4), (linear, rows.sum() / 4), (reported, losses)):
                    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(alone, losses, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(torch.cat([p[3] for p in parts], 1), slopes * 0.75, rtol=1e-11, atol=1e-13)
            # With the identity as hidden states the weight's gradient is the slopes, turned.
            torch.testing.assert_close(torch.cat([p[6] for p in parts]).t(), slopes / 4, rtol=1e-11, atol=1e-13)
            hidden = slopes / 4 @ logits.t()
            torch.testing.assert_close(parts[0][5] + parts[1][5], hidden, rtol=1e-9, atol=1e-12)


COUNTED = """
import sys
sys.path[:0] = ["tests", "."]
from kernels.ahead_cross_entropy import BOTH, apart, given, in_place, linear
from kernels.compiled_ahead import noted_launches
import torch
for call in (
    lambda: in_place(8192, 128256, torch.bfloat16),
    lambda: in_place(64, 128256, torch.bfloat16),
    lambda: apart(8192, 128256, torch.bfloat16, BOTH, 8),
    lambda: given(8192, 128256, torch.bfloat16),
    lambda: linear(16384, 128256, 1024, torch.bfloat16),
):
    with noted_launches() as launches:
        call()
    print(*(launch[0].__name__ for launch in launches))
"""


def test_launches(repository: Path) -> None:
    """One kernel for each chunk of logits where all words are here, and what the docstrings say where they are not."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = run(
        [executable, "-c", COUNTED], cwd=repository, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    both, cut, apart, given, linear = (line.split() for line in done.stdout.splitlines())
    assert both == ["both_kernel", "_multiply_kernel"]
    assert cut == ["statistics_kernel", "merge_kernel", "slopes_kernel", "_multiply_kernel"]
    assert apart == ["statistics_kernel", "slopes_kernel", "merge_kernel"]
    assert given == ["statistics_kernel", "merge_kernel", "slopes_kernel"]
    # 4 chunks of 4096 rows, of 1 GB; then their losses alone
    assert linear == ["both_kernel"] * 4 + ["_multiply_kernel"] * 2 + ["statistics_kernel", "merge_kernel"] * 4
