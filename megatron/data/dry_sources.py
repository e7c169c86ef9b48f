"""Sources that run dry inside a stage under `dry = "renormalise"`: where they leave is solved before the stage begins.

At the exact point where a source's target reaches what its cap leaves, its weight becomes zero and the others share it
in proportion. The points are sample numbers of the target, never reactions to counts, so law M1 holds throughout:
with target <= room at the event and |count − target| < 1, the count can never pass the room. Where the sequence length
changes within the stage, tokens follow the counts with an error below the last length plus the changes; a source then
leaves that much earlier.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction

from megatron.config.errors import ConfigError
from megatron.data.stage_shapes import StageShapes
from megatron.data.weight_function import Segment, WeightFunction
from megatron.data.weights import DENOMINATOR, round_shares


def solve_events(
    weights: WeightFunction, room: Mapping[str, int], samples: int, shapes: StageShapes, where: str
) -> tuple[WeightFunction, list[tuple[str, int]]]:
    """The weights with every event worked in, and the events as (source, sample number of the stage).

    Args:
        weights: the stage's weights before any source runs dry.
        room: tokens that each source under the `renormalise` policy has left.
        samples: the stage's length; running out of every source before it is a ConfigError.
        shapes: its sequence lengths. where: the stage, for messages.

    Raises ConfigError also where a source would run dry inside a ramp.
    """
    limits = {name: _limit(left, shapes) for name, left in room.items()}
    if any(part.to is not None for part in weights.segments):
        _refuse_in_ramp(weights, limits, samples, shapes, where)
        return weights, []
    # Shares among those that stay are rounded to one part in 10^6 again, however small the reduced weights are.
    denominator = weights.denominator * max(1, DENOMINATOR // weights.denominator)
    gone: set[str] = set()
    events: list[tuple[str, int]] = []
    solved: list[Segment] = []
    given = dict.fromkeys(weights.sources, Fraction(0))
    for part, begin, end in _pieces(weights, shapes):
        start, length = begin, shapes.at(begin).seq_length
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
            left = {name: limit - given[name] for name, limit in limits.items()}
            at, leaving = _next_event(units, Fraction(denominator, length), left, start)
            if leaving is None or (end is not None and at >= end):
                solved.append(Segment(start, units))
                if end is None:
                    return WeightFunction.make(solved), events
                at = end
            elif at > start:
                solved.append(Segment(start, units))
            given = {n: given[n] + Fraction(units.get(n, 0) * length * (at - start), denominator) for n in given}
            if leaving is not None and (end is None or at < end):
                gone.add(leaving)
                if at < samples:
                    events.append((leaving, at))
            start = at
    raise AssertionError("the last segment has no end")


def _limit(room: int, shapes: StageShapes) -> int:
    """Tokens at which a source's target stops, so that its counts never take more than its room."""
    if shapes.length_changes == 0:
        return room // shapes.longest_sequence * shapes.longest_sequence
    return max(0, room - shapes.length_changes - shapes.longest_sequence)


def _refuse_in_ramp(
    weights: WeightFunction, limits: Mapping[str, int], samples: int, shapes: StageShapes, where: str
) -> None:
    for name, limit in sorted(limits.items()):
        if shapes.target_tokens(weights, name, samples) > limit:
            raise ConfigError(
                f"{where}: source {name!r} runs dry inside a ramp of its weight, which renormalise cannot solve: "
                f"raise sources.{name}.max_epochs, shorten the stage, or replace the ramp by phases"
            )


def _pieces(weights: WeightFunction, shapes: StageShapes) -> Iterator[tuple[Segment, int, int | None]]:
    """(segment, first sample, end) where neither the weights nor the sequence length change; the last has no end."""
    starts = [part.start for part in weights.segments]
    borders = sorted({*starts, *shapes.change_starts})
    for number, begin in enumerate(borders):
        end = borders[number + 1] if number + 1 < len(borders) else None
        yield weights.segments[weights.segment_at(begin)], begin, end


def _next_event(
    units: Mapping[str, int], samples_per_token: Fraction, left: Mapping[str, Fraction], start: int
) -> tuple[int, str | None]:
    """The first sample number at which a source's target reaches its limit, and the source; None where none does.

    samples_per_token: of a source whose units are 1; `left`: tokens to its limit.
    """
    found = [
        (start + int(max(Fraction(0), left[name]) * samples_per_token / unit), name)
        for name, unit in units.items()
        if name in left and unit
    ]
    return min(found) if found else (0, None)
