"""How a training stage's words become whole batches and exact weights, and every way to say it wrong."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from megatron.config.errors import ConfigError
from megatron.config.schema import StageSection
from megatron.data.mixture import open_mixture
from megatron.data.schedule import Schedule, resolve_schedule
from megatron.data.stage_resolution import SourceFacts

FACTS = {
    "python": SourceFacts("code", 3_000_000, Decimal(4), "error"),
    "rust": SourceFacts("code", 1_000_000, Decimal(4), "error"),
    "web": SourceFacts("text", 12_000_000, Decimal(4), "error"),
}


def resolve(*stages: dict[str, Any], **over: Any) -> Schedule:
    tables = [{"name": f"s{i}"} | stage for i, stage in enumerate(stages)]
    sections = [StageSection.model_validate(table) for table in tables]
    return resolve_schedule(sections, FACTS, **({"seq_length": 100, "global_batch_size": 10} | over))


def shares(schedule: Schedule, stage: int = 0) -> dict[str, Fraction]:
    weights = schedule.stages[stage].weights
    return {name: weights.weight(name, 0) for name in weights.sources}


def test_groups_are_flattened_by_size() -> None:
    schedule = resolve({"steps": 5, "mixture": {"code": Decimal("0.4"), "text": Decimal("0.6")}})
    assert shares(schedule) == {"python": Fraction(3, 10), "rust": Fraction(1, 10), "web": Fraction(3, 5)}


def test_shares_within_a_group_may_be_said() -> None:
    mixture = {
        "mixture": {"code": Decimal("0.4"), "text": Decimal("0.6")},
        "within": {"code": {"python": 1, "rust": 3}},
    }
    schedule = resolve({"steps": 5} | mixture)
    assert shares(schedule) == {"python": Fraction(1, 10), "rust": Fraction(3, 10), "web": Fraction(3, 5)}


def test_one_share_is_set_and_the_others_stay_in_proportion() -> None:
    before = {"steps": 5, "mixture": {"python": Decimal("0.2"), "rust": Decimal("0.2"), "web": Decimal("0.6")}}
    stages = [before]
    stages.append({"steps": 5, "adjust": {"python": Decimal("0.5")}})
    stages.append({"steps": 5, "adjust": {"rust": 0}})
    stages.append({"steps": 5, "adjust": {"code": Decimal("0.2")}})
    schedule = resolve(*stages)
    assert shares(schedule, 1) == {"python": Fraction(1, 2), "rust": Fraction(1, 8), "web": Fraction(3, 8)}
    assert shares(schedule, 2) == {"python": Fraction(571429, 10**6), "web": Fraction(428571, 10**6)}
    assert shares(schedule, 3) == {"python": Fraction(1, 5), "web": Fraction(4, 5)}
    assert shares(resolve({"steps": 5, "adjust": {"web": Decimal("0.5")}}))["python"] == Fraction(3, 8)


def test_weights_are_normalised_and_said_so() -> None:
    schedule = resolve({"steps": 5, "mixture": {"python": Decimal("1.00565"), "web": 1}})
    assert any("sum to 2.00565: normalised" in note for note in schedule.stages[0].notes)
    assert sum(shares(schedule).values()) == 1


def test_absolute_tokens_are_met_to_the_sample() -> None:
    schedule = resolve({"mixture_tokens": {"web": "1.8M", "code": "200K"}})
    stage = schedule.stages[0]
    assert stage.samples == 20_000
    assert stage.counts == {"python": 1500, "rust": 500, "web": 18_000}


def test_amounts_beside_a_length_of_the_stage_are_shares_and_that_is_said() -> None:
    amounts = {"web": "1.8M", "code": "200K"}
    (note,) = [
        note for note in resolve({"tokens": "1M", "mixture_tokens": amounts}).stages[0].notes if "come to" in note
    ]
    assert "mixture_tokens come to 2,000,000, and the stage is 1,000,000 by a length of its own" in note
    assert not any("come to" in note for note in resolve({"tokens": "2M", "mixture_tokens": amounts}).stages[0].notes)


def test_epochs_of_each_source() -> None:
    schedule = resolve({"mixture_epochs": {"python": 2, "web": Decimal("0.5")}})
    assert schedule.stages[0].counts == {"python": 60_000, "web": 60_000}


def test_as_long_as_it_takes_to_see_a_source_twice() -> None:
    schedule = resolve({"epochs": {"source": "rust", "count": 2}, "mixture": {"rust": 1, "web": 3}})
    assert schedule.stages[0].counts == {"rust": 20_000, "web": 60_000}


def test_M1_a_long_stage_counted_in_epochs_meets_them_to_the_sample() -> None:
    facts = {name: SourceFacts(name, 3 * 10**12, Decimal(4), "error") for name in "abc"}
    length = {"epochs": {"source": "b", "count": 1}, "mixture": {"a": 1, "b": 1, "c": 1}}
    section = StageSection.model_validate({"name": "s0"} | length)
    stage = resolve_schedule([section], facts, seq_length=1000, global_batch_size=10).stages[0]
    assert stage.counts == {"a": 3 * 10**9, "b": 3 * 10**9, "c": 3 * 10**9}


def test_lengths_round_to_the_nearest_whole_batch_and_at_least_one() -> None:
    mixture = {"mixture": {"web": 1}}
    lengths = [1, 1499, 1500, 2500]
    schedule = resolve(*[{"tokens": length} | mixture for length in lengths])
    assert [stage.steps for stage in schedule.stages] == [1, 1, 2, 3]
    assert "1 tokens asked, 1,000 given: 1 whole batches" in schedule.stages[0].notes


def test_a_share_of_the_run() -> None:
    schedule = resolve({"share": Decimal("0.25"), "mixture": {"web": 1}}, run_tokens=4_000_000)
    assert schedule.tokens == 1_000_000


def test_phases_of_equal_parts_and_ramps_have_the_aggregate_they_say() -> None:
    phases = [{"mixture": {"web": w, "python": 10 - w}} for w in (7, 7, 6, 5)]
    increase, ramp = resolve(
        {"steps": 80, "phases": phases}, {"steps": 80, "mixture": {"web": 1}, "ramp_to": {"python": 1}}
    ).stages
    assert increase.counts == {"python": 300, "web": 500}
    assert ramp.counts == {"python": 400, "web": 400}
    assert ramp.weights.weight("python", 400) == Fraction(1, 2)


def test_locate_finds_the_stage_of_every_sample() -> None:
    schedule = resolve({"steps": 2, "mixture": {"web": 1}}, {"steps": 3, "mixture": {"rust": 1}})
    assert [(s.name, o) for s, o in map(schedule.locate, (0, 19, 20, 49, 50))] == [
        ("s0", 0),
        ("s0", 19),
        ("s1", 0),
        ("s1", 29),
        ("s1", 30),
    ]


def test_B1_a_name_of_a_source_and_of_a_group_of_others_is_refused() -> None:
    facts = FACTS | {"code": SourceFacts("code", 500_000, Decimal(4), "error")}
    section = StageSection.model_validate({"name": "s0", "steps": 1, "mixture": {"code": 1}})
    with pytest.raises(ConfigError, match="'code', which is a source and also the group of code, python, rust"):
        resolve_schedule([section], facts, seq_length=100, global_batch_size=10)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"steps": 1, "mixture": {"pyton": 1}}, "did you mean 'python'"),
        ({"steps": 1, "mixture": {"code": 1, "python": 1}}, "named twice"),
        ({"steps": 1, "mixture": {"code": 0, "text": 0}}, "every weight of the mixture is zero"),
        ({"steps": 0, "mixture": {"web": 1}}, "length is 0"),
        ({"tokens": 0, "mixture": {"web": 1}}, "length is 0"),
        ({"mixture": {"web": 1}}, "says nothing of its length"),
        ({"steps": 1, "tokens": 1, "mixture": {"web": 1}}, "tokens and steps"),
        ({"steps": 1}, "says none of them"),
        ({"steps": 1, "mixture": {"web": 1}, "phases": [{"mixture": {"web": 1}}]}, "mixture and phases"),
        ({"steps": 1, "mixture": {"web": Decimal("0.9")}, "strict": True}, "sum to 0.9"),
        ({"share": Decimal("0.5"), "mixture": {"web": 1}}, "set train.tokens"),
        ({"epochs": {"source": "rust", "count": 1}, "mixture": {"web": 1}}, "weight in the stage is zero"),
        ({"steps": 1, "phases": [{"share": Decimal("0.5"), "mixture": {"web": 1}}]}, "sum to 0.5"),
        ({"steps": 1, "mixture_tokens": {"web": 1}, "ramp_to": {"web": 1}}, "ramp_to goes with mixture"),
        ({"tokens": "90M", "mixture": {"web": 1}}, "runs dry"),
        ({"steps": 1, "adjust": {"web": 2}}, "above 1"),
        ({"steps": 1, "adjust": {"web": Decimal("0.5"), "code": Decimal("0.1")}}, "take the rest"),
        ({"steps": 1, "mixture": {"code": 1}, "within": {"code": {"web": 1}}}, "within.code names 'web'"),
        ({"steps": 1, "mixture": {"code": 1}, "within": {"code": {"rust": 0}}}, "every source the weight 0"),
    ],
)
def test_B1_a_stage_said_wrong_is_refused_in_the_users_words(stage: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        resolve(stage)
    assert "s0" in str(caught.value) and caught.value.exit_code == 2


def test_more_sources_than_sixteen_bits_can_number() -> None:
    """70,000 sources in seven groups: the blend of each prefix stays within one sample of every target (M1)."""
    facts = {f"s{n:06}": SourceFacts(f"g{n % 7}", 10**9, Decimal(1), "error") for n in range(70_000)}
    table = {"name": "wide", "samples": 100_000, "mixture": {f"g{n}": n + 1 for n in range(7)}}
    (stage,) = resolve_schedule([StageSection.model_validate(table)], facts, seq_length=8, global_batch_size=100).stages
    assert len(stage.weights.sources) == 70_000
    order = open_mixture(stage.weights, stage.groups(), horizon=stage.samples).take(stage.samples)
    weights = np.array([stage.weights.segments[0].weights[name] for name in stage.weights.sources])
    for samples in (1, 65_537, 100_000):
        counts = np.bincount(order[:samples], minlength=70_000)
        assert np.abs(counts - weights * samples / stage.weights.denominator).max() < 1
    assert order.max() > 65_535
