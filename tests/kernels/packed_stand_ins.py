"""Stand-ins on the CPU for torch's packed attention of GPUs: the definition, document by document.

They are registered under the operations' own names, so that torch's schemas, its autograd and our calls are what runs.
What the real ones ask of their arguments is asserted.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def _documents(query: Tensor, key: Tensor, starts: tuple[Tensor, Tensor], top_left: bool) -> Iterator[tuple[Any, ...]]:
    """Of each document with queries: which they are, which its keys, and the weights [heads, queries, keys]."""
    heads = query.shape[1] // key.shape[1]
    for (q0, q1), (k0, k1) in zip(*(itertools.pairwise(x.tolist()) for x in starts), strict=True):
        if q0 == q1:
            continue
        places = torch.arange(q1 - q0) + (0 if top_left else k1 - k0 - (q1 - q0))
        hidden = torch.arange(k1 - k0)[None] > places[:, None]
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], key[k0:k1].repeat_interleave(heads, 1))
        weights = (scores * query.shape[2] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        yield slice(q0, q1), slice(k0, k1), weights


def _attended(query: Tensor, key: Tensor, value: Tensor, starts: tuple[Tensor, Tensor], top_left: bool) -> Tensor:
    """Causal attention of query [queries, heads, d] on key and value [keys, groups, d] within documents. Queries are a
    document's last ones, or with top_left its first.
    """
    out = torch.full_like(query, torch.nan)
    for queries, keys, weights in _documents(query, key, starts, top_left):
        values = value[keys].repeat_interleave(query.shape[1] // key.shape[1], 1)
        out[queries] = torch.einsum("hqk,khd->qhd", weights, values)
    return out


def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, starts: tuple[Tensor, Tensor], top_left: bool
) -> tuple[Tensor, Tensor, Tensor]:
    heads, scale = query.shape[1] // key.shape[1], query.shape[2] ** -0.5
    query_grad, key_grad, value_grad = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for queries, keys, weights in _documents(query, key, starts, top_left):
        wide_key, wide_value = (x[keys].repeat_interleave(heads, 1) for x in (key, value))
        slopes = torch.einsum("qhd,khd->hqk", grad[queries], wide_value)
        slopes = weights * (slopes - (slopes * weights).sum(-1, keepdim=True)) * scale
        query_grad[queries] = torch.einsum("hqk,khd->qhd", slopes, wide_key)
        for out, left, right in ((key_grad, slopes, query), (value_grad, weights, grad)):
            whole = torch.einsum("hqk,qhd->khd", left, right[queries])
            out[keys] = whole.unflatten(1, (-1, heads)).sum(2)
    return query_grad, key_grad, value_grad


def _check(query: Tensor, key: Tensor, starts: Tensor, total: int, longest: int) -> None:
    assert query.dim() == key.dim() == 3 and query.shape[1] % key.shape[1] == 0
    assert query.stride(-1) == key.stride(-1) == 1
    assert starts.dtype == torch.int32 and starts.is_contiguous()
    lengths = starts.diff()
    assert starts[0] == 0 and starts[-1] == total and (lengths >= 0).all()
    assert int(lengths.max()) <= longest and longest > 1, "documents are longer than was said"


def _flash_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, **others
):  # type: ignore[no-untyped-def] # fmt: skip
    assert is_causal and dropout_p == 0 and not return_debug_mask and all(x is None for x in others.values())
    _check(query, key, cum_seq_q, query.shape[0], max_q)
    _check(query, key, cum_seq_k, key.shape[0], max_k)
    out = _attended(query, key, value, (cum_seq_q, cum_seq_k), top_left=False)
    state = torch.zeros(2, dtype=torch.uint64)
    return out, query.new_zeros(query.shape[1], query.shape[0]), state, state[0], query.new_empty(0)


def _flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, *states,
    **others,
):  # type: ignore[no-untyped-def] # fmt: skip
    assert is_causal and logsumexp.shape == (query.shape[1], query.shape[0]) and out.shape == query.shape
    return _gradients(grad_out, query, key, value, (cum_seq_q, cum_seq_k), top_left=False)


def _cudnn_forward(
    query, key, value, attn_bias, cum_seq_q, cum_seq_k, max_q, max_k, compute_log_sumexp, dropout_p=0.0,
    is_causal=False, return_debug_mask=False, *, scale=None,
):  # type: ignore[no-untyped-def] # fmt: skip
    assert attn_bias is None and compute_log_sumexp and is_causal and dropout_p == 0 and scale is None
    assert all(x.is_contiguous() for x in (query, key, value)) and query.shape == key.shape == value.shape
    assert max_q == max_k > 128 and cum_seq_q is cum_seq_k or torch.equal(cum_seq_q, cum_seq_k)
    _check(query, key, cum_seq_q, query.shape[0], max_q)
    out = _attended(query, key, value, (cum_seq_q, cum_seq_k), top_left=True)
    state = torch.zeros((), dtype=torch.int64)
    logsumexp = query.new_zeros(query.shape[0], query.shape[1], 1)
    return out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, state, state.clone(), query.new_empty(0)


def _cudnn_backward(
    grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q,
    max_k, dropout_p, is_causal, *, scale=None,
):  # type: ignore[no-untyped-def] # fmt: skip
    assert attn_bias is None and is_causal and max_q == max_k > 128 and grad_out.is_contiguous()
    assert logsumexp.shape == (query.shape[0], query.shape[1], 1) and philox_seed.dtype == torch.int64
    return _gradients(grad_out, query, key, value, (cum_seq_q, cum_seq_k), top_left=True)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Within it the four operations exist on CPUs."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("_flash_attention_forward", _flash_forward, "CPU")
        library.impl("_flash_attention_backward", _flash_backward, "CPU")
        library.impl("_cudnn_attention_forward", _cudnn_forward, "CPU")
        library.impl("_cudnn_attention_backward", _cudnn_backward, "CPU")
    try:
        yield
    finally:
        library._destroy()
