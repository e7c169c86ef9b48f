"""Operations of a decoder's layers, as `gpu.py` checks and times them: norms, rotary positions, activations."""

from __future__ import annotations

from typing import Any

from gpu_operations import Call, Inputs, Maker, Operation, Sizes, Traffic, Way, door, imported
from torch import Tensor

from megatron.kernels.rope import rope_table

EPS = 1e-5
_ROWS_CHECKED = (
    {"rows": 4096, "size": 4096}, {"rows": 1023, "size": 2049}, {"rows": 7, "size": 20481}, {"rows": 1, "size": 1},
)  # fmt: skip
_ROWS_TIMED = ({"rows": 16384, "size": 4096}, {"rows": 16384, "size": 2048})
_ROWS_DRY = ({"rows": 5, "size": 65},)


def _norm_inputs(added: bool, biased: bool) -> Any:
    def inputs(sizes: Sizes, make: Maker) -> Inputs:
        rows, size = sizes["rows"], sizes["size"]
        made: Inputs = {"x": make.normal(rows, size)}
        if added:
            made["branch"] = make.normal(rows, size)
        made["weight"] = make.normal(size, scale=0.1, shift=1.0)
        if biased:
            made["bias"] = make.normal(size, scale=0.1)
        return made | {"eps": EPS}

    return inputs


def _norm(name: str, module: str, added: bool, biased: bool) -> Operation:
    # Forward: x (and branch) read, the norm (and the sum) written. Backward: what was normed, the norm's gradient (and
    # the sum's) read, one gradient written.
    passes = (4, 4) if added else (2, 3)

    def traffic(sizes: Sizes, item: int) -> Traffic:
        each = sizes["rows"] * sizes["size"] * item
        return Traffic(passes[0] * each, passes[1] * each)

    ways = {
        "eager": door(module, name),
        "compile": door("compiled", name),
        "triton": door(f"{module}_triton", f"{name}_triton"),
    }
    return Operation(name, _norm_inputs(added, biased), ways, traffic, _ROWS_CHECKED, _ROWS_TIMED, _ROWS_DRY)


def _heads_of(make: Maker, sizes: Sizes, heads: int) -> Tensor:
    """As the model's attention cuts it from a projection: a view [batch, groups, T, heads, d] of [batch, T, ...]."""
    batch, length, groups, size = (sizes[key] for key in ("batch", "T", "groups", "d"))
    return make.normal(batch, length, groups, heads, size, grad=False).transpose(1, 2).requires_grad_()


def _table(sizes: Sizes, make: Maker) -> Any:
    positions = make.integers(8192, 1, sizes["T"]).sort(dim=1).values
    return rope_table(positions, sizes["turned"], 500000.0, make.dtype)


def _rope_inputs(sizes: Sizes, make: Maker) -> Inputs:
    query, key = _heads_of(make, sizes, sizes["heads"]), _heads_of(make, sizes, 1)
    return {"query": query, "key": key, "table": _table(sizes, make)}


def _fused_inputs(sizes: Sizes, make: Maker) -> Inputs:
    heads = sizes["groups"] * sizes["heads"]
    qkv = make.normal(sizes["batch"], sizes["T"], (heads + 2 * sizes["groups"]) * sizes["d"])
    return {
        "qkv": qkv,
        "table": _table(sizes, make),
        "query_heads": heads,
        "key_heads": sizes["groups"],
        "d": sizes["d"],
    }


def _in_place(module: str, name: str) -> Way:
    """A leaf cannot be written over: with gradients the call gets a copy, whose copying is then timed too. The first
    pass is timed without gradients, on the inputs themselves."""

    def way(inputs: Inputs) -> Call:
        function = imported(module, name)
        qkv, *others = inputs.values()
        return lambda: function(qkv.clone(), *others)

    return way


def _rope_traffic(sizes: Sizes, item: int) -> Traffic:
    heads = sizes["groups"] * (sizes["heads"] + 1)
    each = 2 * sizes["batch"] * sizes["T"] * heads * sizes["d"] * item
    return Traffic(each, each)


def _fused_traffic(sizes: Sizes, item: int) -> Traffic:
    """In place, with the copy of qkv before and of the gradient after that the call here makes."""
    turned = _rope_traffic(sizes, item).forward
    values = 2 * sizes["batch"] * sizes["T"] * sizes["groups"] * sizes["d"] * item
    whole = turned + values
    return Traffic(turned + whole, whole)


_HEADS = {"batch": 2, "T": 8192, "groups": 8, "heads": 4, "d": 128, "turned": 128}
_HEADS_1B = {"batch": 8, "T": 2048, "groups": 8, "heads": 4, "d": 64, "turned": 64}
_HEADS_ODD = {"batch": 3, "T": 77, "groups": 3, "heads": 5, "d": 72, "turned": 18}
_HEADS_DRY = {"batch": 1, "T": 5, "groups": 2, "heads": 2, "d": 12, "turned": 8}


def _rope(name: str, inputs: Any, ways: dict[str, Way], traffic: Any) -> Operation:
    checked = (_HEADS_1B, {**_HEADS, "T": 1000}, _HEADS_ODD)
    return Operation(name, inputs, ways, traffic, checked, (_HEADS, _HEADS_1B), (_HEADS_DRY,))


def _activation(name: str, tensors: int, halved: bool, formula: str) -> Operation:
    """Gated: two tensors, or two halves of one; plain: one."""

    def inputs(sizes: Sizes, make: Maker) -> Inputs:
        width = sizes["inner"] * (2 if halved else 1)
        made = {f"x{n}": make.normal(sizes["rows"], width, scale=2.0) for n in range(1 if halved else tensors)}
        return made | {"name": formula}

    def traffic(sizes: Sizes, item: int) -> Traffic:
        each = sizes["rows"] * sizes["inner"] * item
        return Traffic((tensors + 1) * each, (2 * tensors + 1) * each)

    ways = {
        "eager": door("swiglu", name),
        "compile": door("compiled", name),
        "triton": door("swiglu_triton", f"{name}_triton"),
    }
    checked = ({"rows": 4096, "inner": 8192}, {"rows": 333, "inner": 1111}, {"rows": 1, "inner": 3})
    timed = ({"rows": 16384, "inner": 14336}, {"rows": 16384, "inner": 8192})
    called = f"{name}, {formula}" if formula != "silu" else name
    return Operation(called, inputs, ways, traffic, checked, timed, ({"rows": 3, "inner": 33},))


LAYERS = (
    _norm("add_rms_norm", "rms_norm", added=True, biased=False),
    _norm("rms_norm", "rms_norm", added=False, biased=False),
    _norm("add_layer_norm", "layer_norm", added=True, biased=True),
    _norm("layer_norm", "layer_norm", added=False, biased=True),
    _rope(
        "rope_qk",
        _rope_inputs,
        {
            "eager": door("rope", "rope_qk"),
            "compile": door("compiled", "rope_qk"),
            "triton": door("rope_triton", "rope_qk_triton"),
        },
        _rope_traffic,
    ),
    _rope(
        "rope_fused_",
        _fused_inputs,
        {"eager": _in_place("rope", "rope_fused_"), "triton": _in_place("rope_triton", "rope_fused_triton_")},
        _fused_traffic,
    ),
    _activation("gated_halves", 2, True, "silu"),
    _activation("gated", 2, False, "silu"),
    _activation("activate", 1, False, "gelu_tanh"),
    _activation("gated_halves", 2, True, "gelu"),
)
