"""Rotary embedding against complex multiplication, its definition."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron.config.rope_scaling import rope_scaling_of
from megatron.kernels.rope import RopeTable, rope, rope_frequencies, rope_fused_, rope_qk, rope_table


@pytest.mark.parametrize(("size", "rotary"), [(8, 8), (8, 2), (6, 4)])
def test_turns_pairs_as_complex_numbers_do(size: int, rotary: int) -> None:
    x = torch.randn(2, 3, 5, 2, size, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]])
    out = rope(x, rope_table(positions, rotary, 100.0, torch.float64))
    half = rotary // 2
    angles = positions[:, None, :, None, None] * 100.0 ** (-2 * torch.arange(half, dtype=torch.float64) / rotary)
    turned = torch.complex(x[..., :half], x[..., half:rotary]) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag, x[..., rotary:]), -1)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    assert out.is_contiguous()


def test_gradcheck_through_a_view() -> None:
    x = torch.randn(1, 4, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    table = rope_table(torch.arange(4)[None], 4, 10.0, torch.float64)
    torch.autograd.gradcheck(lambda y: rope(y.transpose(1, 2), table), (x,))


def made(batch: int, length: int, rotary: int, dtype: torch.dtype = torch.float64) -> RopeTable:
    return rope_table(torch.randint(0, 100, (batch, length)), rotary, 10.0, dtype)


def test_the_halves_of_a_table_are_one_rotation() -> None:
    table, half = made(2, 5, 6), 3
    assert torch.equal(table.cos[..., :half], table.cos[..., half:])
    assert torch.equal(table.sin[..., :half], -table.sin[..., half:])


def test_wide_angles_leave_the_dtype() -> None:
    x, table = torch.randn(2, 1, 5, 2, 8).bfloat16().requires_grad_(), made(2, 5, 8, torch.float32)
    out = rope(x, table)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), rope(x.float(), table), atol=1e-6, rtol=2**-8)
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


def test_query_and_key_are_turned_alike() -> None:
    query, key = torch.randn(2, 3, 5, 4, 8), torch.randn(2, 3, 5, 1, 8)
    table = made(1, 5, 6, torch.float32)
    assert all(map(torch.equal, rope_qk(query, key, table), (rope(query, table), rope(key, table))))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("query", "key", "size", "rotary"), [(4, 2, 8, 8), (3, 1, 6, 2)])
def test_in_place_turns_queries_and_keys_and_nothing_else(
    query: int, key: int, size: int, rotary: int, keep: bool
) -> None:
    leaf = torch.randn(2, 5, (query + 2 * key) * size, dtype=torch.float64, requires_grad=True)
    table, turned = made(2, 5, rotary), (query + key) * size
    qkv = leaf * 1
    out = rope_fused_(qkv, table, query, key, size, keep)
    assert out is qkv
    heads = rope(leaf[..., :turned].unflatten(-1, (1, -1, size)).transpose(1, 2), table)
    expected = torch.cat((heads.reshape(2, 5, turned), leaf[..., turned:]), -1)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    upstream = torch.randn_like(leaf)
    (want,) = torch.autograd.grad(expected, leaf, upstream)
    (got,) = torch.autograd.grad(out, leaf, upstream.clone())
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    torch.autograd.gradcheck(lambda x: rope_fused_(x.clone(), table, query, key, size), (leaf,), fast_mode=True)


def test_whose_gradient_is_written() -> None:
    leaf, table = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True), made(1, 3, 4)
    contiguous = torch.randn_like(leaf)
    given = {
        "kept": (True, contiguous.clone()),
        "given up": (False, contiguous.clone()),
        "strided": (False, contiguous.mT.contiguous().mT),
        "expanded": (False, contiguous[:, :1].expand(2, 3, 16)),
    }
    for name, (keep, upstream) in given.items():
        before = upstream.clone()
        (got,) = torch.autograd.grad(rope_fused_(leaf * 1, table, 2, 1, 4, keep), leaf, upstream)
        assert torch.equal(upstream, before) != (name == "given up"), name
        # a rotation keeps lengths, and its transpose turns back
        torch.testing.assert_close(rope_fused_(got, table, 2, 1, 4), before, atol=1e-12, rtol=1e-12)


def test_one_gradient_for_both_sides_of_a_sum() -> None:
    """What keep_gradient is for, and why it is the default: torch hands one tensor to the two sides of an addition."""
    leaf, table = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True), made(1, 3, 4)
    other = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(leaf)
    (rope_fused_(leaf * 1, table, 2, 1, 4) + other * 2).backward(upstream)
    torch.testing.assert_close(other.grad, 2 * upstream, atol=0, rtol=0)


def test_what_is_refused() -> None:
    leaf, table = torch.randn(2, 3, 16, requires_grad=True), made(2, 3, 4, torch.float32)
    with pytest.raises(RuntimeError, match="leaf"):
        rope_fused_(leaf, table, 2, 1, 4)
    strided = torch.randn(2, 16, 3).mT
    for wrong in (leaf[..., :12] * 1, (leaf * 1)[:, :, None], strided, torch.randn(3, 2, 16).transpose(0, 1)):
        with pytest.raises(ValueError, match="fused projection"):
            rope_fused_(wrong, table, 2, 1, 4)
    for other in (made(3, 3, 4), made(2, 4, 4), made(2, 3, 8), RopeTable(table.cos, table.sin[:1])):
        with pytest.raises(ValueError, match="angles"):
            rope_fused_(leaf * 1, other, 2, 1, 4)


SCALINGS: list[dict[str, object]] = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 0.5,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 100,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 8.0, "beta_slow": 2.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512, "attention_factor": 1.25},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
    },
    {"rope_type": "yarn", "original_max_position_embeddings": 1024},
]


@pytest.mark.parametrize("size, part, theta", [(128, 1.0, 500000.0), (64, 0.75, 1e4), (8, 1.0, 100.0), (2, 1.0, 1e4)])
@pytest.mark.parametrize("words", SCALINGS, ids=lambda words: "-".join(map(str, words.values())))
def test_scaled_frequencies_are_those_of_transformers(
    words: dict[str, object], size: int, part: float, theta: float
) -> None:
    longest = 131072
    config = LlamaConfig(
        hidden_size=4 * size,
        num_attention_heads=4,
        max_position_embeddings=longest,
        rope_parameters=words | {"rope_theta": theta, "partial_rotary_factor": part, "factor": words.get("factor")},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[str(words["rope_type"])](config, torch.device("cpu"))
    scaling = rope_scaling_of(words, "words", longest)
    assert scaling is not None and scaling.attention_scale == pytest.approx(factor, rel=1e-15)
    found = rope_frequencies(int(size * part), theta, torch.float64, torch.device("cpu"), scaling)
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0)
    table = rope_table(torch.arange(9)[None], int(size * part), theta, torch.float32, scaling)
    angles = torch.arange(9)[:, None] * expected
    wanted = torch.cat((angles.cos(), angles.cos()), -1) * factor
    torch.testing.assert_close(table.cos[0, 0, :, 0], wanted, rtol=1e-5, atol=1e-5)


def test_scaled_frequencies_are_made_once_and_serve_gradients() -> None:
    scaling = rope_scaling_of({"rope_type": "linear", "factor": 7.0}, "words")
    wanted = (4, 11.0, torch.float64, torch.device("cpu"), scaling)
    with torch.inference_mode():
        first = rope_frequencies(*wanted)
        rope_table(torch.arange(3)[None], 4, 11.0, torch.float64, scaling)
    assert rope_frequencies(*wanted) is first and not first.is_inference()
    x = torch.randn(1, 1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    yarn = rope_scaling_of({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, "words")
    for each in (scaling, yarn):
        table = rope_table(torch.arange(3)[None], 4, 11.0, torch.float64, each)
        torch.autograd.gradcheck(lambda y, table=table: rope(y, table), (x,))
