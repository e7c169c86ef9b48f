"""Stages that speak of other stages: reverse, like, aggregate_of, blend, phases that ramp."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from megatron.config.errors import ConfigError
from megatron.config.schema import StageSection
from megatron.data.schedule import Schedule, TrainingStage, resolve_schedule
from megatron.data.stage_resolution import SourceFacts

FACTS = {name: SourceFacts(group, 10**9, Decimal(1), "error") for name, group in [("c", "code"), ("t", "text")]}
D = Decimal
# Paper A's tuning arms: text : code in four equal phases, all with the same aggregate.
INCREASE = [(7, 3), (7, 3), (6, 4), (5, 5)]


def phases(pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
    return [{"mixture": {"t": D(t) / 10, "c": D(c) / 10}} for t, c in pairs]


def resolve(*stages: dict[str, Any], templates: tuple[dict[str, Any], ...] = ()) -> Schedule:
    sections = [StageSection.model_validate({"name": f"s{i}", "steps": 40} | s) for i, s in enumerate(stages)]
    others = [StageSection.model_validate({"steps": 40} | template) for template in templates]
    return resolve_schedule(sections, FACTS, seq_length=10, global_batch_size=10, templates=others)


def weights_over(stage: TrainingStage) -> list[Fraction]:
    return [stage.weights.weight("c", sample) for sample in range(stage.samples)]


def test_a_stepwise_mixture_in_reversed_time() -> None:
    schedule = resolve({"phases": phases(INCREASE)}, {"reverse": "s0"}, {"phases": phases(INCREASE[::-1])})
    forward, backward, written = schedule.stages
    assert weights_over(backward) == weights_over(forward)[::-1]
    assert backward.weights == written.weights and backward.counts == forward.counts


def test_a_ramp_in_reversed_time_has_the_same_totals() -> None:
    schedule = resolve({"mixture": {"t": 1}, "ramp_to": {"c": 1}}, {"reverse": "s0"})
    forward, backward = schedule.stages
    for sample in range(401):
        passed = forward.weights.target("c", 400) - forward.weights.target("c", 400 - sample)
        assert backward.weights.target("c", sample) == passed


def test_the_control_has_one_constant_mixture_and_exactly_the_same_totals() -> None:
    """Paper A: uniform 5:3 is the control of stepwise increase, to the sample."""
    template = {"name": "increase", "phases": phases(INCREASE)}
    (control,) = resolve({"aggregate_of": ["increase"]}, templates=(template,)).stages
    (increase,) = resolve({"phases": phases(INCREASE)}).stages
    assert control.counts == increase.counts == {"c": 150, "t": 250}
    assert control.weights.is_constant and control.weights.weight("c", 0) == Fraction(3, 8)


def test_the_control_of_several_stages_has_their_length_where_it_says_none() -> None:
    one = {"name": "one", "steps": 30, "mixture": {"c": D("0.1"), "t": D("0.9")}}
    two = {"name": "two", "steps": 10, "mixture": {"c": D("0.7"), "t": D("0.3")}}
    (control,) = resolve({"steps": None, "aggregate_of": ["one", "two"]}, templates=(one, two)).stages
    assert control.samples == 400 and control.counts == {"c": 30 + 70, "t": 270 + 30}


def test_the_control_of_stages_with_other_sequence_lengths_has_their_tokens() -> None:
    short = {"name": "short", "steps": 10, "mixture": {"c": 1}}
    long = {"name": "long", "steps": 10, "seq_length": 30, "mixture": {"t": 1}}
    (control,) = resolve({"steps": None, "aggregate_of": ["short", "long"]}, templates=(short, long)).stages
    assert control.source_tokens == {"c": 1000, "t": 3000}


def test_a_blend_of_a_stage_and_something_new() -> None:
    """Nemotron Nano 2: 0.8 of the blend of phase 3, and 0.2 of new data."""
    blend = [{"weight": D("0.8"), "like": "s0"}, {"weight": D("0.2"), "mixture": {"c": 1}}]
    schedule = resolve({"mixture": {"c": D("0.25"), "t": D("0.75")}}, {"blend": blend})
    assert schedule.stages[1].weights.weight("c", 0) == Fraction(8, 10) * Fraction(1, 4) + Fraction(2, 10)


def test_a_blend_of_a_ramp_and_steps_is_their_mean_at_every_sample() -> None:
    templates = (
        {"name": "ramp", "mixture": {"t": 1}, "ramp_to": {"c": 1}},
        {"name": "steps", "phases": phases(INCREASE)},
    )
    blend = [{"weight": 1, "like": "ramp"}, {"weight": 3, "like": "steps"}]
    (stage,) = resolve({"blend": blend}, templates=templates).stages
    ramp, steps = (resolve({k: v for k, v in t.items() if k != "name"}).stages[0] for t in templates)
    for sample in range(400):
        mean = (ramp.weights.weight("c", sample) + 3 * steps.weights.weight("c", sample)) / 4
        assert abs(stage.weights.weight("c", sample) - mean) < Fraction(1, 10**5)


def test_phases_may_ramp_and_like_repeats_them() -> None:
    words = [{"share": D("0.5"), "mixture": {"t": 1}, "ramp_to": {"c": 1}}, {"share": D("0.5"), "mixture": {"c": 1}}]
    first, again = resolve({"phases": words}, {"like": "s0"}).stages
    assert first.weights == again.weights
    assert first.weights.weight("c", 100) == Fraction(1, 2) and first.weights.weight("c", 300) == 1


def test_adjust_may_start_from_a_stage_by_name() -> None:
    stages = [
        {"mixture": {"c": D("0.2"), "t": D("0.8")}},
        {"mixture": {"t": 1}},
        {"like": "s0", "adjust": {"c": D("0.6")}},
    ]
    assert resolve(*stages).stages[2].weights.weight("t", 0) == Fraction(4, 10)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"reverse": "s1"}, "neither an earlier stage nor a template"),
        ({"like": "balenced"}, "did you mean 'balanced'"),
        ({"aggregate_of": []}, "aggregate_of is empty"),
        ({"blend": []}, "blend is empty"),
        ({"blend": [{"weight": 1}]}, r"blend\[0\]: give either like or mixture"),
        ({"blend": [{"weight": D("0.5"), "like": "balanced"}], "strict": True}, "weights of blend sum to 0.5"),
        ({"like": "balanced", "mixture": {"c": 1}}, "says mixture and like"),
        ({"reverse": "balanced", "ramp_to": {"c": 1}}, "ramp_to goes with mixture"),
    ],
)
def test_B1_every_way_to_say_it_wrong_is_named(stage: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(stage, templates=({"name": "balanced", "mixture": {"c": 1, "t": 1}},))
