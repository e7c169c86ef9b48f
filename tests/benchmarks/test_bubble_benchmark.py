"""The bubble by the clock, against each schedule's formula: shares of a step, no seconds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import pipeline_bubble


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("schedule", pipeline_bubble.SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_measured_bubble_is_that_of_the_formula(ranks: int, schedule: str) -> None:
    rows = pipeline_bubble.measure(ranks, [4, 8], repeat=3, schedules=[schedule])
    assert len(rows) == 2
    for row in rows:
        assert abs(row.off) <= pipeline_bubble.BOUND, row


def test_the_benchmark_gives_a_row_for_every_schedule() -> None:
    rows = pipeline_bubble.measure(2, [2], repeat=1)
    assert [row.schedule for row in rows] == list(pipeline_bubble.SCHEDULES)
    assert all(row.units >= 0.9 * row.work for row in rows), rows
