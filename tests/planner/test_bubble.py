"""The formulas of the bubble, against torch's own orders of actions played on paper."""

from __future__ import annotations

from fractions import Fraction

import pytest
from torch_schedules import actions_of, makespan

from megatron.config.layout_sizes import MICROBATCHES
from megatron.planner.bubble import bubble_fraction


@pytest.mark.parametrize(
    ("schedule", "virtual"), [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero-bubble", 1), ("zbv", 2)]
)
@pytest.mark.parametrize("pipeline", [2, 3, 4, 6, 8])
def test_formula_is_the_idle_time_of_torchs_order(schedule: str, virtual: int, pipeline: int) -> None:
    counts = [n for n in range(pipeline, 3 * pipeline + 1) if MICROBATCHES[schedule](n, pipeline)]
    assert counts
    for count in counts:
        whole = makespan(actions_of(schedule, pipeline, virtual, count), pipeline * virtual, 1, 1, 1)
        work = 3 * virtual * count
        assert bubble_fraction(schedule, pipeline, virtual, count) == Fraction(int(whole) - work, int(whole)), count


def test_figures_of_the_papers() -> None:
    assert bubble_fraction("1f1b", 4, 2, 8) == Fraction(3, 11)
    assert bubble_fraction("interleaved", 4, 2, 8) == Fraction(3, 19)
    assert bubble_fraction("zero-bubble", 4, 2, 8) == Fraction(3, 27)
    assert bubble_fraction("zbv", 4, 2, 8) == Fraction(3, 51)
    assert bubble_fraction("1f1b", 1, 2, 8) == 0
