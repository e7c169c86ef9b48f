"""Operations over the vocabulary, as `gpu.py` checks and times them: cross-entropy of logits and behind the head."""

from __future__ import annotations

from typing import Any

import torch
from gpu_operations import TOLERANCES, Call, Inputs, Maker, Operation, Sizes, Traffic, Way, compiled, door, imported
from torch import Tensor
from torch.nn import functional

from megatron.kernels.vocabulary_softmax import own_statistics
from megatron.kernels.vocabulary_words import Words

LLAMA_3_WORDS = 128256
_TERMS = {"z_loss": 1e-4, "label_smoothing": 0.1}


def _targets(sizes: Sizes, make: Maker) -> Tensor:
    targets = make.integers(sizes["words"], sizes["rows"])
    return targets.masked_fill(make.integers(16, sizes["rows"]) == 0, -100)


def _logit_inputs(sizes: Sizes, make: Maker) -> Inputs:
    return {"logits": make.normal(sizes["rows"], sizes["words"], scale=3.0), "targets": _targets(sizes, make)}


def _in_place_inputs(sizes: Sizes, make: Maker) -> Inputs:
    return _logit_inputs(sizes, make) | {"vocab_size": sizes["words"], "scale": 1.0 / sizes["rows"]}


def _linear_inputs(sizes: Sizes, make: Maker) -> Inputs:
    hidden = make.normal(sizes["rows"], sizes["width"])
    weight = make.normal(sizes["words"], sizes["width"], scale=2.0 * sizes["width"] ** -0.5)
    made: Inputs = {"hidden": hidden, "weight": weight, "targets": _targets(sizes, make)}
    return made | {"vocab_size": sizes["words"], "scale": 1.0 / sizes["rows"]}


def _plain_total(logits: Tensor, targets: Tensor, _vocab_size: int, scale: float) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum") * scale


def _plain_linear(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, scale: float) -> Tensor:
    return _plain_total(hidden @ weight.t(), targets, vocab_size, scale)


def _plain_rows(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="none")


def _traffic(forward: int, backward: int) -> Any:
    def traffic(sizes: Sizes, item: int) -> Traffic:
        each = sizes["rows"] * sizes["words"] * item
        return Traffic(forward * each, backward * each)

    return traffic


def _linear_traffic(sizes: Sizes, item: int) -> Traffic:
    """Three products, the gradients' two among the forward pass; logits never leave the chip in the ideal."""
    rows, words, width = sizes["rows"], sizes["words"], sizes["width"]
    return Traffic((2 * rows + 2 * words) * width * item, 0.0, 6.0 * rows * words * width)


_CHECKED = (
    {"rows": 2048, "words": LLAMA_3_WORDS},
    {"rows": 33, "words": 50257},
    {"rows": 5, "words": 131},
)
_TIMED = ({"rows": 8192, "words": LLAMA_3_WORDS}, {"rows": 16384, "words": 32000})
_DRY = ({"rows": 4, "words": 67}, {"rows": 1, "words": 67})


def _part_inputs(sizes: Sizes, make: Maker) -> Inputs:
    """What the second of two tensor ranks holds: half of the words, the last of them padding."""
    held = sizes["words"]
    words = Words(first=held, held=held, valid=held - 3, vocabulary=2 * held - 3, size=2)
    logits = make.normal(sizes["rows"], held, scale=3.0, grad=False)
    return {"logits": logits, "targets": make.integers(2 * held - 3, sizes["rows"]), "words": words}


def _slopes_inputs(sizes: Sizes, make: Maker) -> Inputs:
    """As if the other rank's words had the same statistics."""
    logits, targets, words = _part_inputs(sizes, make).values()
    found = own_statistics(logits, targets, words) * torch.tensor([1.0, 2.0, 1.0], device=logits.device)
    return {"logits": logits, "found": found, "targets": targets, "words": words, "scale": 1.0 / sizes["rows"]}


def _slopes(module: str, name: str) -> Way:
    """In place: logits become their slopes."""

    def way(inputs: Inputs) -> Call:
        function = imported(module, name)

        def call() -> Tensor:
            function(*inputs.values())
            return inputs["logits"]  # type: ignore[no-any-return]

        return call

    return way


WORDS = (
    Operation(
        "cross_entropy_in_place",
        _in_place_inputs,
        {
            "eager": door("cross_entropy", "cross_entropy_in_place"),
            "compile": compiled(_plain_total),
            "triton": door("cross_entropy", "cross_entropy_in_place", kernels="triton"),
        },
        _traffic(2, 0),
        _CHECKED,
        _TIMED,
        _DRY,
    ),
    Operation(
        "cross_entropy",
        _logit_inputs,
        {
            "eager": door("cross_entropy", "cross_entropy"),
            "compile": compiled(_plain_rows),
            "triton": door("cross_entropy_triton", "cross_entropy_triton"),
        },
        _traffic(1, 2),
        _CHECKED,
        _TIMED[:1],
        _DRY,
    ),
    Operation(
        "cross_entropy_in_place, z-loss and smoothed labels",
        _in_place_inputs,
        {
            "eager": door("cross_entropy", "cross_entropy_in_place", **_TERMS),
            "triton": door("cross_entropy", "cross_entropy_in_place", kernels="triton", **_TERMS),
        },
        _traffic(2, 0),
        _CHECKED,
        (),
        _DRY[:1],
    ),
    Operation(
        "statistics of a rank's words",
        _part_inputs,
        {
            "eager": door("vocabulary_softmax", "own_statistics"),
            "triton": door("vocabulary_softmax_triton", "own_statistics_triton"),
        },
        _traffic(1, 0),
        ({"rows": 2048, "words": 65536}, {"rows": 7, "words": 12501}),
        ({"rows": 8192, "words": 65536},),
        _DRY[:1],
    ),
    Operation(
        "slopes of a rank's words",
        _slopes_inputs,
        {
            "eager": _slopes("vocabulary_softmax", "slopes"),
            "triton": _slopes("vocabulary_softmax_triton", "slopes_triton"),
        },
        _traffic(2, 0),
        ({"rows": 2048, "words": 65536}, {"rows": 7, "words": 12501}),
        ({"rows": 8192, "words": 65536},),
        _DRY[:1],
    ),
    Operation(
        "linear_cross_entropy",
        _linear_inputs,
        {
            "eager": door("cross_entropy", "linear_cross_entropy"),
            "compile": compiled(_plain_linear),
            "triton": door("cross_entropy", "linear_cross_entropy", kernels="triton"),
        },
        _linear_traffic,
        ({"rows": 2048, "words": 32000, "width": 2048}, {"rows": 100, "words": 1003, "width": 96}),
        (
            {"rows": 8192, "words": LLAMA_3_WORDS, "width": 2048},
            {"rows": 8192, "words": LLAMA_3_WORDS, "width": 4096},
        ),
        ({"rows": 4, "words": 67, "width": 16},),
        dtypes=(torch.bfloat16,),
        tolerances=TOLERANCES | {torch.float32: 5e-3},  # logits are rounded to bfloat16 before they are looked at
    ),
)
