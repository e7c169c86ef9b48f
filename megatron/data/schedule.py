"""Training stages, resolved: from what the user wrote to whole batches, exact weights and sample numbers.

Resolution walks the stages in order, because what a source has left when a stage begins depends on the stages before
it. A stage that has already begun is resolved from what its ledger record froze (sizes, known sources, length), so
that a change of the past shows as a difference and a change of the future does not (law M5).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from megatron.config.schema import SourceSection, StageSection
from megatron.data.document_counts import DocumentCounts, PaddedEpoch
from megatron.data.document_stream import DocumentRule
from megatron.data.fim import FimRates, stage_rates
from megatron.data.mixture import open_mixture
from megatron.data.stage_mixture import MixtureReference
from megatron.data.stage_objective import LearnedSource, StageObjective
from megatron.data.stage_resolution import FrozenStage, ResolvedStage, SourceFacts, StageResolver
from megatron.data.stage_shapes import ShapeStep, StageShapes, shape_words
from megatron.data.weight_function import WeightFunction


@dataclass(frozen=True)
class TrainingStage:
    """One resolved training stage. Counts and tokens of sources are those of the whole stage, as planned.

    counts, source_tokens: samples and input positions of each source · used_before: tokens used of each before it ·
    fim: by source, fill-in-the-middle rates · shape_words: the shapes as they were written · documents: what a padded
    stage takes, None for a packed one, and padded: an epoch of each of its sources; source_tokens are then those of the
    sources' streams, what is skipped counted · objective: what the loss is on.
    """

    index: int
    name: str
    start_step: int
    start_sample: int
    start_token: int
    samples: int
    shapes: StageShapes
    shape_words: str
    weights: WeightFunction
    cursor: str
    facts: Mapping[str, SourceFacts]
    used_before: Mapping[str, int]
    counts: Mapping[str, int]
    source_tokens: Mapping[str, int]
    fim: Mapping[str, FimRates]
    notes: tuple[str, ...] = ()
    documents: DocumentRule | None = None
    padded: Mapping[str, PaddedEpoch] = field(default_factory=dict)
    objective: StageObjective = StageObjective()

    @property
    def seq_length(self) -> int:
        """Input positions of its first sample."""
        return self.shapes.steps[0].seq_length

    @property
    def global_batch_size(self) -> int:
        """Sequences of its first optimizer step."""
        return self.shapes.steps[0].global_batch_size

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.shapes.batches_at(self.samples)

    @property
    def tokens(self) -> int:
        """Input positions."""
        return self.shapes.tokens_at(self.samples)

    def shape_at(self, offset: int) -> ShapeStep:
        """Sequence length and batch of the stage's sample `offset`."""
        return self.shapes.at(offset)

    @property
    def end_sample(self) -> int:
        """Global number of the first sample after the stage."""
        return self.start_sample + self.samples

    @property
    def end_step(self) -> int:
        """Number of steps done at the stage's end."""
        return self.start_step + self.steps

    def input_tokens(self, source: str) -> int:
        """Input positions of a source that hold a token: all but the padding."""
        if source not in self.padded:
            return self.source_tokens.get(source, 0)
        epoch = self.padded[source]
        return self.counts.get(source, 0) * epoch.tokens // max(1, epoch.samples)

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
    run_tokens: int | None = None
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


def facts_of(
    sources: Mapping[str, SourceSection],
    sizes: Mapping[str, int],
    documents: Mapping[str, DocumentCounts] | None = None,
) -> dict[str, SourceFacts]:
    """Facts by source name from the config and the measured sizes; documents: for padded stages."""
    counts = documents or {}
    return {
        name: SourceFacts(section.group or name, sizes[name], section.max_epochs, section.dry, counts.get(name))
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
    templates: Sequence[StageSection] = (),
    fim: Mapping[str, FimRates] | None = None,
    sources: Mapping[str, LearnedSource] | None = None,
) -> Schedule:
    """Every stage in order.

    Args:
        sections: `[[stages]]` as written.
        facts: every source of the config.
        seq_length, global_batch_size: for stages that do not say their own.
        run_tokens: `train.tokens`, for stages given as a share of the run.
        begun: frozen records of the stages that have begun, from a ledger.
        taken: by number of the stages yet to begin with `take.cursors`, tokens used of each source by that checkpoint.
        templates: `[[templates]]`, which stages may refer to.
        fim: the sources' own fill-in-the-middle rates.
        sources: what instruction stages ask of loss masks; sources that are not there count as planned by size.

    Raises ConfigError where a stage cannot be carried out as written.
    """
    shape = seq_length, global_batch_size
    earlier: dict[str, MixtureReference] = {}
    references = References(templates, facts, shape, run_tokens, earlier, sources)
    for template in templates:
        references[template.name]  # one that is wrong is told, whether a stage refers to it or not
    stages: list[TrainingStage] = []
    used = dict.fromkeys(facts, 0)
    for index, section in enumerate(sections):
        frozen = begun[index] if index < len(begun) else None
        if frozen is not None:
            used = {name: frozen.used.get(name, 0) for name in used}
        elif taken is not None:
            # What this run has trained on itself stays used, whatever the checkpoint knew of it.
            used |= {name: max(used[name], tokens) for name, tokens in taken.get(index, {}).items() if name in used}
        before = stages[-1].last_weights() if stages else None
        # What a begun stage took from a template is what the template was then.
        known = references if frozen is None else references.as_of(frozen)
        resolver = StageResolver(section, facts, shape, used, before, frozen, known, sources=sources)
        resolved = resolver.resolve(run_tokens)
        stages.append(_stage(resolver, resolved, stages[-1] if stages else None, fim or {}))
        # What a finished stage took is past: where its length was edited, that is what a resume refuses.
        if frozen is None or not frozen.finished:
            resolver.check_caps(stages[-1].source_tokens, stages[-1].counts)
        earlier[section.name] = resolved.reference()
        used = {name: tokens + stages[-1].source_tokens.get(name, 0) for name, tokens in used.items()}
    return Schedule(tuple(stages), run_tokens)


class References(Mapping[str, MixtureReference]):
    """What a stage may refer to: the stages before it, and the templates, each resolved when it is first asked for.

    A template may refer to those before it. It is never trained, so that caps do not concern it. `[name]` raises
    ConfigError where a template is wrong.
    """

    def __init__(
        self,
        templates: Sequence[StageSection],
        facts: Mapping[str, SourceFacts],
        shape: tuple[int, int],
        run_tokens: int | None,
        stages: Mapping[str, MixtureReference],
        sources: Mapping[str, LearnedSource] | None = None,
    ) -> None:
        self._stages, self._sources = stages, sources
        self._templates = list(templates)
        self._facts = {name: replace(fact, dry="repeat") for name, fact in facts.items()}
        self._shape, self._run_tokens = shape, run_tokens
        self._resolved: dict[str, MixtureReference] = {}

    def as_of(self, frozen: FrozenStage) -> References:
        """The same for a stage that has begun: with the sizes that sources had then, and the run's length."""
        facts = {name: replace(fact, epoch_tokens=frozen.sizes.get(name, 0)) for name, fact in self._facts.items()}
        run_tokens = self._run_tokens if frozen.run_tokens is None else frozen.run_tokens
        return References(self._templates, facts, self._shape, run_tokens, self._stages, self._sources)

    def __getitem__(self, name: str) -> MixtureReference:
        if name in self._stages:
            return self._stages[name]
        if name not in self._resolved:
            place = next((n for n, template in enumerate(self._templates) if template.name == name), None)
            if place is None:
                raise KeyError(name)
            earlier, facts, shape = self._templates[:place], self._facts, self._shape
            before = References(earlier, facts, shape, self._run_tokens, {}, self._sources)
            unused, section = dict.fromkeys(facts, 0), self._templates[place]
            resolver = StageResolver(
                section, facts, shape, unused, references=before, kind="template", sources=self._sources
            )
            self._resolved[name] = resolver.resolve(self._run_tokens).reference()
        return self._resolved[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*(template.name for template in self._templates), *self._stages])

    def __len__(self) -> int:
        return len(self._templates) + len(self._stages)


def _stage(
    resolver: StageResolver, resolved: ResolvedStage, previous: TrainingStage | None, fim: Mapping[str, FimRates]
) -> TrainingStage:
    weights, shapes, samples = resolved.weights, resolved.shapes, resolved.samples
    counts, tokens = _planned_use(weights, resolver.groups, shapes, samples)
    section, padded = resolver.section, resolver.padded_of(weights.sources)
    tokens |= {name: epoch.stream_tokens(counts[name]) for name, epoch in padded.items()}
    rates = stage_rates(section.fim, fim, resolver.words, weights.sources)
    objective = resolver.objective.objective(weights.sources, rates)
    return TrainingStage(
        index=previous.index + 1 if previous else 0,
        name=section.name,
        start_step=previous.end_step if previous else 0,
        start_sample=previous.end_sample if previous else 0,
        start_token=previous.start_token + previous.tokens if previous else 0,
        samples=samples,
        shapes=shapes,
        shape_words=shape_words(section, *resolver.shape),
        weights=weights,
        cursor=section.cursor,
        facts=resolver.facts,
        used_before=dict(resolver.used),
        counts=counts,
        source_tokens=tokens,
        fim=rates,
        notes=tuple(resolver.notes),
        documents=resolver.rule,
        padded=padded,
        objective=objective,
    )


def _planned_use(
    weights: WeightFunction, groups: Mapping[str, str], shapes: StageShapes, samples: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Samples and tokens of each source over the whole stage."""
    stream = open_mixture(weights, groups, horizon=samples)
    tokens = dict.fromkeys(weights.sources, 0)
    before = [0] * len(weights.sources)
    for border in [*(start for start in shapes.change_starts if start < samples), samples]:
        length = shapes.at(stream.position).seq_length
        stream.seek(border)
        for name, then, now in zip(weights.sources, before, stream.counts, strict=True):
            tokens[name] += (now - then) * length
        before = stream.counts
    return dict(zip(weights.sources, before, strict=True)), tokens
