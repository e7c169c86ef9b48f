"""The mixture over tokens, cut for drawing: equal slices for the terminal, exact corners for SVG and PNG.

Shares are integrals of the resolved weights, never samples of them, so that a slice that holds a step or a part of a
ramp shows what is trained on in it.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from string import ascii_lowercase, ascii_uppercase, digits

from megatron.data.schedule import Schedule, TrainingStage
from megatron.optim.lr import LRSchedule
from megatron.planner.positions import samples_at, source_tokens_at, stretches, tokens_at

LETTERS = ascii_uppercase + ascii_lowercase + digits
NO_LETTER = "*"
_HUES = (212, 22, 155, 312, 44, 188, 262, 95, 350, 74)


@dataclass(frozen=True)
class Slice:
    """Tokens [start, end) of the run, all of one training stage. shares: of its tokens by source, above zero only.
    rate: the learning rate in its middle."""

    stage: int
    start: int
    end: int
    shares: Mapping[str, Fraction]
    rate: float


@dataclass(frozen=True)
class Corner:
    """Shares at a token of a training stage; where they step, there are two corners at one token."""

    token: int
    shares: Mapping[str, float]


@dataclass(frozen=True)
class Ink:
    """How a source is drawn: `letter` where there is no colour; colours as "#rrggbb" on light and on dark paper."""

    letter: str
    light: str
    dark: str


def sources_in_order(schedule: Schedule) -> list[str]:
    """Every source that has a weight somewhere: groups by tokens, largest first, and so the sources within each."""
    tokens: dict[str, int] = {}
    groups: dict[str, int] = {}
    facts = schedule.stages[-1].facts
    for stage in schedule.stages:
        for name in stage.weights.sources:
            use = int(source_tokens_at(stage, name, stage.samples))
            tokens[name] = tokens.get(name, 0) + use
            groups[facts[name].group] = groups.get(facts[name].group, 0) + use
    return sorted(tokens, key=lambda name: (-groups[facts[name].group], facts[name].group, -tokens[name], name))


def inks(schedule: Schedule) -> dict[str, Ink]:
    """By source, in drawing order: one hue for each group, shades of it for its sources."""
    facts = schedule.stages[-1].facts
    names = sources_in_order(schedule)
    groups = list(dict.fromkeys(facts[name].group for name in names))
    result = {}
    for number, name in enumerate(names):
        members = [other for other in names if facts[other].group == facts[name].group]
        hue = _HUES[groups.index(facts[name].group) % len(_HUES)]
        way = members.index(name) / max(1, len(members) - 1)
        light = 0.36 + 0.34 * way if len(members) > 1 else 0.47
        letter = LETTERS[number] if number < len(LETTERS) else NO_LETTER
        result[name] = Ink(letter, _hex(hue, light), _hex(hue, light + 0.16 - 0.08 * way))
    return result


def _hex(hue: float, lightness: float) -> str:
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue / 360, lightness, 0.58))
    return f"#{red:02x}{green:02x}{blue:02x}"


def slices_of(schedule: Schedule, lr: LRSchedule, columns: int) -> list[Slice]:
    """The run in `columns` slices, at least one for each stage; slices of one stage hold equally many tokens."""
    sizes = {str(stage.index): Fraction(stage.tokens) for stage in schedule.stages}
    widths = column_widths(sizes, max(columns, len(sizes)))
    result = []
    for stage in schedule.stages:
        width = widths[str(stage.index)]
        total = stage.tokens
        ends = [samples_at(stage, total * number // width) for number in range(width + 1)]
        for number, (first, last) in enumerate(zip(ends, ends[1:], strict=False)):
            start, end = (stage.start_token + total * at // width for at in (number, number + 1))
            rate = lr.law_at(stage.index).rate((start + end) // 2)
            result.append(Slice(stage.index, start, end, _shares(stage, first, last), rate))
    return result


def _shares(stage: TrainingStage, first: int, last: int) -> dict[str, Fraction]:
    """Shares of the samples first … last − 1 of a stage; of a single one where a slice is narrower than that."""
    if last <= first:
        first = min(first, stage.samples - 1)
        last = first + 1
    whole = tokens_at(stage, last) - tokens_at(stage, first)
    shares = {
        name: (source_tokens_at(stage, name, last) - source_tokens_at(stage, name, first)) / whole
        for name in stage.weights.sources
    }
    return {name: share for name, share in shares.items() if share}


def shared_out(sizes: Mapping[str, Fraction], units: int) -> dict[str, int]:
    """Whole units in proportion to sizes: each gets the floor or the ceiling of its part, so that what is drawn is
    within one unit of what is so. What is over goes first to those that would get none, the largest first, then by
    remainder."""
    total = sum(sizes.values(), Fraction(0))
    exact = {name: size * units / total for name, size in sizes.items() if size > 0}
    given = {name: int(part) for name, part in exact.items()}
    absent = sorted((name for name in given if not given[name]), key=lambda name: -exact[name])
    others = sorted((name for name in given if given[name]), key=lambda name: given[name] - exact[name])
    for name in [*absent, *others][: units - sum(given.values())]:
        given[name] += 1
    return given


def column_widths(sizes: Mapping[str, Fraction], columns: int) -> dict[str, int]:
    """`shared_out` with at least one column for each; the widest give theirs up. Needs as many columns as sizes."""
    given = dict.fromkeys(sizes, 0) | shared_out(sizes, columns)
    for name in [name for name, width in given.items() if not width]:
        given[max(given, key=lambda other: given[other])] -= 1
        given[name] = 1
    return given


def corners_of(stage: TrainingStage, names: Sequence[str]) -> list[Corner]:
    """The shares of a stage at every token where a line through them bends or steps, both ends included."""
    inner = {part.start for part in stage.weights.segments} | {part.start for part in stretches(stage)}
    offsets = sorted({0, stage.samples} | {offset for offset in inner if 0 < offset < stage.samples})
    result = []
    for first, last in zip(offsets, offsets[1:], strict=False):
        part = stage.weights.segments[stage.weights.segment_at(first)]
        for offset in (first, last):
            shares = {}
            for name in names:
                unit = Fraction(part.weights.get(name, 0))
                if part.to is not None and part.end is not None:
                    unit += (part.to.get(name, 0) - unit) * (offset - part.start) / (part.end - part.start)
                shares[name] = float(unit / stage.weights.denominator)
            result.append(Corner(stage.start_token + tokens_at(stage, offset), shares))
    return result
