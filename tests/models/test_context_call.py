"""Decoders whose ranks share each sequence, alone and beside tensor ranks, against one process, in float64."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from models.tensor_cases import Case, Outcome, assembled, rounding, run_case, run_cases
from ranks import run_ranks

from megatron.config.layout import Layout

SHAPES = ("two key heads, tied", "one key head, untied", "four key heads, biases, untied", "neox", "dropout")
SHAPES += ("qwen2", "qwen3", "olmo2", "olmo2, one key head", "gpt2", "scaled rope", "both norms, offset, multipliers")
SHAPES += ("every other layer with a window", "all layers with a window")
CASES = [
    Case(shape, rows, False, split, backend)
    for shape in SHAPES
    for rows, split, backend in ((3, False, "blockwise"), (1, True, "sdpa"))
]
BESIDE_TENSOR = [Case(case.shape, case.rows, True, case.split_backward, case.backend) for case in CASES]
LAYOUTS = {
    "context 2": (Layout(context=2), CASES),
    "context 4": (Layout(context=4), CASES),
    "context 2 x tensor 2": (Layout(context=2, tensor=2), CASES + BESIDE_TENSOR),
}


@functools.cache
def on_ranks(name: str) -> list[list[Outcome]]:
    layout, cases = LAYOUTS[name]
    return run_ranks(layout.world_size, run_cases, cases, layout)


@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name, (_, cases) in LAYOUTS.items() for number in range(len(cases))]
)
def test_sums_over_context_ranks_equal_one_process(name: str, number: int) -> None:
    layout, cases = LAYOUTS[name]
    whole = run_case(cases[number])
    outcomes = [rank[number] for rank in on_ranks(name)]
    by_context = [outcomes[start : start + layout.tensor] for start in range(0, len(outcomes), layout.tensor)]
    assert np.isclose(sum(group[0].total for group in by_context), whole.total, rtol=1e-12)
    np.testing.assert_allclose(sum(group[0].rows for group in by_context), whole.rows, rtol=1e-12)
    for name, gradient in whole.gradients.items():
        found = np.sum([assembled(group, name) for group in by_context], 0)
        np.testing.assert_allclose(found, gradient, atol=rounding(gradient, whole), rtol=1e-10, err_msg=name)
