"""Places of a run in samples, tokens and steps, and where a source's use passes an amount.

Sequence lengths and batches may change within a training stage (`megatron.data.stage_shapes`); the plan, its drawings
and `inspect_data` ask here, and nowhere multiply samples by a length.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from megatron.data.schedule import Schedule, TrainingStage


class Stretch(NamedTuple):
    """Samples start … end − 1 of a training stage, which have one sequence length and one global batch."""

    start: int
    end: int
    seq_length: int
    global_batch_size: int


class Place(NamedTuple):
    """A place of a run: the training stage's number and the samples of it that are consumed there."""

    stage: int
    offset: int


def stretches(stage: TrainingStage) -> list[Stretch]:
    """The stage in parts of one shape, in order, without gaps."""
    steps = [step for step in stage.shapes.steps if step.start < stage.samples]
    ends = [*(step.start for step in steps[1:]), stage.samples]
    return [Stretch(step.start, end, *step[1:]) for step, end in zip(steps, ends, strict=True)]


def tokens_at(stage: TrainingStage, sample_offset: int) -> int:
    """Tokens from the stage's first to the end of its first `sample_offset` samples."""
    return stage.shapes.tokens_at(sample_offset)


def steps_at(stage: TrainingStage, sample_offset: int) -> int:
    """Optimizer steps that the stage's first `sample_offset` samples complete."""
    return stage.shapes.batches_at(sample_offset)


def samples_after_steps(stage: TrainingStage, steps: int) -> int:
    """Samples that the stage's first `steps` optimizer steps consume; all of them where it has fewer steps."""
    return min(stage.samples, stage.shapes.samples_at_batch(steps))


def batch_start(stage: TrainingStage, sample_offset: int) -> int:
    """The first sample of the global batch that holds a sample of the stage."""
    shape = stage.shape_at(sample_offset)
    return sample_offset - (sample_offset - shape.start) % shape.global_batch_size


def samples_at(stage: TrainingStage, tokens: int) -> int:
    """The fewest samples of the stage that hold `tokens` tokens; all of them where it has fewer."""
    return first_offset(stage.samples, lambda offset: tokens_at(stage, offset) >= tokens)


def stage_of_step(schedule: Schedule, step: int) -> TrainingStage:
    """The stage that does a step, counted from 0 over the run; the last one at the run's end."""
    return next((stage for stage in schedule.stages if step < stage.end_step), schedule.stages[-1])


def stage_of_token(schedule: Schedule, token: int) -> TrainingStage:
    """The stage that trains on a token, counted from 0 over the run; the last one at the run's end."""
    stages = schedule.stages
    return next((s for s in stages if token < s.start_token + tokens_at(s, s.samples)), stages[-1])


def source_tokens_at(stage: TrainingStage, source: str, sample_offset: int) -> Fraction:
    """Tokens of a source that the stage's first `sample_offset` samples should have: the integral of its weight. Of a
    padded stage, their input positions."""
    return stage.shapes.target_tokens(stage.weights, source, sample_offset)


def sample_tokens(stage: TrainingStage, source: str, seq_length: int) -> Fraction:
    """Tokens of its source's stream that a sample moves it by; of a padded stage, on average over an epoch."""
    epoch = stage.padded.get(source)
    return Fraction(seq_length) if epoch is None else Fraction(epoch.epoch_tokens, max(1, epoch.samples))


def stream_tokens_at(stage: TrainingStage, source: str, sample_offset: int) -> Fraction:
    """Tokens of a source's stream by which the stage's first `sample_offset` samples should move it."""
    tokens = source_tokens_at(stage, source, sample_offset)
    return tokens / stage.seq_length * sample_tokens(stage, source, stage.seq_length) if stage.padded else tokens


def used_at(stage: TrainingStage, source: str, sample_offset: int) -> Fraction:
    """Lifetime tokens of a source when the stage has given `sample_offset` samples, as planned."""
    return stage.used_before.get(source, 0) + stream_tokens_at(stage, source, sample_offset)


def where_use_passes(schedule: Schedule, source: str, tokens: int) -> Place | None:
    """The first place where more than `tokens` tokens of a source are used over its lifetime.

    None where that is never so, or was so before the run's first sample.
    """
    for stage in schedule.stages:
        if used_at(stage, source, 0) <= tokens < used_at(stage, source, stage.samples):
            return Place(stage.index, _passes_at(stage, source, tokens))
    return None


def _passes_at(stage: TrainingStage, source: str, tokens: int) -> int:
    return first_offset(stage.samples, lambda offset: used_at(stage, source, offset) > tokens)


def place_row(schedule: Schedule, place: Place) -> dict[str, int | str]:
    """A place in words and numbers: "stage", "sample", "token" and "step", of the whole run."""
    stage = schedule.stages[place.stage]
    return {
        "stage": stage.name,
        "sample": stage.start_sample + place.offset,
        "token": stage.start_token + tokens_at(stage, place.offset),
        "step": stage.start_step + steps_at(stage, place.offset),
    }


def first_offset(most: int, holds: Callable[[int], bool]) -> int:
    """The smallest number in 0 … most that holds, of a condition that once true stays true; `most` where none does."""
    low, high = -1, most
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high
