"""Training stages, resolved: from what the user wrote to whole batches, exact weights and sample numbers.

Resolution walks the stages in order, because what a source has left when a stage begins depends on the stages before
it. A stage that has already begun is resolved from what its ledger record froze (sizes, known sources, length), so
that a change of the past shows as a difference and a change of the future does not (law M5).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from megatron.config.schema import SourceSection, StageSection
from megatron.data.mixture import open_mixture
from megatron.data.stage_resolution import FrozenStage, SourceFacts, StageResolver
from megatron.data.weight_function import WeightFunction


@dataclass(frozen=True)
class TrainingStage:
    """One resolved training stage. Counts and tokens of sources are those of the whole stage, as planned."""

    index: int
    name: str
    start_step: int
    start_sample: int
    start_token: int
    samples: int
    seq_length: int
    global_batch_size: int
    weights: WeightFunction
    cursor: str
    facts: Mapping[str, SourceFacts]
    used_before: Mapping[str, int]
    counts: Mapping[str, int]
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.samples // self.global_batch_size

    @property
    def tokens(self) -> int:
        """Input positions."""
        return self.samples * self.seq_length

    @property
    def end_sample(self) -> int:
        """Global number of the first sample after the stage."""
        return self.start_sample + self.samples

    @property
    def end_step(self) -> int:
        """Number of steps done at the stage's end."""
        return self.start_step + self.steps

    def last_weights(self) -> dict[str, Fraction]:
        """The weight of each source as the stage ends."""
        return {name: self.weights.weight(name, self.samples) for name in self.weights.sources}

    def groups(self) -> dict[str, str]:
        """The group of every source."""
        return {name: facts.group for name, facts in self.facts.items()}


@dataclass(frozen=True)
class Schedule:
    """Every training stage of a run, one after the other."""

    stages: tuple[TrainingStage, ...]
    _ends: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", tuple(stage.end_sample for stage in self.stages))

    @property
    def samples(self) -> int:
        """Samples of the whole run."""
        return self._ends[-1]

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.stages[-1].end_step

    @property
    def tokens(self) -> int:
        """Input positions of the whole run."""
        return self.stages[-1].start_token + self.stages[-1].tokens

    def locate(self, consumed_samples: int) -> tuple[TrainingStage, int]:
        """The stage of the next sample, and how many of its samples are consumed. At the run's end: the last stage."""
        index = min(bisect_right(self._ends, consumed_samples), len(self.stages) - 1)
        stage = self.stages[index]
        return stage, consumed_samples - stage.start_sample


def facts_of(sources: Mapping[str, SourceSection], sizes: Mapping[str, int]) -> dict[str, SourceFacts]:
    """Facts by source name from the config and the measured sizes."""
    return {
        name: SourceFacts(section.group or name, sizes[name], section.max_epochs, section.dry)
        for name, section in sources.items()
    }


def resolve_schedule(
    sections: Sequence[StageSection],
    facts: Mapping[str, SourceFacts],
    *,
    seq_length: int,
    global_batch_size: int,
    run_tokens: int | None = None,
    begun: Sequence[FrozenStage] = (),
    taken: Mapping[int, Mapping[str, int]] | None = None,
) -> Schedule:
    """Every stage in order.

    Args:
        sections: `[[stages]]` as written.
        facts: every source of the config.
        seq_length, global_batch_size: for stages that do not say their own.
        run_tokens: `train.tokens`, for stages given as a share of the run.
        begun: frozen records of the stages that have begun, from a ledger.
        taken: by number of the stages yet to begin with `take.cursors`, tokens used of each source by that checkpoint.

    Raises ConfigError where a stage cannot be carried out as written.
    """
    stages: list[TrainingStage] = []
    used = dict.fromkeys(facts, 0)
    step = sample = token = 0
    for index, section in enumerate(sections):
        frozen = begun[index] if index < len(begun) else None
        if frozen is not None:
            used = {name: frozen.used.get(name, 0) for name in used}
        elif taken is not None:
            # What this run has trained on itself stays used, whatever the checkpoint knew of it.
            used |= {name: max(used[name], tokens) for name, tokens in taken.get(index, {}).items() if name in used}
        shape = section.seq_length or seq_length, section.global_batch_size or global_batch_size
        resolver = StageResolver(section, facts, *shape, used, stages[-1].last_weights() if stages else None, frozen)
        samples, weights = resolver.resolve(run_tokens)
        counts = _counts_at(weights, resolver.groups, samples)
        resolver.check_caps(counts)
        stage = TrainingStage(
            index=index,
            name=section.name,
            start_step=step,
            start_sample=sample,
            start_token=token,
            samples=samples,
            seq_length=resolver.seq_length,
            global_batch_size=resolver.batch,
            weights=weights,
            cursor=section.cursor,
            facts=resolver.facts,
            used_before=dict(used),
            counts=counts,
            notes=tuple(resolver.notes),
        )
        stages.append(stage)
        used = {name: tokens + counts.get(name, 0) * stage.seq_length for name, tokens in used.items()}
        step, sample, token = stage.end_step, stage.end_sample, token + stage.tokens
    return Schedule(tuple(stages))


def _counts_at(weights: WeightFunction, groups: Mapping[str, str], samples: int) -> dict[str, int]:
    stream = open_mixture(weights, groups, horizon=samples)
    stream.seek(samples)
    return dict(zip(weights.sources, stream.counts, strict=True))
