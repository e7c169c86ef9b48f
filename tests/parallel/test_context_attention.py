"""Attention over context ranks equals one process: outputs and gradients of queries, keys and values, in float64."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from megatron.config.errors import ConfigError
from megatron.config.layout import Layout
from megatron.kernels.attention import attention_sdpa, piece_starts, plan_for_sdpa
from megatron.kernels.collectives import ALL_GATHER
from megatron.parallel.axis import ALONE, Axis
from megatron.parallel.context_attention import (
    ContextPlan,
    choose_method,
    context_attention,
    local_positions,
    plan_context,
)
from megatron.parallel.mesh import close_mesh, launched, open_mesh

WAYS = [(method, backend) for method in ("all-to-all", "gather") for backend in ("sdpa", "blockwise", "unfused")]
CASES = {
    # batch, groups, T, heads a group, d; documents cross every cut, end on cuts, or are one
    "grouped heads": ((3, 4, 48, 3, 5), "crossing"),
    "one row": ((1, 4, 16, 1, 4), "crossing"),
    "one document": ((1, 8, 32, 2, 2), "one"),
    "documents end on cuts": ((3, 4, 32, 2, 3), "on cuts"),
    "several blocks": ((2, 4, 1088, 1, 2), "crossing"),
}


def made(case: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Inputs, document ids and the upstream gradient, the same on every rank."""
    (batch, groups, length, heads, size), documents = CASES[case]
    generator = torch.Generator().manual_seed(7)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    inputs = [normal(batch, groups, length, n, size) for n in (heads, 1, 1)]
    upstream = normal(batch, length, groups * heads * size)
    ids = torch.zeros(batch, length, dtype=torch.int32)
    if documents == "crossing":
        ids = (torch.rand(batch, length, generator=generator) < 4 / length).cumsum(1).int()
    elif documents == "on cuts":
        ids = (torch.arange(length) // (length // 8)).expand(batch, length).clone().int()
        ids[0, length // 4 :] = 1
    return inputs, ids, upstream


def on_ranks(size: int, cases: list[str]) -> dict[tuple[str, str, str], list[np.ndarray]]:
    mesh = open_mesh(Layout(context=size), launched(), 60)
    results = {}
    for case in cases:
        inputs, ids, upstream = made(case)
        for method, backend in WAYS:
            here = local_positions(ids.shape[1], mesh.context, method)
            own = [x[:, :, here].requires_grad_() for x in inputs]
            plan = plan_context(piece_starts(ids), torch.float64, mesh.context, method, backend)
            out = context_attention(*own, plan, mesh.context, method, backend)
            gradients = torch.autograd.grad(out, own, upstream[:, here])
            results[case, method, backend] = [x.detach().numpy() for x in (here, out, *gradients)]
    close_mesh()
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_outputs_and_gradients_are_those_of_one_process(size: int) -> None:
    found = run_ranks(size, on_ranks, size, list(CASES))
    for case in CASES:
        inputs, ids, upstream = made(case)
        inputs = [x.requires_grad_() for x in inputs]
        whole = attention_sdpa(*inputs, plan_for_sdpa(piece_starts(ids)))
        expected = [whole.detach().transpose(0, 1), *torch.autograd.grad(whole, inputs, upstream)]
        for method, backend in WAYS:
            ranks = [[torch.from_numpy(x) for x in rank[case, method, backend]] for rank in found]
            order = torch.cat([rank[0] for rank in ranks])
            assert order.sort().values.tolist() == list(range(ids.shape[1]))
            for number, want in enumerate(expected):
                parts = [rank[number + 1] for rank in ranks]
                joined = torch.cat([p.transpose(0, 1) if number == 0 else p for p in parts], 0 if number == 0 else 2)
                got = torch.empty_like(want)
                got[(order,) if number == 0 else (slice(None), slice(None), order)] = joined
                torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12, msg=f"{case} {method} {backend}")


def in_bfloat16(method: str) -> list[np.ndarray]:
    mesh = open_mesh(Layout(context=2), launched(), 60)
    inputs, ids, upstream = made("grouped heads")
    here = local_positions(ids.shape[1], mesh.context, method)
    own = [x[:, :, here].bfloat16().requires_grad_() for x in inputs]
    plan = plan_context(piece_starts(ids), torch.bfloat16, mesh.context, method, "blockwise")
    out = context_attention(*own, plan, mesh.context, method, "blockwise")
    gradients = torch.autograd.grad(out, own, upstream[:, here].bfloat16())
    close_mesh()
    assert all(x.dtype == torch.bfloat16 for x in (out, *gradients))
    return [here.numpy(), *(x.detach().double().numpy() for x in (out, *gradients))]


@pytest.mark.parametrize("method", ["all-to-all", "gather"])
def test_bfloat16_goes_over_the_wire(method: str) -> None:
    inputs, ids, upstream = made("grouped heads")
    inputs = [x.bfloat16().double().requires_grad_() for x in inputs]
    whole = attention_sdpa(*inputs, plan_for_sdpa(piece_starts(ids)))
    expected = torch.autograd.grad(whole, inputs, upstream.bfloat16().double())
    for results in run_ranks(2, in_bfloat16, method):
        here, out, *gradients = (torch.from_numpy(x) for x in results)
        torch.testing.assert_close(out, whole[:, here], atol=0.02, rtol=0.02)
        for got, want in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, want[:, :, here], atol=0.06, rtol=0.03)


def exchanged_bytes(method: str) -> int:
    """What this rank hands to collectives in a forward and a backward pass."""
    mesh = open_mesh(Layout(context=2), launched(), 60)
    inputs, ids, upstream = made("grouped heads")
    here = local_positions(ids.shape[1], mesh.context, method)
    own = [x[:, :, here].requires_grad_() for x in inputs]
    plan = plan_context(piece_starts(ids), torch.float64, mesh.context, method, "blockwise")
    total = 0
    plain = dist.all_to_all_single, getattr(dist, ALL_GATHER)

    def count(collective: object, out: Tensor, x: Tensor, **rest: object) -> None:
        nonlocal total
        total += x.nbytes
        collective(out, x, **rest)  # type: ignore[operator]

    dist.all_to_all_single = functools.partial(count, plain[0])
    setattr(dist, ALL_GATHER, functools.partial(count, plain[1]))
    out = context_attention(*own, plan, mesh.context, method, "blockwise")
    torch.autograd.grad(out, own, upstream[:, here])
    close_mesh()
    return total


def test_bytes_are_those_of_the_formulas() -> None:
    (batch, groups, length, heads, size), _ = CASES["grouped heads"]
    position = batch * groups * size * 8
    # forward and backward each: queries, keys, values out and outputs back
    assert run_ranks(2, exchanged_bytes, "all-to-all") == [2 * position * length // 2 * (2 * heads + 2)] * 2
    # own keys and values out; the gradients of all keys and values back
    assert run_ranks(2, exchanged_bytes, "gather") == [position * 2 * (length // 2 + length)] * 2


def test_which_method_and_why() -> None:
    four = Axis(0, 4)
    assert choose_method("auto", 8, four)[0] == "all-to-all"
    assert choose_method("gather", 8, four)[0] == "gather"
    method, why = choose_method("auto", 6, four)
    assert method == "gather"
    assert why == (
        "keys and values gathered, because 6 key-value heads on each tensor rank do not divide by "
        "parallel.context 4 (6 = 4 x 1 + 2)"
    )
    assert "8 key-value heads on each tensor rank / 4 context ranks = 2" in choose_method("auto", 8, four)[1]
    with pytest.raises(ConfigError, match=r"1 key-value head on each tensor rank do.* \(1 = 4 x 0 \+ 1\); set"):
        choose_method("all-to-all", 1, four)


def test_every_rank_sees_as_many_keys_by_zigzag() -> None:
    for size in (2, 4):
        seen = [int((local_positions(32, Axis(r, size), "gather") + 1).sum()) for r in range(size)]
        assert len(set(seen)) == 1


def test_lengths_that_do_not_divide() -> None:
    assert local_positions(7, ALONE, "gather").tolist() == list(range(7))
    assert local_positions(8, Axis(1, 2), "all-to-all").tolist() == [4, 5, 6, 7]
    assert local_positions(8, Axis(1, 2), "gather").tolist() == [2, 3, 4, 5]
    with pytest.raises(ConfigError, match=r"length 10 is not a multiple of parallel.context 4 = 4 \(10 = 4 x 2 \+ 2"):
        local_positions(10, Axis(0, 4), "all-to-all")
    with pytest.raises(ConfigError, match=r"multiple of 2 x parallel.context 2 = 4 .*: set seq_length to 8 or 12"):
        local_positions(10, Axis(0, 2), "gather")


@pytest.mark.parametrize("backend", ["sdpa", "blockwise"])
def test_one_rank_is_the_kernel_bit_for_bit(backend: str) -> None:
    from megatron.kernels.attention_blockwise import attention_blockwise, plan_blocks

    inputs, ids, _ = made("several blocks")
    first = piece_starts(ids)
    plan = plan_context(first, torch.float64, ALONE, "gather", backend)
    assert isinstance(plan, ContextPlan)
    if backend == "sdpa":
        expected = attention_sdpa(*inputs, plan_for_sdpa(first))
    else:
        expected = attention_blockwise(*inputs, plan_blocks(first, torch.float64))
    assert torch.equal(context_attention(*inputs, plan, ALONE, "gather", backend), expected)
