"""Sources that run dry inside a stage under `dry = "renormalise"`: where they leave is solved before the stage begins.

At the exact point where a source's target reaches what its cap leaves, its weight becomes zero and the others share it
in proportion. The points are sample numbers of the target, never reactions to counts, so law M1 holds throughout:
with target <= room at the event and |count − target| < 1, the count can never pass the room.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from megatron.config.errors import ConfigError
from megatron.data.weight_function import Segment, WeightFunction
from megatron.data.weights import DENOMINATOR, round_shares


def solve_events(
    weights: WeightFunction, room: Mapping[str, int], samples: int, where: str
) -> tuple[WeightFunction, list[tuple[str, int]]]:
    """The weights with every event worked in, and the events as (source, sample number of the stage).

    Args:
        weights: the stage's weights before any source runs dry.
        room: samples that each source under the `renormalise` policy has left.
        samples: the stage's length; running out of every source before it is a ConfigError.
        where: the stage, for messages.

    Raises ConfigError also where a source would run dry inside a ramp.
    """
    if any(part.to is not None for part in weights.segments):
        dry = [name for name, left in sorted(room.items()) if weights.target(name, samples) > left]
        if dry:
            raise ConfigError(
                f"{where}: source {dry[0]!r} runs dry inside a ramp of its weight, which renormalise cannot solve: "
                f"raise sources.{dry[0]}.max_epochs, shorten the stage, or replace the ramp by phases"
            )
        return weights, []
    # Shares among those that stay are rounded to one part in 10^6 again, however small the reduced weights are.
    scale = max(1, DENOMINATOR // weights.denominator)
    denominator = weights.denominator * scale
    gone: set[str] = set()
    events: list[tuple[str, int]] = []
    solved: list[Segment] = []
    given = dict.fromkeys(weights.sources, Fraction(0))
    parts = weights.segments
    for index, part in enumerate(parts):
        end = parts[index + 1].start if index + 1 < len(parts) else None
        start = part.start
        while end is None or start < end:
            live = {name: Fraction(unit) for name, unit in part.weights.items() if name not in gone}
            if not live:
                if start < samples:
                    raise ConfigError(
                        f"{where}: every source of its mixture has run dry at sample {start} of {samples}: raise "
                        "max_epochs, shorten the stage, or add a source"
                    )
                return (WeightFunction.make(solved) if solved else weights), events
            units = round_shares(live, denominator)
            at, leaving = _next_event(units, denominator, given, room, start)
            if leaving is None or (end is not None and at >= end):
                solved.append(Segment(start, units))
                if end is None:
                    return WeightFunction.make(solved), events
                given = {n: given[n] + Fraction(units.get(n, 0) * (end - start), denominator) for n in given}
                start = end
                continue
            if at > start:
                solved.append(Segment(start, units))
                given = {n: given[n] + Fraction(units.get(n, 0) * (at - start), denominator) for n in given}
            gone.add(leaving)
            if at < samples:
                events.append((leaving, at))
            start = at
    raise AssertionError("the last segment has no end")


def _next_event(
    units: Mapping[str, int],
    total: int,
    given: Mapping[str, Fraction],
    room: Mapping[str, int],
    start: int,
) -> tuple[int, str | None]:
    """The first sample number at which a source's target reaches its room, and the source; None where none does."""
    found = [
        (start + int(max(Fraction(0), (room[name] - given[name])) * total / unit), name)
        for name, unit in units.items()
        if name in room and unit
    ]
    return min(found) if found else (0, None)
