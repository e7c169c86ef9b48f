"""Laws M1, M3 and M4 on the stream over sources, against exact fractions and against brute force."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixture_cases import functions, groups_for

from megatron.data.mixture import PlainMixture, open_mixture
from megatron.data.native import native
from megatron.data.weight_function import Segment, WeightFunction
from megatron.data.weights import round_shares

needs_native = pytest.mark.skipif(native() is None, reason="the C++ extension was not built")


def within_one(function: WeightFunction, order: list[int], offset: int = 0) -> None:
    counts = dict.fromkeys(function.sources, 0)
    for position, source in enumerate(order, offset + 1):
        counts[function.sources[source]] += 1
        for name, count in counts.items():
            assert abs(count - function.target(name, position)) < 1, (name, position)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_M1_every_prefix_is_within_one_sample_of_its_target(data: st.DataObject) -> None:
    function = data.draw(functions())
    stream = open_mixture(function, data.draw(groups_for(function)))
    within_one(function, stream.take(300).tolist())


@needs_native
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_M3_native_stream_equals_its_definition(data: st.DataObject) -> None:
    function = data.draw(functions())
    groups = data.draw(groups_for(function))
    fast, plain = open_mixture(function, groups), PlainMixture(function, groups)
    assert type(fast) is not PlainMixture
    assert fast.take(250).tolist() == plain.take(250).tolist()
    assert list(fast.counts) == plain.counts


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_M3_the_order_resumes_from_counts_alone(data: st.DataObject) -> None:
    function = data.draw(functions())
    groups = data.draw(groups_for(function))
    whole = open_mixture(function, groups)
    order = whole.take(240).tolist()
    cut = data.draw(st.integers(0, 240))
    first = open_mixture(function, groups)
    head = first.take(cut).tolist()
    second = open_mixture(function, groups, counts=list(first.counts))
    assert head + second.take(240 - cut).tolist() == order


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_M3_seeking_equals_stepping(data: st.DataObject) -> None:
    function = data.draw(functions(longest=400))
    groups = data.draw(groups_for(function))
    places = data.draw(st.lists(st.integers(0, 3000), min_size=1, max_size=3))
    for make in (open_mixture, PlainMixture):
        stream = make(function, groups)
        for place in places:
            stream.seek(place)
            stepped = open_mixture(function, groups)
            stepped.take(place)
            assert stream.position == place
            assert list(stream.counts) == list(stepped.counts)
            assert stream.take(5).tolist() == stepped.take(5).tolist()
            stream.seek(place)


@needs_native
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_M3_seeking_far_in_a_long_step_jumps_by_whole_periods(data: st.DataObject) -> None:
    first = data.draw(st.fixed_dictionaries({"a": st.integers(1, 9), "b": st.integers(0, 9), "c": st.integers(0, 9)}))
    shares = {name: Fraction(weight) for name, weight in first.items()}
    segments = [Segment(0, round_shares({"a": Fraction(2), "b": Fraction(1), "c": Fraction(3)}, 60))]
    segments.append(Segment(data.draw(st.integers(1, 50)), round_shares(shares, 60)))
    segments.append(Segment(segments[1].start + 3000, round_shares({"b": Fraction(1)}, 60)))
    function = WeightFunction.make(segments)
    groups = dict.fromkeys(function.sources, "g")
    place = data.draw(st.integers(0, 3400))
    jumped, stepped = open_mixture(function, groups), open_mixture(function, groups)
    jumped.seek(place)
    stepped.take(place)
    assert list(jumped.counts) == list(stepped.counts)


def test_M4_a_source_may_be_absent_join_late_leave_and_come_back() -> None:
    half = {"a": 1, "b": 1}
    function = WeightFunction.make([Segment(0, {"a": 2}), Segment(10, half), Segment(30, {"a": 2}), Segment(40, half)])
    order = open_mixture(function, {"a": "a", "b": "b"}).take(60).tolist()
    b = function.sources.index("b")
    assert b not in order[:10] and b not in order[30:40]
    assert order[10:30].count(b) == 10 and order[40:60].count(b) == 10


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_M4_a_source_of_weight_zero_changes_nothing(data: st.DataObject) -> None:
    function = data.draw(functions(most_sources=5))
    groups = data.draw(groups_for(function))
    rows = function.to_json()
    for row in rows["segments"]:
        row["weights"]["unused"] = 0
    parts = [Segment(r["start"], r["weights"], r.get("end"), r.get("to")) for r in rows["segments"]]
    widened = WeightFunction.make(parts)
    assert widened == function
    assert open_mixture(widened, groups | {"unused": "x"}).take(90).tolist() == (
        open_mixture(function, groups).take(90).tolist()
    )


def test_M1_ties_go_to_the_group_furthest_behind_then_to_the_name() -> None:
    # a1 and a2 share group A with two thirds together; all three tie on the deadline at first.
    function = WeightFunction.constant({"a1": 1, "a2": 1, "b": 1})
    order = [function.sources[s] for s in open_mixture(function, {"a1": "A", "a2": "A", "b": "B"}).take(3)]
    # after a1: group A is 2·2/3 − 1 = 1/3 behind, group B 2/3
    assert order[1] == "b"


def test_M1_counts_equal_targets_after_every_period() -> None:
    function = WeightFunction.constant(round_shares({"a": Fraction(1, 3), "b": Fraction(1, 7), "c": Fraction(11, 21)}))
    assert function.denominator == 10**6
    stream = open_mixture(function, dict.fromkeys("abc", "g"))
    stream.seek(3 * 10**6)
    assert dict(zip(function.sources, stream.counts, strict=True)) == {
        name: 3 * units for name, units in function.segments[0].weights.items()
    }


def test_M1_wide_weights_do_not_overflow() -> None:
    total = 10**11
    function = WeightFunction.make(
        [
            Segment(0, {"a": total - 7, "b": 7}, total, {"a": 3, "b": total - 3}),
            Segment(total, {"a": 3, "b": total - 3}),
        ]
    )
    groups = {"a": "a", "b": "b"}
    fast, plain = open_mixture(function, groups, horizon=total), PlainMixture(function, groups)
    assert fast.take(50).tolist() == plain.take(50).tolist()


@needs_native
@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 10**6), min_size=10, max_size=10).filter(lambda raw: any(raw[:5]) and any(raw[5:])),
    st.data(),
)
def test_M3_native_equals_its_definition_far_into_a_long_ramp(raw: list[int], data: st.DataObject) -> None:
    length = data.draw(st.sampled_from([10**5 + 3, 10**6, 10**13]))
    ends = [round_shares({f"s{i}": Fraction(raw[k + i]) for i in range(5)}) for k in (0, 5)]
    function = WeightFunction.make([Segment(0, ends[0], length, ends[1])])
    groups = {name: data.draw(st.sampled_from("xyz")) for name in function.sources}
    fast = open_mixture(function, groups, horizon=length)
    assert type(fast) is not PlainMixture
    fast.seek(data.draw(st.integers(0, min(length, 10**6))))
    plain = PlainMixture(function, groups, list(fast.counts))
    assert fast.take(60).tolist() == plain.take(60).tolist()


def test_M1_long_constant_segments_count_towards_the_width() -> None:
    # a group's lag is taken over 2 · denominator · the segment's length, ramp or not
    total = 3 * 10**13
    half, rest = {"a": total // 2 - 1, "b": total // 2 + 1}, {"a": total // 3, "b": total - total // 3}
    function = WeightFunction.make([Segment(0, half), Segment(total, rest)])
    stream = open_mixture(function, {"a": "a", "b": "b"}, horizon=2 * total)
    assert isinstance(stream, PlainMixture)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 10**9), min_size=1, max_size=12),
    st.sampled_from([12, 100, 10**6]),
)
def test_M1_shares_are_rounded_once_by_largest_remainder(raw: dict[str, int], denominator: int) -> None:
    if not any(raw.values()):
        return
    weights = {name: Fraction(value) for name, value in raw.items()}
    units = round_shares(weights, denominator)
    total = sum(weights.values())
    assert sum(units.values()) == denominator
    assert set(units) == {name for name, value in raw.items() if value}
    assert min(units.values()) >= 1
    lifted = sum(1 for name in units if weights[name] * denominator / total < 1)
    for name, unit in units.items():
        assert abs(unit - weights[name] * denominator / total) <= 1 + lifted
