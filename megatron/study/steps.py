"""The steps of an arm, resolved: training stages and averages, each with the step that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from megatron.config.schema import RunConfig, StageSection
from megatron.data.ledger import Ledger, SourceRecord, SourceUse, StageRecord
from megatron.data.samples import record_of
from megatron.data.schedule import TrainingStage
from megatron.planner.resolve import ResolvedRun
from megatron.study.learned_weights import LearnedWeights
from megatron.study.overrides import Override


@dataclass(frozen=True, eq=False)
class TrainStep:
    """A training stage of an arm. config, run: of the whole arm that it was written in, `index` its place in them.

    library: its name in [stages.…] · arm: that wrote it · before: what it goes on from · learned: where its mixture is
    from · notes: what was done with it, in words · overrides: of the arm that wrote it.
    """

    label: str
    library: str
    arm: str
    config: RunConfig
    run: ResolvedRun
    index: int
    before: Step | None
    learned: LearnedWeights | None = None
    notes: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()

    @property
    def section(self) -> StageSection:
        """The stage as it was resolved from."""
        return self.config.stages[self.index]

    @property
    def stage(self) -> TrainingStage:
        """The stage as it is resolved."""
        return self.run.schedule.stages[self.index]


@dataclass(frozen=True, eq=False)
class AverageStep:
    """Averaged checkpoints: of several steps, or the newest `last` of one. weights: of each, summing to 1.

    every: of `last`, the steps between checkpoints.
    """

    label: str
    library: str
    arm: str
    members: tuple[Step, ...]
    weights: tuple[Fraction, ...]
    last: int = 0
    every: int = 0
    notes: tuple[str, ...] = field(default=())
    overrides: tuple[Override, ...] = ()

    @property
    def last_steps(self) -> tuple[int, ...]:
        """Of `last`: the steps, of the whole chain, whose checkpoints are averaged, the newest first. What a signal or
        save-now saves besides is none of them: members are the same however often a run was stopped."""
        if not self.last:
            return ()
        stage = trained(self.members[0])[-1].stage
        return regular_steps(stage.start_step, stage.end_step, self.every)[: self.last]


Step = TrainStep | AverageStep


@dataclass(frozen=True, eq=False)
class ResolvedArm:
    """An arm. steps: from the beginning, those of the trunk it branches from first."""

    name: str
    table: str
    experiment: str
    place: str
    steps: tuple[Step, ...]

    @property
    def end(self) -> Step:
        """What the arm ends with."""
        return self.steps[-1]


def parents(step: Step) -> tuple[Step, ...]:
    """What must be there before a step."""
    if isinstance(step, AverageStep):
        return step.members
    return (step.before,) if step.before is not None else ()


def trained(step: Step | None) -> list[TrainStep]:
    """The training stages that a step has behind it, from the first, itself included: the run whose data position it
    goes on from. That of an average is its first member's."""
    chain: list[TrainStep] = []
    while step is not None:
        if isinstance(step, AverageStep):
            step = step.members[0]
            continue
        chain.append(step)
        step = step.before
    return chain[::-1]


def regular_steps(start: int, end: int, every: int) -> tuple[int, ...]:
    """Steps at which a stage from after `start` to `end` saves by itself, the newest first."""
    return (end, *range((end - 1) // every * every, start, -every))


def naive_tokens(step: Step) -> int:
    """Tokens of training everything that a step needs for it alone: nothing is shared with anybody."""
    own = step.stage.tokens if isinstance(step, TrainStep) else 0
    return own + sum(naive_tokens(parent) for parent in parents(step))


def planned_ledger(chain: list[TrainStep]) -> Ledger | None:
    """The ledger that a run over these stages will have at its end: what a branch is checked against, before anything
    is trained. None for no stages."""
    if not chain:
        return None
    last = chain[-1]
    schedule, sources = last.run.schedule, last.run.sources
    ledger = Ledger(last.run.ledger.seed, last.run.ledger.tokenizer, last.run.ledger.validation)
    lifetime = dict.fromkeys(sources, 0)
    for stage, law in zip(schedule.stages[: last.index + 1], last.run.lr.laws, strict=False):
        ledger.stages.append(_record(stage, law.to_json(), schedule.run_tokens))
        for name, tokens in stage.source_tokens.items():
            lifetime[name] += tokens
    for number, record in enumerate(ledger.stages):
        if number in last.run.taken_cursors:
            record.taken["cursors"] = last.run.taken_cursors[number].order_hash
    for name, source in sources.items():
        ledger.sources[name] = SourceRecord(**source.identity(), lifetime_tokens=lifetime[name])
    return ledger


def _record(stage: TrainingStage, law: Mapping[str, object], run_tokens: int | None) -> StageRecord:
    """The record of a stage at its end."""
    record = record_of(stage, law, run_tokens)
    record.samples = stage.samples
    record.use = {
        name: SourceUse(samples=stage.counts.get(name, 0), tokens=stage.source_tokens.get(name, 0))
        for name in stage.weights.sources
    }
    return record
