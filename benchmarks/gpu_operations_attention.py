"""Attention as `gpu.py` checks and times it: causal, with one document a row or several, by every kernel there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_operations import TOLERANCES, Call, Inputs, Maker, NotHere, Operation, Sizes, Traffic, Way, compiled, door
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron.kernels.attention import attention_sdpa, piece_starts, plan_for_sdpa
from megatron.kernels.attention_blockwise import attention_blockwise, plan_blocks
from megatron.kernels.attention_choice import attention_call, attention_obstacle
from megatron.kernels.attention_flex import attention_flex, plan_flex
from megatron.kernels.attention_unfused import attention_unfused, plan_unfused
from megatron.kernels.attention_varlen import attention_cudnn, attention_varlen, plan_cudnn, plan_varlen
from megatron.kernels.masked_softmax import causal_span, masked_softmax


def _inputs(sizes: Sizes, make: Maker) -> Inputs:
    batch, length, groups, heads, size = (sizes[key] for key in ("batch", "T", "groups", "heads", "d"))
    lie = [make.normal(batch, length, groups, n, size, grad=False) for n in (heads, 1, 1)]
    query, key, value = (x.transpose(1, 2).requires_grad_() for x in lie)
    return {"query": query, "key": key, "value": value, "first": _first(sizes, make)}


def _first(sizes: Sizes, make: Maker) -> Tensor:
    """Where each position's document begins, of equally long documents: what traffic counts."""
    places = torch.arange(sizes["T"], device=make.device).expand(sizes["batch"], sizes["T"])
    return piece_starts(places * sizes["documents"] // sizes["T"])


def _planned(name: str, kernel: Callable[..., Tensor], plan: Callable[..., Any], gpu: bool = False) -> Way:
    """name: of the backend, whose obstacles are asked. gpu: whether it is there on GPUs alone, in half precision."""

    def way(inputs: Inputs) -> Call:
        query, key, value, first = inputs.values()
        if gpu and (query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16)):
            raise NotHere("a kernel for GPUs, of half precision")
        call = attention_call(query.device, query.dtype, query.shape[-1], documents=bool(first.any()))
        if name != "eager" and query.dtype != torch.float64 and (why := attention_obstacle(name, call)):
            raise NotHere(why)
        planned = plan(first, query.dtype)
        return lambda: kernel(query, key, value, planned)

    return way


def _by(backend: SDPBackend) -> Callable[..., Tensor]:
    def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        try:
            with sdpa_kernel(backend):
                return attention_sdpa(query, key, value, mask)
        except RuntimeError as error:
            if "No available kernel" in str(error) or "No viable backend" in str(error):
                raise NotHere(f"torch has no such kernel for this call: {str(error).splitlines()[0]}") from None
            raise

    return kernel


def _causal_only(first: Tensor, _: torch.dtype) -> None:
    if bool(first.any()):
        raise NotHere("knows no documents")


def _traffic(sizes: Sizes, item: int) -> Traffic:
    """Two products forward and five backward over the visible half of each document's square."""
    batch, length, groups, heads, size = (sizes[key] for key in ("batch", "T", "groups", "heads", "d"))
    queries = batch * length * groups * heads * size
    keys = batch * length * groups * size
    pairs = batch * groups * heads * length * length / sizes["documents"] / 2
    flops = 4.0 * pairs * size
    return Traffic((2 * queries + 2 * keys) * item, (4 * queries + 4 * keys) * item, flops, 2.5 * flops)


_SHAPE = {"groups": 8, "heads": 4, "d": 128}
_CHECKED = (
    {"batch": 2, "T": 2048, **_SHAPE, "documents": 1},
    {"batch": 2, "T": 2048, **_SHAPE, "documents": 8},
    {"batch": 3, "T": 333, "groups": 2, "heads": 3, "d": 64, "documents": 5},
)
_TIMED = (
    {"batch": 2, "T": 8192, **_SHAPE, "documents": 1},
    {"batch": 2, "T": 8192, **_SHAPE, "documents": 8},
    {"batch": 8, "T": 2048, "groups": 8, "heads": 4, "d": 64, "documents": 1},
    {"batch": 8, "T": 2048, "groups": 8, "heads": 4, "d": 64, "documents": 4},
)


def _softmax_inputs(sizes: Sizes, make: Maker) -> Inputs:
    batch, heads, queries, keys = (sizes[key] for key in ("batch", "heads", "Q", "K"))
    scores = make.normal(batch, heads, queries, keys, scale=3.0)
    return {"scores": scores, "scale": 0.125, "span": causal_span(queries, keys, make.device)}


def _softmax_traffic(sizes: Sizes, item: int) -> Traffic:
    """Of scores only the visible half is read; all are written."""
    scores = sizes["batch"] * sizes["heads"] * sizes["Q"] * sizes["K"] * item
    return Traffic(1.5 * scores, 2.0 * scores)


ATTENTION = (
    Operation(
        "attention",
        _inputs,
        {
            "eager": _planned("eager", attention_sdpa, lambda first, _: plan_for_sdpa(first)),
            "sdpa, flash": _planned("sdpa", _by(SDPBackend.FLASH_ATTENTION), _causal_only, gpu=True),
            "sdpa, cudnn": _planned("sdpa", _by(SDPBackend.CUDNN_ATTENTION), _causal_only, gpu=True),
            "varlen": _planned("varlen", attention_varlen, lambda first, _: plan_varlen(first)),
            "cudnn": _planned("cudnn", attention_cudnn, lambda first, _: plan_cudnn(first)),
            "flex": _planned("flex", attention_flex, lambda first, _: plan_flex(first)),
            "unfused": _planned("unfused", attention_unfused, lambda first, _: plan_unfused(first)),
            "blockwise": _planned("blockwise", attention_blockwise, plan_blocks),
        },
        _traffic,
        _CHECKED,
        _TIMED,
        ({"batch": 1, "T": 24, "groups": 2, "heads": 2, "d": 16, "documents": 3},),
        dtypes=(torch.bfloat16,),
        tolerances=TOLERANCES | {torch.bfloat16: 1e-2},  # weights, and products within kernels, are rounded too
    ),
    Operation(
        "masked_softmax",
        _softmax_inputs,
        {
            "eager": door("masked_softmax", "masked_softmax"),
            "compile": compiled(masked_softmax),
            "triton": door("masked_softmax_triton", "masked_softmax_triton"),
        },
        _softmax_traffic,
        ({"batch": 2, "heads": 8, "Q": 1024, "K": 1024}, {"batch": 1, "heads": 3, "Q": 77, "K": 333}),
        ({"batch": 2, "heads": 32, "Q": 4096, "K": 4096},),
        ({"batch": 1, "heads": 2, "Q": 5, "K": 19},),
    ),
)
