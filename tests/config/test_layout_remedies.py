"""Whoever follows a refusal's advice is not refused again: the numbers in the messages are read and set, one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from megatron.config.errors import ConfigError
from megatron.config.layout import Layout, resolve_layout
from megatron.config.layout_checks import BatchShape, refusals
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection, OptimizerSection, ParallelSection, StageSection, TrainSection
from megatron.data.schedule import Schedule, resolve_schedule
from megatron.data.stage_resolution import SourceFacts
from megatron.planner.resolve import check_batches

SHAPE = resolve_model(
    ModelSection(
        seq_length=64,
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=256,
    ),
    320,
)
LAYERS = {layers: SHAPE.from_json(SHAPE.to_json() | {"num_hidden_layers": layers}) for layers in (1, 2, 3, 6)}
_SCHEDULES = ("1f1b", "interleaved", "zero-bubble", "zbv")


def refused(
    keys: dict[str, Any], processes: int, micro: int, batches: list[BatchShape], shape: ModelShape = SHAPE
) -> list[str]:
    section = ParallelSection.model_validate(keys)
    layout = resolve_layout(section, processes)
    train = TrainSection(global_batch_size=batches[0].global_batch_size, micro_batch_size=micro)
    return [str(e) for e in refusals(section, layout, shape, train, OptimizerSection(), batches, "fp32")]


@some.composite
def layouts(draw: some.DrawFn) -> tuple[dict[str, Any], int]:
    """Keys of [parallel] and a number of processes that they divide."""
    axes = ("tensor", "pipeline", "context")
    keys: dict[str, Any] = {name: draw(some.sampled_from((1, 2, 3, 4, 8))) for name in axes}
    if keys["tensor"] > 1:
        keys["sequence"] = draw(some.booleans())
    if keys["pipeline"] > 1:
        keys["schedule"] = draw(some.sampled_from(_SCHEDULES))
    if keys["context"] > 1:
        keys["context_method"] = draw(some.sampled_from(("auto", "all-to-all", "gather")))
    keys["data_shard"] = draw(some.sampled_from(("none", "optimizer")))
    data = draw(some.integers(1, 6))
    return keys, keys["tensor"] * keys["pipeline"] * keys["context"] * data


def numbers(words: str) -> list[int]:
    return [int(word) for word in re.findall(r"\d+", words)]


def batch_advice(message: str) -> list[int]:
    """ "set it to 24 or 32 (or the stage's own …" as numbers."""
    found = re.search(r"set (?:it|train\.global_batch_size) to (\d+(?: or \d+)?) \(", message)
    return numbers(found[1]) if found else []


def axis_advice(message: str) -> Iterator[dict[str, Any]]:
    """What the message says of keys of [parallel], each value by itself."""
    for key, words in re.findall(r"parallel\.(tensor|pipeline|context) to ((?:at most |one of )?[\d, or]*\d)", message):
        values = numbers(words)
        yield from ({key: value} for value in (range(1, values[0] + 1) if "at most" in words else values))
    if re.search(r"set context_method = gather(?!, and)", message):
        yield {"context_method": "gather"}


@given(layouts(), some.integers(1, 5), some.lists(some.integers(1, 70), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_a_batch_that_is_recommended_is_refused_by_no_check_of_batches(
    layout: tuple[dict[str, Any], int], micro: int, sizes: list[int]
) -> None:
    keys, processes = layout
    batches = [BatchShape(48 * 64, size) for size in sizes]
    of_batches = [words for words in refused(keys, processes, micro, batches) if "global_batch_size" in words]
    for message in of_batches:
        values = batch_advice(message)
        assert values, message
        for value in values:
            again = refused(keys, processes, micro, [BatchShape(48 * 64, value)])
            assert not [words for words in again if "global_batch_size" in words], (message, value)
        size = next(size for size in sizes if f"global_batch_size {size} " in message)
        assert max(values) > size and all(value < size for value in values[:-1]), message


@given(layouts(), some.integers(1, 3), some.integers(1, 40), some.integers(1, 200), some.sampled_from((1, 2, 3, 6)))
@settings(max_examples=300, deadline=None)
def test_what_mends_the_only_fault_makes_no_other(
    layout: tuple[dict[str, Any], int], micro: int, size: int, length: int, layers: int
) -> None:
    keys, processes = layout
    batch, shape = BatchShape(length, size), LAYERS[layers]
    found = refused(keys, processes, micro, [batch], shape)
    if len(found) != 1 or "never compared" in found[0]:
        return
    (message,) = found
    for change in axis_advice(message):
        assert refused(keys | change, processes, micro, [batch], shape) == [], (message, change)
    for value in batch_advice(message):
        assert refused(keys, processes, micro, [batch._replace(global_batch_size=value)], shape) == [], message
    lengths = re.search(r"seq_length(?: \(or the stage's own\))? to (\d+(?: or \d+)?)", message)
    gathers = {"context_method": "gather"} if "gather, and" in message else {}
    for value in numbers(lengths[1]) if lengths else []:
        assert refused(keys | gathers, processes, micro, [batch._replace(seq_length=value)], shape) == [], message


@pytest.mark.parametrize(
    ("keys", "processes", "batch", "words"),
    [
        # 8 processes of tensor 1 or 2 would have more data ranks than the batch has sequences
        ({"tensor": 8}, 8, (64, 2), "set parallel.tensor to 4, or num_attention_heads"),
        # 6 layers, and 5 does not divide 12 processes
        ({"pipeline": 12}, 12, (64, 12), "set parallel.pipeline to one of 1, 2, 3, 4, 6, or num_hidden_layers to 12"),
        ({"context": 8, "context_method": "all-to-all"}, 8, (8, 4), "set parallel.context to 2 or 4"),
        (
            {"context": 8, "context_method": "all-to-all"},
            8,
            (8, 1),
            "set context_method = gather, and model.seq_length (or the stage's own) to 16",
        ),
    ],
)
def test_an_axis_is_recommended_only_as_the_rest_allows(
    keys: dict[str, Any], processes: int, batch: tuple[int, int], words: str
) -> None:
    (message,) = refused(keys, processes, 1, [BatchShape(*batch)])
    assert words in message


def test_where_the_number_of_processes_is_not_known_every_size_of_an_axis_is_named() -> None:
    section, train = ParallelSection(tensor=8), TrainSection(global_batch_size=2)
    arguments = (SHAPE, train, OptimizerSection(), [BatchShape(64, 2)], "fp32")
    (found,) = refusals(section, resolve_layout(section, 8), *arguments, processes_known=False)
    assert "parallel.tensor to one of 1, 2, 4," in str(found)


# Before the layout is looked at: the schedule's own check


def schedule_of(**stage: Any) -> Schedule:
    section = StageSection.model_validate({"name": "x", "steps": 12, "mixture": {"a": 1}} | stage)
    facts = {"a": SourceFacts("a", 10**12, Decimal(1), "error")}
    return resolve_schedule([section], facts, seq_length=8, global_batch_size=4)


@given(layouts(), some.integers(2, 6), some.integers(1, 70))
@settings(max_examples=100, deadline=None)
def test_a_stage_s_batch_that_is_recommended_fits_the_processes(
    layout: tuple[dict[str, Any], int], micro: int, size: int
) -> None:
    keys, processes = layout
    section = ParallelSection.model_validate(keys)
    over = resolve_layout(section, processes)
    if size % micro == 0:
        check_batches(schedule_of(global_batch_size=size), micro, section, over)
        return
    with pytest.raises(ConfigError) as caught:
        check_batches(schedule_of(global_batch_size=size), micro, section, over)
    values = batch_advice(str(caught.value))
    assert values
    for value in values:
        check_batches(schedule_of(global_batch_size=value), micro, section, over)
        again = refused(keys, processes, micro, [BatchShape(48 * 64, value)])
        assert not [words for words in again if "global_batch_size" in words], str(caught.value)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (None, "micro_batch_size 2: set train.global_batch_size to 8 or 10 ("),
        (Layout(), "micro_batch_size 2: set train.global_batch_size to 8 or 10 ("),
        (Layout(shard=2), "micro_batch_size 2 x 2 data ranks = 4: set train.global_batch_size to 8 or 12 ("),
    ],
)
def test_nine_sequences_on_two_data_ranks(layout: Layout | None, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_batches(schedule_of(global_batch_size=9), 2, ParallelSection(), layout)
    assert words in str(caught.value) and "stage 'x': global_batch_size 9" in str(caught.value)


@given(layouts(), some.integers(2, 5), some.integers(1, 4), some.integers(1, 4), some.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_a_ramp_of_the_multiples_that_are_recommended_is_refused_nowhere(
    layout: tuple[dict[str, Any], int], micro: int, start: int, increment: int, steps: int
) -> None:
    keys, processes = layout
    section = ParallelSection.model_validate(keys)
    over = resolve_layout(section, processes)
    with pytest.raises(ConfigError) as caught:
        check_batches(schedule_of(global_batch_size=micro + 1), micro, section, over)
    found = re.search(r"start and increment, too, to multiples of (\d+)\)", str(caught.value))
    assert found is not None
    of = int(found[1])
    ramp = {"start": of * start, "increment": of * increment, "over": "6 steps"}
    schedule = schedule_of(global_batch_size=of * (start + steps * increment), batch_ramp=ramp)
    check_batches(schedule, micro, section, over)
    batches = [BatchShape(48 * 64, step.global_batch_size) for step in schedule.stages[0].shapes.steps]
    assert len(batches) == steps + 1
    assert not [words for words in refused(keys, processes, micro, batches) if "global_batch_size" in words]
