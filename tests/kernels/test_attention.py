"""Attention against a softmax written out in float64, at odd shapes; gradients by autograd of that, and gradcheck."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron.kernels import attention_blockwise as blockwise
from megatron.kernels.attention import (
    attention_sdpa,
    attention_sdpa_pieces,
    piece_starts,
    plan_for_sdpa,
    plan_pieces,
    runs_of,
)


def written_out(query: Tensor, key: Tensor, value: Tensor, ids: Tensor) -> Tensor:
    """Position by position, from the definition."""
    batch, groups, length, heads, size = query.shape
    out = torch.zeros(batch, length, groups, heads, size, dtype=query.dtype)
    for b in range(batch):
        for q in range(length):
            first = q
            while first > 0 and ids[b, first - 1] == ids[b, q]:
                first -= 1
            for g in range(groups):
                for h in range(heads):
                    scores = key[b, g, first : q + 1, 0] @ query[b, g, q, h] / size**0.5
                    out[b, q, g, h] = torch.softmax(scores, 0) @ value[b, g, first : q + 1, 0]
    return out.reshape(batch, length, groups * heads * size)


def random_inputs(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    batch, groups, length, heads, size = shape
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, groups, length, n, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (heads, 1, 1)
    )


shapes = st.tuples(
    st.integers(1, 2), st.integers(1, 2), st.integers(1, 9), st.integers(1, 3), st.sampled_from([1, 2, 5])
)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 99), st.integers(1, 5), st.booleans(), st.data())
def test_every_way_equals_the_definition(
    shape: tuple[int, ...], seed: int, block: int, documents: bool, data: st.DataObject
) -> None:
    batch, _, length, _, _ = shape
    steps = st.lists(st.integers(0, 1 if documents else 0), min_size=length, max_size=length)
    ids = torch.tensor([data.draw(steps) for _ in range(batch)]).cumsum(1).int()
    inputs = random_inputs(shape, seed)
    expected = written_out(*inputs, ids)
    first = piece_starts(ids)
    plan = blockwise.plan_blocks(first, torch.float64, block)
    torch.testing.assert_close(attention_sdpa(*inputs, plan_for_sdpa(first)), expected, atol=1e-12, rtol=1e-10)
    ours = blockwise.attention_blockwise(*inputs, plan)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-10)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for got, want in zip(torch.autograd.grad(ours, inputs, upstream), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 99), st.integers(1, 5), st.data())
def test_queries_of_some_positions_equal_those_of_all(
    shape: tuple[int, ...], seed: int, block: int, data: st.DataObject
) -> None:
    batch, _, length, _, _ = shape
    steps = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    ids = torch.tensor([data.draw(steps) for _ in range(batch)]).cumsum(1).int()
    positions = torch.tensor(sorted(data.draw(st.sets(st.integers(0, length - 1), min_size=1))))
    query, key, value = random_inputs(shape, seed)
    first = piece_starts(ids)
    expected = attention_sdpa(query, key, value, plan_for_sdpa(first))[:, positions]
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, (query, key, value), upstream)
    here = query[:, :, positions]
    blocks = blockwise.plan_blocks(first, torch.float64, block, positions)
    for ours in (
        attention_sdpa_pieces(here, key, value, plan_pieces(first, positions)),
        blockwise.attention_blockwise(here, key, value, blocks),
    ):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-10)
        for got, want in zip(
            torch.autograd.grad(ours, (query, key, value), upstream, retain_graph=True), wanted, strict=True
        ):
            torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-9)


def test_runs_of_positions() -> None:
    assert list(runs_of(torch.tensor([0, 1, 2, 6, 7, 9]))) == [(0, 3, 0), (3, 5, 6), (5, 6, 9)]
    assert list(runs_of(torch.tensor([4]))) == [(0, 1, 4)]


def test_gradcheck() -> None:
    inputs = random_inputs((2, 2, 7, 2, 3), 0)
    plan = blockwise.plan_blocks(piece_starts(torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0] * 7])), torch.float64, 3)
    torch.autograd.gradcheck(lambda *x: blockwise.attention_blockwise(*x, plan), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_made_again_are_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs((2, 2, 300, 2, 8), 4, dtype)
    ids = torch.zeros(2, 300, dtype=torch.int32)
    ids[1, 40:] = 1
    plan = blockwise.plan_blocks(piece_starts(ids), dtype)
    results = []
    for kept_bytes in (1 << 40, 0):
        monkeypatch.setattr(blockwise, "KEPT_BYTES", kept_bytes)
        out = blockwise.attention_blockwise(*inputs, plan)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bf16_error_is_within_twice_that_of_torch_sdpa() -> None:
    inputs = random_inputs((2, 2, 256, 2, 32), 9, torch.bfloat16)
    first = piece_starts(torch.zeros(2, 256, dtype=torch.int32))
    exact = attention_sdpa(*(x.double() for x in inputs), None)
    ours = blockwise.attention_blockwise(*inputs, blockwise.plan_blocks(first, torch.bfloat16)).double() - exact
    theirs = attention_sdpa(*inputs, None).double() - exact
    assert ours.square().mean().sqrt() < 2 * theirs.square().mean().sqrt()


def test_large_scores_and_strided_inputs_stay_exact() -> None:
    inputs = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) * 300 for x in random_inputs((3, 2, 20, 2, 4), 2)]
    first = piece_starts(torch.zeros(3, 20, dtype=torch.int32))
    ours = blockwise.attention_blockwise(*inputs, blockwise.plan_blocks(first, torch.float64, 6))
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours, attention_sdpa(*inputs, None), atol=1e-9, rtol=1e-9)


def test_a_new_number_is_a_new_piece_wherever_it_comes_from() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 7, 7]], dtype=torch.int32)
    assert piece_starts(ids).tolist() == [[0, 0, 2, 2, 2, 5], [0, 0, 0, 0, 4, 4]]
