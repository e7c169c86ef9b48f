"""The kernels of rotary positions against their eager definitions and against complex multiplication in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.config.errors import UnavailableError
from megatron.kernels import launch_triton, rope_triton
from megatron.kernels.rope import RopeTable, rope, rope_fused_, rope_qk, rope_table
from megatron.kernels.rope_triton import rope_fused_triton_, rope_qk_triton
from megatron.kernels.rope_triton import rope_triton as turn

# of values near 1: one bfloat16 ulp, of which the definition loses two and interpreted kernels one
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def positions(batch: int, length: int) -> Tensor:
    return torch.randint(0, 5000, (batch, length))


def by_complex_numbers(x: Tensor, table: RopeTable) -> Tensor:
    """The definition, in float64, from the angles that a table holds."""
    x, cos, sin = x.double(), table.cos.double(), table.sin.double()
    rotary = cos.shape[-1]
    half = rotary // 2
    turned = torch.complex(x[..., :half], x[..., half:rotary]) * torch.complex(cos[..., half:], sin[..., half:])
    return torch.cat((turned.real, turned.imag, x[..., rotary:]), -1)


def projected(
    batch: int, length: int, groups: int, heads: int, size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """As the model cuts a projection into heads: a view [batch, groups, T, heads, size]."""
    base = torch.randn(batch, length, groups * heads * size).to(device, dtype).requires_grad_()
    return base.view(batch, length, groups, heads, size).transpose(1, 2)


def gradients(outs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], upstream: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outs, inputs, upstream)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every launch that a test makes."""
    made: list[tuple[Any, ...]] = []
    kernel = rope_triton._rope_kernel

    class Noting:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **named: Any) -> None:
                made.append(args)
                kernel[grid](*args, **named)

            return launch

    monkeypatch.setattr(rope_triton, "_rope_kernel", Noting())
    return made


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    ("batch", "length", "groups", "heads", "size", "rotary"),
    [
        (2, 5, 2, 3, 8, 8),
        (1, 1, 1, 1, 2, 2),
        (2, 9, 1, 9, 6, 6),
        (1, 33, 3, 1, 64, 64),
        (2, 4, 2, 2, 20, 6),
        (1, 3, 1, 2, 7, 4),
    ],
)
def test_one_tensor(
    batch: int, length: int, groups: int, heads: int, size: int, rotary: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = projected(batch, length, groups, heads, size, dtype, device)
    table = rope_table(positions(batch, length).to(device), rotary, 100.0, dtype)
    ours, defined, exact = turn(x, table), rope(x, table), by_complex_numbers(x, table)
    assert ours.is_contiguous() and ours.dtype == dtype
    upstream = torch.randn(ours.shape).to(device, dtype)
    got, want, true = (gradients((out,), (x,), [upstream.to(out.dtype)])[0] for out in (ours, defined, exact))
    bound = ROUNDING[dtype]
    torch.testing.assert_close(ours, defined, atol=4 * bound, rtol=bound)
    torch.testing.assert_close(got, want, atol=4 * bound, rtol=bound)
    torch.testing.assert_close(ours.double(), exact, atol=2 * bound, rtol=bound)
    torch.testing.assert_close(got.double(), true.double(), atol=2 * bound, rtol=bound)
    assert torch.equal(ours[..., rotary:], x[..., rotary:])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("heads", "key_heads", "rotary"), [(3, 1, 8), (1, 1, 4), (2, 2, 8)])
def test_query_and_key_in_one_launch(
    heads: int, key_heads: int, rotary: int, shared: bool, device: torch.device, launches: list[tuple[Any, ...]]
) -> None:
    query = projected(2, 7, 3, heads, 8, torch.float32, device)
    key = projected(2, 7, 3, key_heads, 8, torch.float32, device)
    table = rope_table(positions(1 if shared else 2, 7).to(device), rotary, 100.0, torch.float32)
    ours, defined = rope_qk_triton(query, key, table), rope_qk(query, key, table)
    assert len(launches) == 1
    upstream = [torch.randn(out.shape, device=device) for out in ours]
    got, want = (gradients(outs, (query, key), upstream) for outs in (ours, defined))
    assert len(launches) == 2
    for here, there in zip(ours + got, defined + want, strict=True):
        torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)
    # the gradient lies in memory as the projection does
    assert [grad.stride() for grad in got] == [x.stride() for x in (query, key)]


def test_heads_cut_from_a_fused_projection(device: torch.device) -> None:
    fused = torch.randn(2, 5, (4 + 2 + 2) * 8, device=device, dtype=torch.float64, requires_grad=True)
    table = rope_table(positions(2, 5).to(device), 8, 100.0, torch.float64)

    def heads(both: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        query, key, value = fused.split([32, 16, 16], -1)
        cut = (x.view(2, 5, 2, -1, 8).transpose(1, 2) for x in (query, key))
        return torch.cat([y.transpose(1, 2).flatten(2) for y in both(*cut, table)] + [value], -1)

    ours, defined = heads(rope_qk_triton), heads(rope_qk)
    upstream = torch.randn_like(ours)
    torch.testing.assert_close(ours, defined, atol=1e-12, rtol=1e-12)
    (got,), (want,) = (gradients((out,), (fused,), [upstream]) for out in (ours, defined))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("unused", [0, 1])
def test_one_of_both_is_not_used(unused: int, device: torch.device) -> None:
    both = [projected(1, 3, 2, n, 4, torch.float64, device) for n in (2, 1)]
    table = rope_table(positions(1, 3).to(device), 4, 100.0, torch.float64)
    used = both[1 - unused]
    out = rope_qk_triton(*both, table)[1 - unused]
    none, got = torch.autograd.grad(out.square().sum(), (both[unused], used), allow_unused=True)
    (want,) = torch.autograd.grad(rope(used, table).square().sum(), used)
    assert none is None
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("made", ["elements reversed in memory", "expanded", "sliced"])
def test_any_strides(made: str, device: torch.device) -> None:
    x = {
        "elements reversed in memory": torch.randn(6, 3, 4, 2, 2, device=device).permute(4, 3, 2, 1, 0),
        "expanded": torch.randn(1, 1, 4, 3, 6, device=device).expand(2, 2, 4, 3, 6),
        "sliced": torch.randn(4, 2, 7, 3, 9, device=device)[::2, :, 1:5, :, 2:8],
    }[made].requires_grad_()
    table = rope_table(positions(2, 4).to(device), 6, 100.0, torch.float32)
    ours, defined = turn(x, table), rope(x, table)
    torch.testing.assert_close(ours, defined, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(6, 3, 4, 2, 2, device=device).permute(4, 3, 2, 1, 0)
    (got,), (want,) = (gradients((out,), (x,), [upstream]) for out in (ours, defined))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_more_heads_than_a_program_takes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope_triton, "processors", lambda device: 1 / 32)
    query, key = (projected(1, 3, 11, n, 4, torch.float64, device) for n in (2, 1))
    table = rope_table(positions(1, 3).to(device), 4, 100.0, torch.float64)
    for got, want in zip(rope_qk_triton(query, key, table), rope_qk(query, key, table), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_large_values_and_wide_angles(device: torch.device) -> None:
    x = (torch.randn(1, 2, 5, 2, 16) * 1e4).to(device, torch.bfloat16).requires_grad_()
    table = rope_table(positions(1, 5).to(device), 16, 1e4, torch.float32)
    ours, defined = turn(x, table), rope(x, table)
    assert ours.dtype == defined.dtype == torch.bfloat16
    exact = by_complex_numbers(x, table)
    # angles in float32: nothing is rounded but the result
    torch.testing.assert_close(ours.double(), exact, atol=1e-2, rtol=2**-7)
    torch.testing.assert_close(defined.double(), exact, atol=1e-2, rtol=2**-8)


@pytest.mark.gpu
def test_bfloat16_is_rounded_once(device: torch.device) -> None:
    if launch_triton.INTERPRETED:
        pytest.skip("interpreted kernels cut off where they should round")
    x = projected(2, 100, 4, 2, 64, torch.bfloat16, device)
    table = rope_table(positions(2, 100).to(device), 64, 1e4, torch.float32)
    exact = by_complex_numbers(x, table)
    torch.testing.assert_close(turn(x, table).double(), exact, atol=1e-6, rtol=2**-8)


@pytest.mark.parametrize("shape", [(0, 2, 3, 2, 4), (2, 2, 0, 2, 4), (2, 2, 3, 0, 4)])
def test_nothing_is_nothing(shape: tuple[int, ...], device: torch.device, launches: list[tuple[Any, ...]]) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    table = rope_table(torch.zeros(1, shape[2], dtype=torch.int64, device=device), 4, 100.0, torch.float32)
    turn(x, table).sum().backward()
    assert x.grad is not None and x.grad.shape == shape and not launches


def test_gradcheck(device: torch.device) -> None:
    query = torch.randn(1, 2, 2, 2, 4, dtype=torch.float64, device=device, requires_grad=True)
    key = torch.randn(1, 2, 2, 1, 4, dtype=torch.float64, device=device, requires_grad=True)
    table = rope_table(positions(1, 2).to(device), 2, 10.0, torch.float64)
    torch.autograd.gradcheck(lambda q, k: rope_qk_triton(q, k, table), (query, key), fast_mode=True)
    fused = torch.randn(1, 2, 4 * 4, dtype=torch.float64, device=device, requires_grad=True)
    torch.autograd.gradcheck(lambda x: rope_fused_triton_(x.clone(), table, 2, 1, 4), (fused,), fast_mode=True)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    ("query", "key", "size", "rotary", "length"), [(4, 2, 8, 8, 5), (3, 1, 6, 2, 5), (1, 1, 64, 64, 33)]
)
def test_in_place(
    query: int, key: int, size: int, rotary: int, length: int, dtype: torch.dtype, keep: bool, device: torch.device
) -> None:
    leaf = torch.randn(2, length, (query + 2 * key) * size).to(device, dtype).requires_grad_()
    table = rope_table(positions(2, length).to(device), rotary, 100.0, dtype)
    mine, theirs = leaf * 1, leaf * 1
    ours = rope_fused_triton_(mine, table, query, key, size, keep)
    defined = rope_fused_(theirs, table, query, key, size, keep)
    assert ours is mine and ours.data_ptr() == mine.data_ptr()
    upstream = torch.randn(ours.shape).to(device, dtype)
    (got,), (want,) = (gradients((out,), (leaf,), [upstream.clone()]) for out in (ours, defined))
    bound, values = ROUNDING[dtype], (query + key) * size
    torch.testing.assert_close(ours, defined, atol=4 * bound, rtol=bound)
    torch.testing.assert_close(got, want, atol=4 * bound, rtol=bound)
    heads = leaf.view(2, 1, length, -1, size)[..., : query + key, :]
    exact = by_complex_numbers(heads, table).reshape(2, length, -1)
    torch.testing.assert_close(ours[..., :values].double(), exact, atol=2 * bound, rtol=bound)
    assert torch.equal(ours[..., values:], leaf[..., values:])
    assert torch.equal(got[..., values:], upstream[..., values:])


def test_whose_gradient_is_written(device: torch.device, launches: list[tuple[Any, ...]]) -> None:
    """The one that comes in, where it is contiguous and need not be kept; never another."""
    leaf = torch.randn(2, 3, 16, device=device, requires_grad=True)
    table = rope_table(positions(1, 3).to(device), 4, 100.0, torch.float32)
    contiguous = torch.randn(2, 3, 16, device=device)
    given = {
        "kept": (True, contiguous.clone()),
        "given up": (False, contiguous.clone()),
        "strided": (False, contiguous.mT.contiguous().mT),
        "expanded": (False, contiguous[:, :1].expand(2, 3, 16)),
        "one number": (False, torch.ones((), device=device).expand(2, 3, 16)),
    }
    for name, (keep, upstream) in given.items():
        before, version = upstream.clone(), upstream._version
        (got,) = gradients((rope_fused_triton_(leaf * 1, table, 2, 1, 4, keep),), (leaf,), [upstream])
        (want,) = gradients((rope_fused_(leaf * 1, table, 2, 1, 4),), (leaf,), [before])
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, msg=name)
        written = name == "given up"
        assert torch.equal(upstream, before) != written and (upstream._version > version) == written, name
    assert len(launches) == 2 * len(given)


def test_in_place_through_a_linear_layer_and_a_view(device: torch.device) -> None:
    weight = torch.randn(16, 6, dtype=torch.float64, device=device, requires_grad=True)
    x = torch.randn(2, 3, 6, dtype=torch.float64, device=device, requires_grad=True)
    table = rope_table(positions(2, 3).to(device), 4, 100.0, torch.float64)
    upstream = torch.randn(2, 3, 16, dtype=torch.float64, device=device)

    def result(turned: Callable[..., Tensor], keep: bool) -> tuple[Tensor, ...]:
        out = turned((x.view(6, 6) @ weight.t()).view(2, 3, 16), table, 2, 1, 4, keep)
        return gradients((out.sin(),), (x, weight), [upstream])

    for keep in (True, False):
        for got, want in zip(result(rope_fused_triton_, keep), result(rope_fused_, True), strict=True):
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_torch_sees_that_the_input_was_overwritten(device: torch.device) -> None:
    leaf = torch.randn(1, 2, 16, device=device, requires_grad=True)
    table = rope_table(positions(1, 2).to(device), 4, 100.0, torch.float32)
    with pytest.raises(RuntimeError, match="leaf"):
        rope_fused_triton_(leaf, table, 2, 1, 4)
    y = leaf.exp()  # whose backward needs its result
    rope_fused_triton_(y, table, 2, 1, 4)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_what_is_refused(device: torch.device) -> None:
    table = rope_table(positions(2, 3).to(device), 4, 100.0, torch.float32)
    x = torch.randn(2, 1, 3, 1, 4, device=device)
    for wrong in (x[:1], x[:, :, :2], x[..., :2]):
        with pytest.raises(ValueError, match="angles"):
            turn(wrong, table)
    with pytest.raises(ValueError, match="one batch"):
        rope_qk_triton(x, x.double(), table)
    with pytest.raises(ValueError, match="fused projection"):
        rope_fused_triton_(torch.randn(2, 3, 12, device=device), table, 2, 1, 4)


def test_no_triton_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_triton, "INTERPRETED", False)
    table = rope_table(positions(1, 3), 4, 100.0, torch.float32)
    with pytest.raises(UnavailableError, match="eager"):
        turn(torch.randn(1, 1, 3, 1, 4), table)
