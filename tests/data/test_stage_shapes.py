"""Sequence length and batch that change within a stage, against a count of every batch one by one."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.errors import ConfigError
from megatron.config.quantities import Quantity, parse_quantity
from megatron.config.schema import StageSection
from megatron.data.stage_shapes import ShapeStep, StageShapes, lay_out


def laid_out(asked: str, **words: Any) -> tuple[StageShapes, int]:
    section = StageSection.model_validate({"name": "s", "tokens": 1, "mixture": {"a": 1}} | words)
    shapes, samples, _ = lay_out(section, 10, 8, parse_quantity(asked), "stage 's'")
    return shapes, samples


def test_parts_are_whole_batches_of_their_own_and_the_last_takes_the_rest() -> None:
    parts = [
        {"length": "800", "global_batch_size": 4},
        {"length": "3 steps", "seq_length": 20},
        {"length": "25%", "global_batch_size": 16},
        {"seq_length": 5},
    ]
    shapes, samples = laid_out("4000", shapes=parts)
    # 800 tokens in batches of 40; 3 batches of 160; 1000 tokens in batches of 160 (6.25: 6); 1760 in batches of 40
    assert shapes.steps == (ShapeStep(0, 10, 4), ShapeStep(80, 20, 8), ShapeStep(104, 10, 16), ShapeStep(200, 5, 8))
    assert samples == 200 + 44 * 8 and shapes.tokens_at(samples) == 4000


def test_a_batch_ramp_is_megatrons() -> None:
    shapes, samples = laid_out("100 steps", batch_ramp={"start": 2, "increment": 3, "over": "240 samples"})
    # two increments, so that two sizes share 240 samples: 60 batches of 2 and 24 of 5, then 16 of 8
    assert shapes.steps == (ShapeStep(0, 10, 2), ShapeStep(120, 10, 5), ShapeStep(240, 10, 8))
    assert samples == 240 + 16 * 8 and shapes.batches_at(samples) == 100


shapes_of = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 6)), min_size=1, max_size=5)


@given(shapes_of, st.integers(0, 300))
def test_positions_equal_a_count_one_by_one(parts: list[tuple[int, int, int]], samples: int) -> None:
    steps, start = [], 0
    for seq_length, batch, batches in parts:
        steps.append(ShapeStep(start, seq_length, batch))
        start += batch * batches
    shapes = StageShapes(tuple(steps))
    lengths = [max((s for s in steps if s.start <= n), key=lambda s: s.start).seq_length for n in range(samples)]
    assert shapes.tokens_at(samples) == sum(lengths)
    place, done = 0, 0
    while (size := shapes.at(place).global_batch_size) + place <= samples:
        place, done = place + size, done + 1
    assert shapes.batches_at(samples) == done and shapes.samples_at_batch(done) == place
    assert StageShapes.from_json(shapes.to_json()) == shapes
    assert shapes.tokens_of(Quantity(Decimal(done), "steps"), samples) == shapes.tokens_at(place)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"shapes": []}, "shapes is empty"),
        ({"shapes": [{"seq_length": 4}, {"seq_length": 8}]}, r"shapes\[0\] has no length"),
        ({"shapes": [{"length": "10"}, {"length": "10"}]}, "the last of its shapes has a length"),
        ({"shapes": [{"length": "5000"}, {}]}, "as long as the stage or longer"),
        ({"shapes": [{"length": "100%"}, {}]}, "is left for the last"),
        ({"shapes": [{"length": "0 steps"}, {}]}, "part 0 has the length 0"),
        ({"batch_ramp": {"start": 4, "increment": 2, "over": "9000"}}, "batch_ramp: the parts before the last"),
        ({"batch_ramp": {"start": 3, "increment": 2, "over": "10%"}}, r"start \+ k \* increment = 8"),
        ({"batch_ramp": {"start": 8, "increment": 2, "over": "10%"}}, "does not lead"),
        ({"shapes": [{}], "batch_ramp": {"start": 4, "increment": 2, "over": "10%"}}, "both shapes and batch_ramp"),
    ],
)
def test_B1_every_way_to_say_it_wrong_is_named(words: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        laid_out("4000", **words)


def test_a_ramp_of_many_sizes_ends_where_it_was_asked_to() -> None:
    """Each size ends as near as its batches allow; rounding each alone would add up to 75 % more here."""
    section = {"global_batch_size": 1024, "batch_ramp": {"start": 16, "increment": 16, "over": "20000 samples"}}
    words = StageSection.model_validate({"name": "s", "tokens": 1, "mixture": {"a": 1}} | section)
    shapes, _, notes = lay_out(words, 10, 1024, Quantity(Decimal(500_000), "samples"), "stage 's'")
    least = sum(range(16, 1024, 16))  # a batch of every size
    assert (
        least > 20_000
        and least <= shapes.steps[-1].start < 1.1 * least
        and "every size has one batch at least" in notes[0]
    )
    shapes, _, notes = lay_out(
        words.model_copy(update={"batch_ramp": words.batch_ramp.model_copy(update={"over": "200000 samples"})}),  # type: ignore[union-attr]
        10, 1024, Quantity(Decimal(500_000), "samples"), "stage 's'",
    )  # fmt: skip
    assert abs(shapes.steps[-1].start - 200_000) <= 512 and not [note for note in notes if "ramp" in note]
