"""One training stage, from its words to whole batches and exact weights. `schedule.py` puts the stages in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from math import ceil

from megatron.config.errors import ConfigError
from megatron.config.quantities import Quantity, format_count
from megatron.config.schema import StageSection
from megatron.data.document_counts import DocumentCounts, PaddedEpoch, PaddedEpochs, PaddedSizes, padded_rule
from megatron.data.dry_sources import solve_events
from megatron.data.mixture_profile import MixtureProfile, Weights
from megatron.data.mixture_words import MixtureWords
from megatron.data.stage_mixture import MixtureReference, StageMixture, weighted_names
from megatron.data.stage_objective import LearnedSource, ObjectiveWords, StageObjective
from megatron.data.stage_shapes import StageShapes, lay_out, nearest_length, notes_on_length, shape_words
from megatron.data.weight_function import Segment, WeightFunction
from megatron.data.weights import DENOMINATOR, round_shares


@dataclass(frozen=True)
class SourceFacts:
    """What the arithmetic knows of a source. documents: how many samples it gives in padded stages."""

    group: str
    epoch_tokens: int
    max_epochs: Decimal
    dry: str
    documents: DocumentCounts | None = field(default=None, compare=False)

    @property
    def cap_tokens(self) -> int:
        """Tokens that may be trained on over the whole run."""
        return int(Fraction(self.max_epochs) * self.epoch_tokens)


@dataclass(frozen=True)
class FrozenStage:
    """What a begun stage's ledger record fixes for its resolution.

    samples: its length by the last checkpoint · resolved_samples: the length that its weights were resolved for ·
    sizes, used: tokens of the sources known when it began, and how many of them were used by then · caps: max_epochs
    and dry policy when it began · shapes, shape_words: its shapes as resolved when it began, and the words for them ·
    run_tokens: `train.tokens` then, of which lengths are shares · padded: of a padded stage, an epoch of each source ·
    objective: what the loss was on.
    """

    name: str
    samples: int
    resolved_samples: int
    finished: bool
    sizes: Mapping[str, int]
    used: Mapping[str, int]
    caps: Mapping[str, tuple[Decimal, str]]
    shapes: StageShapes
    shape_words: str
    run_tokens: int | None
    padded: Mapping[str, PaddedEpoch] = field(default_factory=dict)
    objective: StageObjective = StageObjective()


@dataclass(frozen=True)
class ResolvedStage:
    """Length, shapes and exact weights of a stage; `profile` is its mixture before sources run dry."""

    samples: int
    shapes: StageShapes
    weights: WeightFunction
    profile: MixtureProfile

    def reference(self) -> MixtureReference:
        """What other stages may refer to."""
        tokens = {name: self.shapes.target_tokens(self.weights, name, self.samples) for name in self.weights.sources}
        return MixtureReference(self.profile, tokens)


class StageResolver:
    """Resolves one stage; gathers notes on what was rounded or normalised.

    shape: sequence length and batch of the run, for a stage that says neither · used: tokens of each source used
    before it · before: weights as the stage before it ends · references: what it may refer to, by name ·
    sources: what is known of their loss masks.
    """

    def __init__(
        self,
        section: StageSection,
        facts: Mapping[str, SourceFacts],
        shape: tuple[int, int],
        used: Mapping[str, int],
        before: Weights | None = None,
        frozen: FrozenStage | None = None,
        references: Mapping[str, MixtureReference] | None = None,
        kind: str = "stage",
        sources: Mapping[str, LearnedSource] | None = None,
    ) -> None:
        self.section = section
        self.facts = {name: _as_frozen(name, fact, frozen) for name, fact in facts.items()}
        self.shape = section.seq_length or shape[0], section.global_batch_size or shape[1]
        self.used = used
        self.frozen = frozen
        self.where = f"{kind} {section.name!r}"
        self.rule = padded_rule(section, self.shape[0], self.where)
        self.sizes: Mapping[str, int] = {name: fact.epoch_tokens for name, fact in self.facts.items()}
        if self.rule is not None:
            documents = {name: fact.documents for name, fact in facts.items()}
            self.padded = PaddedEpochs(
                self.rule, documents, self.where, (frozen.padded or None) if frozen is not None else None
            )
            self.sizes = PaddedSizes(self.padded, self.rule.seq_length)
        self.groups = {name: fact.group for name, fact in facts.items()}
        self.notes = [
            f"max_epochs and dry of {name} stay {self.facts[name].max_epochs} and {self.facts[name].dry} in this "
            "stage, which has begun"
            for name, fact in facts.items()
            if (self.facts[name].max_epochs, self.facts[name].dry) != (fact.max_epochs, fact.dry)
        ]
        then = frozen.objective if frozen is not None else None
        self.objective = ObjectiveWords(
            section, self.groups, self.sizes, sources or {}, self.rule, then, self.where, self.notes
        )
        self.words = MixtureWords(self.groups, self.objective.sizes(), section.within, self.where)
        if not before:  # only where it is asked for: sizes of a padded stage are measured
            before = {name: Fraction(size) for name, size in self.sizes.items()} if section.adjust else {}
        self.mixture = StageMixture(section, self.words, before, references or {}, self.notes, self.where)

    def resolve(self, run_tokens: int | None) -> ResolvedStage:
        """Length, shapes and weights. Raises ConfigError."""
        profile = self.objective.in_samples(self.mixture.profile())
        shapes, samples = self._length(profile, run_tokens)
        frozen = self.frozen
        self._note_amounts(shapes.tokens_at(samples))
        for group in sorted(set(self.section.within) - weighted_names(self.section)):
            self.notes.append(f"within.{group} changes nothing: the stage gives that group no weight")
        weights = self._weights(profile, frozen.resolved_samples if frozen is not None else samples)
        return ResolvedStage(samples, shapes, self._without_dry(weights, shapes, samples), profile)

    def _note_amounts(self, tokens: int) -> None:
        """Says where amounts of tokens are not what the stage's own length leaves room for, beyond its rounding."""
        amounts = self.section.mixture_tokens
        asked = sum(amounts.values()) if amounts is not None else tokens
        if abs(asked - tokens) * 1000 > tokens:
            self.notes.append(
                f"mixture_tokens come to {asked:,}, and the stage is {tokens:,} by a length of its own: they are taken "
                "as shares. Leave the length out, or say mixture"
            )

    # -- padded: a source's size is what its documents fill, a sample each --------------------------------------------

    def padded_of(self, sources: Iterable[str]) -> dict[str, PaddedEpoch]:
        """Of a padded stage, an epoch of each of its sources. Raises where one of them may not be read so."""
        if self.rule is None:
            return {}
        self.padded.check(sources)
        found = {name: self.padded[name] for name in sources}
        words = "; ".join(f"{name} {epoch.words(self.rule)}" for name, epoch in found.items())
        self.notes.append(f"padded, a document a sample: {words}")
        return found

    def _room(self, name: str) -> Fraction:
        """Input positions that the cap of a source leaves for the stage."""
        fact = self.facts[name]
        if self.rule is None:
            return Fraction(fact.cap_tokens - self.used[name])
        return (Fraction(fact.max_epochs) - Fraction(self.used[name], max(1, fact.epoch_tokens))) * self.sizes[name]

    # -- how long it is --------------------------------------------------------------------------------------------

    def _length(self, profile: MixtureProfile, run_tokens: int | None) -> tuple[StageShapes, int]:
        """Its shapes and samples: whole global batches, at least one."""
        frozen = self.frozen
        if frozen is None or frozen.shape_words != shape_words(self.section, *self.shape):
            asked = self._asked(profile, run_tokens)
            shapes, samples, notes = lay_out(self.section, *self.shape, asked, self.where)
        else:
            # What is a share of the run stays one of the run as it was then.
            asked = self._asked(profile, run_tokens if frozen.run_tokens is None else frozen.run_tokens)
            shapes, samples, notes = self._length_of_begun(frozen, asked)
        self.notes += notes
        return shapes, samples

    def _length_of_begun(self, frozen: FrozenStage, asked: Quantity) -> tuple[StageShapes, int, list[str]]:
        """The shapes stay where they were; the stage may end later, or earlier, also in one before the last."""
        try:
            shapes, samples, notes = lay_out(self.section, *self.shape, asked, self.where)
        except ConfigError:  # it is shorter now than its shapes before the last
            shapes = None
        if shapes != frozen.shapes:
            samples = nearest_length(frozen.shapes, asked)
            notes = notes_on_length(asked, frozen.shapes, samples)
        return frozen.shapes, samples, notes

    def _asked(self, profile: MixtureProfile, run_tokens: int | None) -> Quantity:
        section = self.section
        given = [n for n in ("tokens", "steps", "samples", "share", "epochs") if getattr(section, n) is not None]
        if len(given) > 1 or (not given and not self.mixture.is_absolute):
            said = " and ".join(given) if given else "nothing"
            raise ConfigError(
                f"{self.where}: says {said} of its length: give one of tokens, steps, samples, share, epochs"
            )
        if section.steps is not None:
            asked = Quantity(Decimal(section.steps), "steps")
        elif section.samples is not None:
            asked = Quantity(Decimal(section.samples), "samples")
        else:
            asked = Quantity(Decimal(round(self._asked_tokens(profile, run_tokens))), "tokens")
        if asked.amount <= 0:
            raise ConfigError(
                f"{self.where}: its length is 0: give it tokens, steps, samples, a share or epochs above 0"
            )
        return asked

    def _asked_tokens(self, profile: MixtureProfile, run_tokens: int | None) -> Fraction:
        section = self.section
        if section.tokens is not None:
            return Fraction(section.tokens)
        if section.share is not None:
            if run_tokens is None:
                raise ConfigError(f"{self.where}: its length is a share of the run: set train.tokens")
            return Fraction(section.share) * run_tokens
        if section.epochs is None:
            return sum(self.mixture.amounts().values(), Fraction(0))
        source = section.epochs.source
        if source not in self.sizes:
            raise ConfigError(f"{self.where}: epochs names {source!r}, which is not a source")
        lengths = {shape.seq_length or self.shape[0] for shape in section.shapes or []}
        if len(lengths) > 1 and len(profile.parts) + profile.parts[0].is_ramp > 1:
            raise ConfigError(
                f"{self.where}: epochs cannot be solved where both the mixture and the sequence length change within "
                "the stage: give it tokens, steps or samples"
            )
        part = profile.mean().get(source, Fraction(0))
        if part == 0:
            raise ConfigError(f"{self.where}: epochs counts {source!r}, whose weight in the stage is zero")
        return Fraction(section.epochs.count) * self.sizes[source] / part

    # -- exact weights ---------------------------------------------------------------------------------------------

    def _weights(self, profile: MixtureProfile, samples: int) -> WeightFunction:
        # A length in epochs is met to the sample, however long it is.
        denominator = samples if self.mixture.is_absolute else max(samples if self.section.epochs else 1, DENOMINATOR)
        starts = [0, *(int(border * samples + Fraction(1, 2)) for border in profile.borders())]
        segments: list[Segment] = []
        for part, start, end in zip(profile.parts, starts, starts[1:], strict=False):
            if end <= start:
                raise ConfigError(f"{self.where}: a phase is shorter than one of its {samples} samples")
            try:
                first = round_shares(part.first, denominator)
                last = round_shares(part.last, denominator) if part.is_ramp else None
            except ValueError as error:
                raise ConfigError(f"{self.where}: {error}") from None
            segments.append(Segment(start, first, end if last is not None else None, last))
        return WeightFunction.make(segments)

    def _without_dry(self, weights: WeightFunction, shapes: StageShapes, samples: int) -> WeightFunction:
        """The weights with sources that run dry under `renormalise` taken out from where they do."""
        room = {
            name: max(0, int(self._room(name))) for name in weights.sources if self.facts[name].dry == "renormalise"
        }
        if not room:
            return weights
        solved, events = solve_events(weights, room, samples, shapes, self.where)
        self.notes += [
            f"{name} runs dry at sample {at} of the stage: the others share its weight" for name, at in events
        ]
        return solved

    def check_caps(self, tokens: Mapping[str, int], counts: Mapping[str, int]) -> None:
        """Refuses a stage that needs more of a source than its cap allows, where the source says dry = "error".

        tokens: of the source's stream, counts: samples, that the stage takes of each.
        """
        if self.rule is not None:
            self._check_document_caps(counts)
            return
        for name, needed in tokens.items():
            fact = self.facts[name]
            need = self.used[name] + needed
            if fact.dry != "error" or need <= fact.cap_tokens:
                continue
            epochs = Fraction(need, max(1, fact.epoch_tokens))
            remedy = Decimal(ceil(epochs * 100)) / 100
            excess = need - fact.cap_tokens
            little = f" ({excess:,} tokens too many)" if excess * 100 < need else ""
            raise ConfigError(
                f"{self.where}: source {name!r} runs dry: {format_count(need)} tokens of it are needed by the "
                f"stage's end, that is {float(epochs):.2f} epochs of {format_count(fact.epoch_tokens)} tokens, and "
                f"max_epochs is {fact.max_epochs}{little}. Set sources.{name}.max_epochs = {remedy}, or "
                f'sources.{name}.dry to "repeat" or "renormalise", or give it less weight'
            )

    def _check_document_caps(self, counts: Mapping[str, int]) -> None:
        assert self.rule is not None
        for name, needed in counts.items():
            fact, epoch = self.facts[name], self.padded[name]
            left = self._room(name) / self.rule.seq_length
            if fact.dry != "error" or needed <= left:
                continue
            epochs = Fraction(self.used[name], max(1, fact.epoch_tokens)) + Fraction(needed, epoch.samples)
            remedy = Decimal(ceil(epochs * 100)) / 100
            raise ConfigError(
                f"{self.where}: source {name!r} runs dry: the stage takes {needed:,} documents of it, a sample each, "
                f"that is {float(epochs):.2f} epochs of {epoch.samples:,} by its end, and max_epochs is "
                f"{fact.max_epochs}, which leaves {max(0, int(left)):,} (a stage is whole batches). Set "
                f"sources.{name}.max_epochs = {remedy}, or "
                f'sources.{name}.dry to "repeat" or "renormalise", or give it less weight'
            )


def _as_frozen(name: str, fact: SourceFacts, frozen: FrozenStage | None) -> SourceFacts:
    if frozen is None:
        return fact
    max_epochs, dry = frozen.caps.get(name, (fact.max_epochs, fact.dry))
    # Where a source leaves under `renormalise` is part of the stage's weights, so an edited cap speaks of later stages.
    # Other caps are only checks, and a running stage that is made longer may need another.
    if not frozen.finished and "renormalise" not in (dry, fact.dry):
        max_epochs, dry = fact.max_epochs, fact.dry
    # A source that joined a group later has no part in a stage that had begun before: it has no size there.
    return replace(fact, epoch_tokens=frozen.sizes.get(name, 0), max_epochs=max_epochs, dry=dry)
