"""Sources that run dry under `renormalise`: event points against a brute-force integration of the weights."""

from __future__ import annotations

from fractions import Fraction

import pytest

from megatron.config.errors import ConfigError
from megatron.data.dry_sources import solve_events
from megatron.data.mixture import open_mixture
from megatron.data.stage_shapes import ShapeStep, StageShapes
from megatron.data.weight_function import Segment, WeightFunction

ONE = StageShapes.constant(1, 1)  # a sample is a token


def test_the_events_are_where_targets_reach_the_room() -> None:
    function = WeightFunction.constant({"a": 5, "b": 3, "c": 2})
    solved, events = solve_events(function, {"a": 10, "b": 12}, 100, ONE, "stage")
    # a: 10 samples at 1/2 end at sample 20; then b has 6 left of 12 and gets 3/5 of each sample: 10 more
    assert events == [("a", 20), ("b", 30)]
    assert solved.target("a", 100) == 10
    assert abs(solved.target("b", 100) - 12) < Fraction(1, 1000)
    assert solved.weight("c", 30) == 1


def test_an_event_never_lets_a_target_pass_its_room() -> None:
    function = WeightFunction.constant({"a": 333333, "b": 666667})
    for room in range(12):
        solved, _ = solve_events(function, {"a": room}, 200, ONE, "stage")
        assert solved.target("a", 10**6) <= room
        assert room - solved.target("a", 10**6) < 1


def test_a_source_that_is_already_dry_has_no_part() -> None:
    solved, events = solve_events(WeightFunction.constant({"a": 1, "b": 1}), {"a": 0}, 50, ONE, "stage")
    assert solved.sources == ("b",) and events == [("a", 0)]


def test_running_out_of_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match="run dry at sample 8 of 50"):
        solve_events(WeightFunction.constant({"a": 1, "b": 1}), {"a": 4, "b": 4}, 50, ONE, "stage")


def test_running_out_after_the_stage_is_no_matter() -> None:
    function = WeightFunction.constant({"a": 1, "b": 1})
    solved, events = solve_events(function, {"a": 40, "b": 40}, 50, ONE, "stage")
    assert events == [] and solved.target("a", 50) == 25


def test_a_ramp_that_runs_dry_is_refused() -> None:
    ramp = WeightFunction.make([Segment(0, {"a": 3, "b": 1}, 40, {"a": 1, "b": 3})])
    with pytest.raises(ConfigError, match="inside a ramp"):
        solve_events(ramp, {"a": 5}, 40, ONE, "stage")
    assert solve_events(ramp, {"a": 25}, 40, ONE, "stage") == (ramp, [])


def test_events_inside_steps_and_across_them() -> None:
    steps = WeightFunction.make([Segment(0, {"a": 2, "b": 2}), Segment(20, {"a": 3, "b": 1})])
    solved, events = solve_events(steps, {"a": 16}, 100, ONE, "stage")
    assert events == [("a", 28)]
    assert solved.weight("b", 27) == Fraction(1, 4) and solved.weight("b", 28) == 1


def test_where_the_sequence_length_grows_the_tokens_of_the_counts_stay_within_the_room() -> None:
    shapes = StageShapes((ShapeStep(0, 4, 5), ShapeStep(50, 16, 5), ShapeStep(100, 8, 5)))
    function = WeightFunction.constant({"a": 2, "b": 3})
    for room in range(0, 700, 7):
        solved, events = solve_events(function, {"a": room}, 200, shapes, "stage")
        stream = open_mixture(solved, {"a": "a", "b": "b"})
        names = [solved.sources[i] for i in stream.take(200).tolist()]
        used = sum(shapes.at(n).seq_length for n, name in enumerate(names) if name == "a")
        assert used <= room
        if events:
            assert room - used < 2 * (16 + 12 + 8) + 16  # the margin, the error of the counts, the event's rounding
