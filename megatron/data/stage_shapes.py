"""Sequence length and batch of a training stage, which may change within it (law M3: cursors go on exactly)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from megatron.config.errors import ConfigError
from megatron.config.quantities import Quantity, parse_quantity
from megatron.config.schema import BatchRampSection, ShapeSection, StageSection
from megatron.data.weight_function import WeightFunction


class ShapeStep(NamedTuple):
    """From sample `start` of the stage on: samples of `seq_length` tokens in batches of `global_batch_size`."""

    start: int
    seq_length: int
    global_batch_size: int

    @property
    def batch_tokens(self) -> int:
        """Input positions of an optimizer step."""
        return self.seq_length * self.global_batch_size


@dataclass(frozen=True)
class StageShapes:
    """The steps in order, the first from sample 0; the last holds for ever, so that a stage may be made longer.

    Every step but the last holds whole batches. Sample, token and step numbers are the stage's own.
    """

    steps: tuple[ShapeStep, ...]

    @staticmethod
    def constant(seq_length: int, global_batch_size: int) -> StageShapes:
        """One shape for the whole stage."""
        return StageShapes((ShapeStep(0, seq_length, global_batch_size),))

    @cached_property
    def _starts(self) -> list[int]:
        return [step.start for step in self.steps]

    @cached_property
    def _tokens_before(self) -> list[int]:
        lengths = [step.seq_length for step in self.steps]
        parts = [t * (b - a) for t, a, b in zip(lengths, self._starts, self._starts[1:], strict=False)]
        return list(accumulate(parts, initial=0))

    @cached_property
    def _batches_before(self) -> list[int]:
        batches = [step.global_batch_size for step in self.steps]
        parts = [(b - a) // size for size, a, b in zip(batches, self._starts, self._starts[1:], strict=False)]
        return list(accumulate(parts, initial=0))

    @property
    def longest_sequence(self) -> int:
        """The largest sequence length."""
        return max(step.seq_length for step in self.steps)

    @property
    def length_changes(self) -> int:
        """The sizes of all changes of the sequence length together: how far tokens may stray from what counts say."""
        return sum(abs(later.seq_length - step.seq_length) for step, later in pairwise(self.steps))

    @property
    def change_starts(self) -> tuple[int, ...]:
        """The sample numbers at which the sequence length changes."""
        return tuple(later.start for step, later in pairwise(self.steps) if step.seq_length != later.seq_length)

    def at(self, sample: int) -> ShapeStep:
        """The step that holds a sample number."""
        return self.steps[bisect_right(self._starts, sample) - 1]

    def end_of(self, step: ShapeStep) -> int | None:
        """The first sample after a step; None for the last."""
        index = self.steps.index(step) + 1
        return self.steps[index].start if index < len(self.steps) else None

    def tokens_at(self, samples: int) -> int:
        """Input positions of the first `samples` samples."""
        index = bisect_right(self._starts, samples) - 1
        step = self.steps[index]
        return self._tokens_before[index] + (samples - step.start) * step.seq_length

    def batches_at(self, samples: int) -> int:
        """Whole optimizer steps within the first `samples` samples."""
        index = bisect_right(self._starts, samples) - 1
        step = self.steps[index]
        return self._batches_before[index] + (samples - step.start) // step.global_batch_size

    def samples_at_batch(self, batches: int) -> int:
        """Samples of the first `batches` optimizer steps."""
        index = bisect_right(self._batches_before, batches) - 1
        step = self.steps[index]
        return step.start + (batches - self._batches_before[index]) * step.global_batch_size

    def tokens_of(self, quantity: Quantity, samples: int) -> Fraction:
        """An amount in the stage's own time as tokens; a share is one of its first `samples` samples' tokens."""
        if quantity.unit == "tokens":
            return Fraction(quantity.amount)
        if quantity.unit == "share":
            return Fraction(quantity.amount) * self.tokens_at(samples)
        amount = int(quantity.amount)
        return Fraction(self.tokens_at(self.samples_at_batch(amount) if quantity.unit == "steps" else amount))

    def target_tokens(self, weights: WeightFunction, source: str, samples: int) -> Fraction:
        """Tokens that a source should have of the first `samples` samples: the integral of its weight, in tokens."""
        borders = [*(step.start for step in self.steps if step.start < samples), samples]
        targets = [weights.target(source, border) for border in borders]
        pieces = zip(self.steps, targets, targets[1:], strict=False)
        return sum((step.seq_length * (end - begin) for step, begin, end in pieces), Fraction(0))

    def in_unit(self, unit: str, samples: int) -> int:
        """The first `samples` samples in tokens, steps or samples."""
        if unit == "tokens":
            return self.tokens_at(samples)
        return self.batches_at(samples) if unit == "steps" else samples

    def to_json(self) -> list[list[int]]:
        """Rows of start, sequence length and batch."""
        return [list(step) for step in self.steps]

    @staticmethod
    def from_json(rows: Sequence[Sequence[int]]) -> StageShapes:
        """The inverse of `to_json`."""
        return StageShapes(tuple(ShapeStep(*row) for row in rows))

    def __str__(self) -> str:
        words = [f"{step.global_batch_size} x {step.seq_length}" for step in self.steps]
        return ", ".join(
            word if step.start == 0 else f"from sample {step.start}: {word}"
            for word, step in zip(words, self.steps, strict=True)
        )


class _Part(NamedTuple):
    """A part as written: its length, none for the last, and its shape."""

    length: Quantity | None
    seq_length: int
    global_batch_size: int


def shape_words(section: StageSection, seq_length: int, batch: int) -> str:
    """What the ledger keeps of the words, to know whether they were changed after the stage began."""
    return repr([tuple(map(str, part)) for part in _parts(section, seq_length, batch)])


def lay_out(
    section: StageSection, seq_length: int, batch: int, asked: Quantity, where: str
) -> tuple[StageShapes, int, list[str]]:
    """The shapes of a stage, its samples, and notes on what was rounded.

    Args:
        section: the stage as written. seq_length, batch: its own, or the run's.
        asked: its length in tokens, steps or samples.

    Each part holds whole batches of its own, at least one, and ends as near as they allow to where it was asked to.
    Raises ConfigError.
    """
    parts = _parts(section, seq_length, batch)
    key = "shapes" if section.batch_ramp is None else "batch_ramp"
    steps: list[ShapeStep] = []
    left, start, owed = Fraction(asked.amount), 0, Fraction(0)
    for number, part in enumerate(parts):
        step = ShapeStep(start, part.seq_length, part.global_batch_size)
        each = _unit(asked.unit, step)
        wanted = left if part.length is None else _amount(part.length, asked, step) * each
        if part.length is not None and wanted <= 0:
            raise ConfigError(f"{where}: {key}: part {number} has the length 0: leave it out, or make it longer")
        owed += wanted
        batches = max(1, int(owed / each + Fraction(1, 2)))
        owed -= batches * each
        if part.length is not None and left - batches * each <= 0:
            raise ConfigError(
                f"{where}: {key}: the parts before the last are as long as the stage or longer, so that nothing is "
                "left for the last: shorten them, or give the stage more tokens, steps or samples"
            )
        if part.length is None:  # what was owed is part of what is left
            batches = max(1, int(left / each + Fraction(1, 2)))
        left -= batches * each
        steps.append(step)
        start += batches * step.global_batch_size
    shapes = StageShapes(tuple(steps))
    return shapes, start, [*_notes_on_ramp(section, shapes), *notes_on_length(asked, shapes, start)]


def nearest_length(shapes: StageShapes, asked: Quantity) -> int:
    """Samples of a stage with these shapes whose length is nearest to what is asked: whole batches, at least one."""
    left = Fraction(asked.amount)
    for step in shapes.steps:
        end, each = shapes.end_of(step), _unit(asked.unit, step)
        holds = None if end is None else (end - step.start) // step.global_batch_size * each
        if holds is None or left <= holds:
            batches = max(0 if step.start else 1, int(left / each + Fraction(1, 2)))
            return step.start + batches * step.global_batch_size
        left -= holds
    raise AssertionError("the last shape has no end")


def _notes_on_ramp(section: StageSection, shapes: StageShapes) -> list[str]:
    if section.batch_ramp is None:
        return []
    over = parse_quantity(section.batch_ramp.over)
    end, last = shapes.steps[-1].start, shapes.steps[-2]
    given = shapes.in_unit(over.unit, end) if over.unit != "share" else None
    if given is None or abs(given - over.amount) <= _unit(over.unit, last):
        return []
    return [
        f"batch_ramp: {float(over.amount):,.0f} {over.unit} asked, {given:,} given: every size has one batch at least"
    ]


def notes_on_length(asked: Quantity, shapes: StageShapes, samples: int) -> list[str]:
    given = shapes.in_unit(asked.unit, samples)
    if given == asked.amount:
        return []
    batches = shapes.batches_at(samples)
    return [f"{float(asked.amount):,.0f} {asked.unit} asked, {given:,} given: {batches:,} whole batches"]


def _unit(unit: str, step: ShapeStep) -> int:
    """One batch in the unit that the stage's length is given in."""
    return {"tokens": step.batch_tokens, "steps": 1, "samples": step.global_batch_size}[unit]


def _amount(length: Quantity, asked: Quantity, step: ShapeStep) -> Fraction:
    """A part's length in its own batches."""
    if length.unit == "share":
        return Fraction(length.amount) * Fraction(asked.amount) / _unit(asked.unit, step)
    return Fraction(length.amount) / _unit(length.unit, step)


def _parts(section: StageSection, seq_length: int, batch: int) -> list[_Part]:
    where = f"stage {section.name!r}"
    if section.shapes is not None and section.batch_ramp is not None:
        raise ConfigError(f"{where}: says both shapes and batch_ramp: give one")
    if section.batch_ramp is not None:
        return _batch_ramp(section.batch_ramp, seq_length, batch, where)
    if section.shapes is None:
        return [_Part(None, seq_length, batch)]
    return _written(section.shapes, seq_length, batch, where)


def _written(shapes: Sequence[ShapeSection], seq_length: int, batch: int, where: str) -> list[_Part]:
    if not shapes:
        raise ConfigError(f"{where}: shapes is empty: leave it out, or give at least one part")
    parts = []
    for number, shape in enumerate(shapes):
        last = number == len(shapes) - 1
        if (shape.length is None) != last:
            wrong = "the last of its shapes has a length" if last else f"shapes[{number}] has no length"
            raise ConfigError(f"{where}: {wrong}: every part but the last needs one, and the last takes what is left")
        length = None if shape.length is None else parse_quantity(shape.length)
        parts.append(_Part(length, shape.seq_length or seq_length, shape.global_batch_size or batch))
    return parts


def _batch_ramp(ramp: BatchRampSection, seq_length: int, batch: int, where: str) -> list[_Part]:
    steps, rest = divmod(batch - ramp.start, ramp.increment)
    if steps < 1 or rest:
        raise ConfigError(
            f"{where}: batch_ramp goes from {ramp.start} by {ramp.increment}, which does not lead to the stage's "
            f"global_batch_size of {batch}: choose start and increment so that start + k * increment = {batch}"
        )
    over = parse_quantity(ramp.over)
    each = Quantity(over.amount / Decimal(steps), over.unit)
    sizes = [_Part(each, seq_length, ramp.start + number * ramp.increment) for number in range(steps)]
    return [*sizes, _Part(None, seq_length, batch)]
