"""Random weight functions and groups for tests of the mixture, with ties and rare sources made likely."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import strategies as st

from megatron.data.weight_function import Segment, WeightFunction
from megatron.data.weights import round_shares


@st.composite
def functions(draw: st.DrawFn, most_sources: int = 8, longest: int = 60) -> WeightFunction:
    """Random piecewise linear weights: constants, steps and ramps, with zeros, sources that join late or leave."""
    names = [f"s{index:02d}" for index in range(draw(st.integers(1, most_sources)))]
    denominator = max(draw(st.sampled_from([7, 10, 97, 1000, 10**6])), len(names))
    # Any weights; equal ones and none at all, so that deadlines tie; some a thousandth of the others.
    spread = st.sampled_from([st.integers(0, 20), st.sampled_from([0, 1, 1]), st.sampled_from([1, 2, 2000])])

    def weights() -> dict[str, int]:
        raw = draw(st.lists(draw(spread), min_size=len(names), max_size=len(names)))
        if not any(raw):
            raw[0] = 1
        return round_shares(dict(zip(names, map(Fraction, raw), strict=True)), denominator)

    segments: list[Segment] = []
    start = 0
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, longest))
        ramp = draw(st.booleans())
        segments.append(Segment(start, weights(), start + length if ramp else None, weights() if ramp else None))
        start += length
    return WeightFunction.make(segments)


@st.composite
def groups_for(draw: st.DrawFn, function: WeightFunction) -> dict[str, str]:
    """A group for each source: few groups, many, or each source alone."""
    shared = [f"g{index}" for index in range(draw(st.sampled_from([0, 1, 2, 40])))]
    return {name: draw(st.sampled_from([*shared, name])) for name in function.sources}
