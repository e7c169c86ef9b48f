"""A training stage's weights as a function of the sample number, in exact integers.

The weight function is piecewise linear: constant segments (a whole stage, or the steps of a stepwise one) and ramps.
Each source's target is its integral. All targets are fractions of small denominators, held as integers:
inside a segment of length L over denominator D, the target times 2·D·L is a whole number (the factor 2·L only where
the segment is a ramp), so comparisons are exact. The last weight holds for ever: deadlines may look past the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import gcd
from typing import Any


@dataclass(frozen=True)
class Segment:
    """Weights from sample `start` on: constant, or linear up to `end` where `to` is given."""

    start: int
    weights: Mapping[str, int]
    end: int | None = None
    to: Mapping[str, int] | None = None


@dataclass(frozen=True)
class WeightFunction:
    """Integer weights over one denominator for every segment; each sums to the denominator at both of its ends."""

    denominator: int
    segments: tuple[Segment, ...]

    @staticmethod
    def constant(weights: Mapping[str, int]) -> WeightFunction:
        """One weight for each source, for ever."""
        return WeightFunction.make([Segment(0, dict(weights))])

    @staticmethod
    def make(segments: Sequence[Segment]) -> WeightFunction:
        """The canonical form: zeros left out, names sorted, units reduced by their greatest common divisor, a ramp at
        the end followed by the segment that holds its last weight, neighbours that say the same joined."""
        parts = list(segments)
        last = parts[-1]
        if last.to is not None and last.end is not None:
            parts.append(Segment(last.end, last.to))
        units = [unit for part in parts for table in (part.weights, part.to or {}) for unit in table.values()]
        divisor = gcd(*units)
        clean: list[Segment] = []
        for part in parts:
            weights = _clean(part.weights, divisor)
            to = _clean(part.to, divisor) if part.to is not None else None
            if to == weights:
                to = None
            if clean and to is None and clean[-1].to is None and clean[-1].weights == weights:
                continue
            clean.append(Segment(part.start, weights, part.end if to is not None else None, to))
        function = WeightFunction(sum(clean[0].weights.values()), tuple(clean))
        function._check()
        return function

    def _check(self) -> None:
        if self.segments[0].start != 0:
            raise ValueError("the first segment must start at sample 0")
        for index, segment in enumerate(self.segments):
            for table in (segment.weights, segment.to):
                if table is not None and (sum(table.values()) != self.denominator or min(table.values()) < 0):
                    raise ValueError(f"weights of segment {index} do not sum to {self.denominator}: {dict(table)}")
            following = self.segments[index + 1].start if index + 1 < len(self.segments) else None
            if following is not None and following <= segment.start:
                raise ValueError(f"segment {index + 1} starts at {following}, not after {segment.start}")
            if segment.to is not None and segment.end != following:
                raise ValueError(f"ramp {index} ends at {segment.end}, the next segment starts at {following}")

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Every source with a weight above zero somewhere, sorted by name."""
        names = {name for part in self.segments for table in (part.weights, part.to or {}) for name in table}
        return tuple(sorted(names))

    @cached_property
    def tables(self) -> dict[str, SourceTarget]:
        """The target of each source."""
        return {name: SourceTarget.of(self, name) for name in self.sources}

    def target(self, source: str, samples: int) -> Fraction:
        """How many of the first `samples` samples `source` should have: the integral of its weight."""
        if source not in self.tables:
            return Fraction(0)
        table = self.tables[source]
        numerator, scale = table.at(samples)
        return Fraction(numerator, scale)

    def weight(self, source: str, sample: int) -> Fraction:
        """The weight of `source` at a sample number."""
        part = self.segments[self.segment_at(sample)]
        at_start = part.weights.get(source, 0)
        if part.to is None or part.end is None:
            return Fraction(at_start, self.denominator)
        change = Fraction(part.to.get(source, 0) - at_start) * (sample - part.start) / (part.end - part.start)
        return (at_start + change) / self.denominator

    def segment_at(self, sample: int) -> int:
        """The number of the segment that holds a sample number; a boundary belongs to the later one."""
        return max(index for index, part in enumerate(self.segments) if part.start <= sample)

    @property
    def is_constant(self) -> bool:
        """Whether one weight holds from the first sample on."""
        return len(self.segments) == 1

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; `from_json` gives an equal function."""
        parts = []
        for part in self.segments:
            row: dict[str, Any] = {"start": part.start, "weights": dict(part.weights)}
            if part.to is not None:
                row |= {"end": part.end, "to": dict(part.to)}
            parts.append(row)
        return {"denominator": self.denominator, "segments": parts}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> WeightFunction:
        """The inverse of `to_json`."""
        parts = [Segment(row["start"], row["weights"], row.get("end"), row.get("to")) for row in record["segments"]]
        return WeightFunction(record["denominator"], tuple(parts))


def _clean(weights: Mapping[str, int], divisor: int) -> dict[str, int]:
    return {name: unit // divisor for name, unit in sorted(weights.items()) if unit}


@dataclass(frozen=True)
class SourceTarget:
    """One source's target: for each segment its start, end (None: for ever), weights at both ends, and base = target
    at its start times 2·D."""

    denominator: int
    starts: tuple[int, ...]
    ends: tuple[int | None, ...]
    first: tuple[int, ...]
    last: tuple[int, ...]
    bases: tuple[int, ...]

    @staticmethod
    def of(function: WeightFunction, source: str) -> SourceTarget:
        """The target of `source` under `function`."""
        starts, ends, first, last, bases = [], [], [], [], []
        base = 0
        parts = function.segments
        for index, part in enumerate(parts):
            end = parts[index + 1].start if index + 1 < len(parts) else None
            begin_weight = part.weights.get(source, 0)
            end_weight = begin_weight if part.to is None else part.to.get(source, 0)
            starts.append(part.start)
            ends.append(end)
            first.append(begin_weight)
            last.append(end_weight)
            bases.append(base)
            if end is not None:
                base += (begin_weight + end_weight) * (end - part.start)
        return SourceTarget(function.denominator, tuple(starts), tuple(ends), tuple(first), tuple(last), tuple(bases))

    def at(self, samples: int) -> tuple[int, int]:
        """The target at `samples` as (numerator, denominator); the denominator is the same for every source."""
        index = max(k for k, start in enumerate(self.starts) if start <= samples)
        offset = samples - self.starts[index]
        begin, end = self.first[index], self.ends[index]
        if end is None or self.last[index] == begin:
            length = 1 if end is None else end - self.starts[index]
            return (self.bases[index] + 2 * begin * offset) * length, 2 * self.denominator * length
        length = end - self.starts[index]
        change = self.last[index] - begin
        numerator = self.bases[index] * length + 2 * begin * offset * length + change * offset * offset
        return numerator, 2 * self.denominator * length

    def first_above(self, whole: int) -> int | None:
        """The smallest number of samples whose target is above `whole`; None where it never is."""
        return self._first(lambda numerator, scale: numerator > whole * scale)

    def first_reaching(self, whole: int) -> int | None:
        """The smallest number of samples whose target is at least `whole`; None where it never is."""
        return self._first(lambda numerator, scale: numerator >= whole * scale)

    def _first(self, holds: Any) -> int | None:
        last_start = self.starts[-1]
        if not holds(*self.at(last_start)):
            if self.first[-1] == 0:
                return None
            low, step = last_start, 1
            while not holds(*self.at(low + step)):
                step *= 2
            high = low + step
        else:
            low, high = -1, last_start
        while high - low > 1:
            middle = (low + high) // 2
            if holds(*self.at(middle)):
                high = middle
            else:
                low = middle
        return high
