"""What a pipeline holds does not grow with the microbatches of a step, and nothing is written over too early."""

from __future__ import annotations

import pytest
from parallel.pattern_stages import Found, Ring, Step, another_torch, run_pattern, torchs_own_stages
from ranks import run_ranks

from megatron.config.partition import stage_count, stage_numbers
from megatron.config.schema import ParallelSection
from megatron.planner.in_flight import in_transit, microbatches_in_flight

SCHEDULES = ["1f1b", "interleaved", "zero-bubble", "zbv"]
STEPS = (Step(16, 1, 6, 2), Step(16, 1, 6), Step(8, 2, 10, 1), Step(32, 1, 6, 1))
"""Shapes, numbers of microbatches and validation passes that change from step to step."""


def section_of(schedule: str, pipeline: int = 4) -> ParallelSection:
    return ParallelSection.model_validate({"pipeline": pipeline, "schedule": schedule})


def most_alive(section: ParallelSection, rank: int, microbatches: int) -> int:
    """Inputs and outputs of all microbatches in flight, what is on its way, and the gradients that passes of weights
    begin with."""
    numbers, last = stage_numbers(section, rank), stage_count(section) - 1
    most = 0
    for moment in microbatches_in_flight(section.schedule, section.pipeline, len(numbers), rank, microbatches):
        parts = zip(numbers, moment.held, moment.pending, strict=True)
        most = max(most, sum(held * ((n > 0) + (n < last)) + pending * (n < last) for n, held, pending in parts))
    return most + in_transit(section.schedule, section.pipeline, len(numbers), rank, microbatches)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_only_what_is_in_flight_is_held(schedule: str) -> None:
    section = section_of(schedule)
    by_rank: list[Found] = run_ranks(4, run_pattern, section, STEPS)
    for rank, found in enumerate(by_rank):
        assert found.kind == "InFlightStage" and not found.wrong
        for step, alive in zip(STEPS, found.alive, strict=True):
            assert alive <= most_alive(section, rank, step.microbatches), (rank, step, found)
        assert most_alive(section, rank, 16) == most_alive(section, rank, 256), "the bound knows no microbatches"


def test_torchs_own_stages_hold_all() -> None:
    """The measure would see it."""
    section = section_of("zero-bubble", 2)
    ours = run_ranks(2, run_pattern, section, (Step(4, 1, 6), Step(32, 1, 6)))
    torchs = run_ranks(2, run_pattern, section, (Step(4, 1, 6), Step(32, 1, 6)), torchs_own_stages)
    for mine, theirs in zip(ours, torchs, strict=True):
        assert not mine.wrong and not theirs.wrong
        assert theirs.alive[1] >= theirs.alive[0] + 28 and theirs.alive[1] >= 32
        assert mine.alive[1] <= mine.alive[0] + 1


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero-bubble"])
def test_one_buffer_too_few_is_caught(schedule: str) -> None:
    """The pattern sees a buffer that is written over too early: by turns through as many as are in flight."""
    section, rank = section_of(schedule), 2
    held = max(max(m.held) for m in microbatches_in_flight(schedule, 4, len(stage_numbers(section, rank)), rank, 16))
    ahead = in_transit(schedule, 4, len(stage_numbers(section, rank)), rank, 16)
    enough = run_ranks(
        4, run_pattern, section, (Step(16, 1, 6),), Ring(rank, held + (ahead if schedule != "1f1b" else 0))
    )
    assert not any(found.wrong for found in enough)
    few = run_ranks(4, run_pattern, section, (Step(16, 1, 6),), Ring(rank, held - 1))
    assert any("what is kept" in words or "weight's gradient" in words for words in few[rank].wrong), few[rank]


def test_another_torch_is_left_to_itself_loudly() -> None:
    for found in run_ranks(2, run_pattern, section_of("interleaved", 2), (Step(4, 1, 6, 1),), another_torch):
        assert found.kind == "PipelineStage" and not found.wrong
        assert any("PipelineStage.get_ops_by_another_name" in words for words in found.warnings)
