"""Seeking and resuming give what stepping gives (law M3), anywhere, and take few steps."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixture_cases import functions, groups_for

from megatron.data.mixture import PlainMixture, open_mixture
from megatron.data.native import native
from megatron.data.weight_function import Segment, WeightFunction
from megatron.data.weights import round_shares

pytestmark = pytest.mark.skipif(native() is None, reason="the C++ extension was not built")


def counted(order: list[int], sources: int) -> list[int]:
    return [order.count(source) for source in range(sources)]


def places_within(data: st.DataObject, function: WeightFunction, length: int, count: int) -> list[int]:
    """Random positions, and those at and beside the borders of segments."""
    borders = {part.start + off for part in function.segments for off in (-1, 0, 1)} & set(range(length + 1))
    return data.draw(st.lists(st.integers(0, length) | st.sampled_from(sorted(borders)), min_size=1, max_size=count))


@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_M3_seeks_forward_and_back_equal_the_definition(data: st.DataObject) -> None:
    function = data.draw(functions(most_sources=10, longest=80))
    groups = data.draw(groups_for(function))
    length = min(260, function.segments[-1].start + 60)
    plain = PlainMixture(function, groups)
    order = plain.take(length).tolist()
    stream = open_mixture(function, groups)
    assert type(stream) is not PlainMixture
    for place in places_within(data, function, length, 5):
        stream.seek(place)
        assert stream.position == place
        assert list(stream.counts) == counted(order[:place], len(function.sources)), place
        assert stream.take(min(7, length - place)).tolist() == order[place : place + 7]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_M3_seeks_among_many_sources_equal_the_definition(data: st.DataObject) -> None:
    function = data.draw(functions(most_sources=40, longest=400))
    groups = data.draw(groups_for(function))
    length = min(900, function.segments[-1].start + 300)
    order = PlainMixture(function, groups).take(length).tolist()
    stream = open_mixture(function, groups)
    for place in places_within(data, function, length, 6):
        stream.seek(place)
        counts = list(stream.counts)
        assert counts == counted(order[:place], len(function.sources)), place
        resumed = open_mixture(function, groups, counts)
        assert resumed.take(length - place).tolist() == order[place:]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_M3_far_seeks_equal_stepping(data: st.DataObject) -> None:
    # The stream's steps are compared with the definition elsewhere; here they are the oracle for its jumps.
    function = data.draw(functions(most_sources=24, longest=60_000))
    groups = data.draw(groups_for(function))
    length = function.segments[-1].start + 20_000
    walking, jumping = open_mixture(function, groups), open_mixture(function, groups)
    for place in sorted(places_within(data, function, length, 6)):
        walking.take(place - walking.position)
        jumping.seek(0)
        jumping.seek(place)
        assert list(jumping.counts) == list(walking.counts), place


def random_ramp(sources: int, length: int, seed: int) -> WeightFunction:
    draw = random.Random(seed)
    ends = [
        round_shares({f"s{index:02d}": Fraction(draw.randint(1, 1000)) for index in range(sources)}) for _ in range(2)
    ]
    return WeightFunction.make([Segment(0, ends[0], length, ends[1])])


@pytest.mark.parametrize("sources", [2, 3, 8, 40])
@pytest.mark.parametrize("length", [10**9, 10**12])
def test_M3_a_seek_far_into_a_ramp_takes_few_steps_and_agrees_with_its_neighbours(sources: int, length: int) -> None:
    function = random_ramp(sources, length, seed=sources)
    groups = {name: name[-1] for name in function.sources}
    stream: Any = open_mixture(function, groups, horizon=length)
    draw = random.Random(length)
    for _ in range(5):
        place = draw.randint(length // 10, length - 10**4)
        stream.seek(place)
        for name, count in zip(function.sources, stream.counts, strict=True):
            assert abs(count - function.target(name, place)) < 1
        # The definition, from there on, arrives where a seek of its own lands.
        plain = PlainMixture(function, groups, list(stream.counts))
        assert stream.take(300).tolist() == plain.take(300).tolist()
        arrived = list(stream.counts)
        stream.seek(0)
        stream.seek(place + 300)
        assert list(stream.counts) == arrived
    assert stream.seek_steps < 10**5


@pytest.mark.parametrize("alone", [True, False])
def test_M3_a_seek_where_many_sources_fade_to_nothing_takes_few_steps(alone: bool) -> None:
    # All deadlines tie within each half, and near the end those of the fading half are far apart.
    length = 10**8
    names = [f"s{index:02d}" for index in range(16)]
    function = WeightFunction.make([Segment(0, dict.fromkeys(names[:8], 1), length, dict.fromkeys(names[8:], 1))])
    groups = {name: name if alone else "g" for name in names}
    stream: Any = open_mixture(function, groups, horizon=length)
    for place in (length - 12_345, 23_456, length // 3):
        stream.seek(place)
        plain = PlainMixture(function, groups, list(stream.counts))
        assert stream.take(200).tolist() == plain.take(200).tolist()
        arrived = list(stream.counts)
        stream.seek(0)
        stream.seek(place + 200)
        assert list(stream.counts) == arrived
    assert stream.seek_steps < 10**6


def test_M3_a_far_seek_in_a_constant_stage_equals_the_definition() -> None:
    function = WeightFunction.constant(round_shares({"a": Fraction(5, 9), "b": Fraction(1, 7), "c": Fraction(19, 63)}))
    groups = {"a": "x", "b": "y", "c": "y"}
    stream: Any = open_mixture(function, groups, horizon=10**12)
    plain = PlainMixture(function, groups)
    for offset in (1, 777, 5000):
        stream.seek(654_321 * 10**6 + offset)
        plain.seek(654_321 * 10**6 + offset)  # by whole periods, then by steps
        assert list(stream.counts) == plain.counts
    assert stream.seek_steps < 1000


def test_M1_equal_sources_alone_in_their_groups_go_by_name() -> None:
    names = [f"s{index:03d}" for index in range(300)]
    function = WeightFunction.constant(dict.fromkeys(names, 1))
    order = open_mixture(function, {name: name for name in names}).take(900).tolist()
    assert order == [*range(300)] * 3


def test_M1_deadlines_further_off_than_the_tree_can_tell_follow_the_definition() -> None:
    # One sample in 2^43 slots: its deadline lies beyond what a node of the tree holds, and so do those of its equals.
    total = 2**43
    weights = {"a": 3, "b": 3, "c": 2, "d": total - 8}
    function = WeightFunction.constant(weights)
    groups = {"a": "x", "b": "y", "c": "y", "d": "d"}
    starts = [[0, 0, 0, 0], [1, 1, 0, total // 3]]
    for counts in starts:
        fast, plain = open_mixture(function, groups, counts, horizon=total), PlainMixture(function, groups, counts)
        assert type(fast) is not PlainMixture
        assert fast.take(50).tolist() == plain.take(50).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, [0], [(0, -1, [1], [1])], [0]), "denominator"),
        ((2, [0], [(0, -1, [1], [1])], [0]), "sum"),
        ((1, [0], [(0, 5, [1], [1])], [0]), "for ever"),
        ((1, [0], [(0, 5, [1], [1]), (6, -1, [1], [1])], [0]), "start"),
        ((1, [0, 0], [(0, -1, [1], [1])], [0, 0]), "one weight"),
        ((1, [0, 0], [(0, -1, [2, -1], [2, -1])], [0, 0]), "negative"),
        ((1, [-1], [(0, -1, [1], [1])], [0]), "group"),
        ((1, [0], [(0, -1, [1], [1])], [-1]), "count"),
        ((1, [0], [(0, -1, [1], [1])], [0, 0]), "count"),
    ],
)
def test_B1_the_extension_refuses_what_is_no_mixture(arguments: tuple[Any, ...], message: str) -> None:
    module = native()
    assert module is not None
    with pytest.raises(ValueError, match=message):
        module.MixtureStream(*arguments)
