"""8-bit products and casts, as `gpu.py` checks and times them."""

from __future__ import annotations

from typing import Any

import torch
from gpu_operations import Call, Inputs, Maker, Operation, Sizes, Traffic, door
from torch import Tensor
from torch.nn import functional

from megatron.kernels.fp8 import E4M3, E5M2


def _linear_inputs(sizes: Sizes, make: Maker) -> Inputs:
    """An outlier in a row, as activations have them: it sets the scale of all others."""
    x = make.normal(sizes["rows"], sizes["in"], grad=False)
    x[0, 0] = 20.0
    return {"x": x.requires_grad_(), "weight": make.normal(sizes["out"], sizes["in"], scale=sizes["in"] ** -0.5)}


def _linear_reference(inputs: Inputs) -> Call:
    """The product itself: what is off is what 8 bits cost."""
    x, weight = (tensor.detach().double().requires_grad_() for tensor in inputs.values())
    inputs.update(x=x, weight=weight)
    return lambda: functional.linear(x, weight)


def _bf16(inputs: Inputs) -> Call:
    return lambda: functional.linear(*inputs.values())


def _linear_traffic(sizes: Sizes, item: int) -> Traffic:
    """Products at twice the rate of bfloat16's, and of the casts each factor read twice and written twice narrow."""
    rows, inner, out = sizes["rows"], sizes["in"], sizes["out"]
    flops = 2.0 * rows * inner * out / 2
    casts = (2 * item + 2) * (rows * inner + inner * out)
    return Traffic(casts + rows * out * item, (2 * item + 2) * rows * out, flops, 2 * flops)


def _cast(dtype: torch.dtype) -> Operation:
    def inputs(sizes: Sizes, make: Maker) -> Inputs:
        return {"x": make.normal(sizes["rows"], sizes["columns"], grad=False), "dtype": dtype}

    def settled(result: Any) -> list[Tensor]:
        values, transposed, inverse = result
        return [values.float(), transposed.float(), inverse]

    def reference(made: Inputs) -> Call:
        cast = door("fp8", "fp8_cast")(made)
        return lambda: settled(cast())

    def traffic(sizes: Sizes, item: int) -> Traffic:
        return Traffic((2 * item + 2) * sizes["rows"] * sizes["columns"])

    # A tie, or a scale one unit apart, rounds a few elements to the neighbour: which is 2^-3 or 2^-2 of them.
    return Operation(
        f"fp8_cast, {str(dtype).removeprefix('torch.')}",
        inputs,
        {"eager": door("fp8", "fp8_cast"), "triton": door("fp8_triton", "fp8_cast_triton")},
        traffic,
        ({"rows": 4096, "columns": 4096}, {"rows": 77, "columns": 333}),
        ({"rows": 16384, "columns": 4096},),
        ({"rows": 5, "columns": 19},),
        reference=reference,
        settled=settled,
        tolerances={torch.float32: 1e-2},
    )


FP8 = (
    Operation(
        "fp8_linear",
        _linear_inputs,
        {
            "eager": door("fp8", "fp8_linear"),
            "bf16": _bf16,
            "triton": door("fp8_triton", "fp8_linear_triton"),
        },
        _linear_traffic,
        ({"rows": 2048, "in": 4096, "out": 1024}, {"rows": 77, "in": 144, "out": 48}),
        ({"rows": 16384, "in": 4096, "out": 14336}, {"rows": 16384, "in": 2048, "out": 2048}),
        ({"rows": 5, "in": 32, "out": 16},),
        reference=_linear_reference,
        dtypes=(torch.bfloat16,),
    ),
    _cast(E4M3),
    _cast(E5M2),
)
