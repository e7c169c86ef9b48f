"""One training stage, from its words to whole batches and exact weights. `schedule.py` puts the stages in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import ceil

from megatron.config.errors import ConfigError
from megatron.config.quantities import format_count
from megatron.config.schema import Mixture, StageSection
from megatron.data.dry_sources import solve_events
from megatron.data.mixture_words import MixtureWords
from megatron.data.weight_function import Segment, WeightFunction
from megatron.data.weights import DENOMINATOR, round_shares

Phases = Sequence[tuple[Fraction, Mapping[str, Fraction]]]


@dataclass(frozen=True)
class SourceFacts:
    """What the arithmetic knows of a source."""

    group: str
    epoch_tokens: int
    max_epochs: Decimal
    dry: str

    @property
    def cap_tokens(self) -> int:
        """Tokens that may be trained on over the whole run."""
        return int(Fraction(self.max_epochs) * self.epoch_tokens)


@dataclass(frozen=True)
class FrozenStage:
    """What a begun stage's ledger record fixes for its resolution.

    samples: its length by the last checkpoint · resolved_samples: the length that its weights were resolved for ·
    sizes, used: tokens of the sources known when it began, and how many of them were used by then · caps: max_epochs
    and dry policy when it began.
    """

    name: str
    samples: int
    resolved_samples: int
    finished: bool
    sizes: Mapping[str, int]
    used: Mapping[str, int]
    caps: Mapping[str, tuple[Decimal, str]]


class StageResolver:
    """Resolves one stage; gathers notes on what was rounded or normalised."""

    def __init__(
        self,
        section: StageSection,
        facts: Mapping[str, SourceFacts],
        seq_length: int,
        batch: int,
        used: Mapping[str, int],
        before: Mapping[str, Fraction] | None = None,
        frozen: FrozenStage | None = None,
    ) -> None:
        self.section = section
        self.facts = {name: _as_frozen(name, fact, frozen) for name, fact in facts.items()}
        self.sizes = {name: fact.epoch_tokens for name, fact in self.facts.items()}
        self.seq_length = seq_length
        self.batch = batch
        self.used = used
        self.before = before or {name: Fraction(size) for name, size in self.sizes.items()}
        self.frozen = frozen
        self.where = f"stage {section.name!r}"
        self.groups = {name: fact.group for name, fact in facts.items()}
        self.words = MixtureWords(self.groups, self.sizes, section.within, self.where)
        self.notes = [
            f"max_epochs and dry of {name} stay {self.facts[name].max_epochs} and {self.facts[name].dry} in this "
            "stage, which has begun"
            for name, fact in facts.items()
            if (self.facts[name].max_epochs, self.facts[name].dry) != (fact.max_epochs, fact.dry)
        ]

    def resolve(self, run_tokens: int | None) -> tuple[int, WeightFunction]:
        """Samples and weights of the stage."""
        phases = self._phases()
        frozen = self.frozen
        # A share of the run is a length only until the stage begins.
        fixed = frozen is not None and self.section.share is not None
        samples = frozen.samples if frozen is not None and fixed else self._length(phases, run_tokens)
        weights = self._weights(phases, frozen.resolved_samples if frozen is not None else samples)
        return samples, self._without_dry(weights, samples)

    # -- what the mixture says -------------------------------------------------------------------------------------

    def _phases(self) -> Phases:
        """(share of the stage, weights by source) of each phase; one phase unless the mixture is stepwise."""
        section = self.section
        given = [
            name
            for name in ("mixture", "mixture_tokens", "mixture_epochs", "adjust", "phases")
            if getattr(section, name) is not None
        ]
        if len(given) != 1:
            said = " and ".join(given) if given else "none of them"
            raise ConfigError(
                f"{self.where}: says {said}: give one of mixture, mixture_tokens, mixture_epochs, adjust or phases"
            )
        if section.ramp_to is not None and section.mixture is None:
            raise ConfigError(f"{self.where}: ramp_to goes with mixture, which is missing")
        if section.phases is not None:
            return self._stepwise()
        if section.mixture_epochs is not None:
            tokens = {name: Fraction(count) * self.words.size(name) for name, count in section.mixture_epochs.items()}
            return [(Fraction(1), self.words.flat(tokens))]
        if section.adjust is not None:
            shares = {name: Fraction(share) for name, share in section.adjust.items()}
            return [(Fraction(1), self.words.adjusted(shares, self.before))]
        written = section.mixture if section.mixture is not None else section.mixture_tokens
        assert written is not None
        if section.mixture is not None:
            self._check_sum(section.mixture)
        return [(Fraction(1), self._flat(written))]

    def _stepwise(self) -> Phases:
        phases = self.section.phases or []
        said = [phase.share for phase in phases if phase.share is not None]
        if not phases or (said and len(said) != len(phases)):
            raise ConfigError(f"{self.where}: phases: give every phase a share, or none for equal parts")
        if said and sum(said) != 1:
            raise ConfigError(f"{self.where}: the shares of its phases sum to {sum(said)}, not to 1")
        result = []
        for phase in phases:
            share = Fraction(phase.share) if phase.share is not None else Fraction(1, len(phases))
            self._check_sum(phase.mixture)
            result.append((share, self._flat(phase.mixture)))
        return result

    def _flat(self, weights: Mapping[str, Decimal | int]) -> dict[str, Fraction]:
        return self.words.flat({name: Fraction(weight) for name, weight in weights.items()})

    def _check_sum(self, mixture: Mixture) -> None:
        total = sum(mixture.values())
        if total == 1 or total == 0:
            return
        if self.section.strict:
            raise ConfigError(f"{self.where}: strict is set and the weights sum to {total}, not to 1")
        self.notes.append(f"weights sum to {total}: normalised")

    # -- how long it is --------------------------------------------------------------------------------------------

    def _length(self, phases: Phases, run_tokens: int | None) -> int:
        """Samples of the stage: the nearest whole number of global batches, at least one."""
        tokens = self._asked_tokens(phases, run_tokens)
        if tokens <= 0:
            raise ConfigError(
                f"{self.where}: its length is 0: give it tokens, steps, samples, a share or epochs above 0"
            )
        batch_tokens = self.batch * self.seq_length
        batches = max(1, int(tokens / batch_tokens + Fraction(1, 2)))
        if batches * batch_tokens != tokens:
            self.notes.append(
                f"{float(tokens):,.0f} tokens asked, {batches * batch_tokens:,} given: {batches:,} whole batches"
            )
        return batches * self.batch

    def _asked_tokens(self, phases: Phases, run_tokens: int | None) -> Fraction:
        section = self.section
        given = [n for n in ("tokens", "steps", "samples", "share", "epochs") if getattr(section, n) is not None]
        absolute = section.mixture_tokens is not None or section.mixture_epochs is not None
        if len(given) > 1 or (not given and not absolute):
            said = " and ".join(given) if given else "nothing"
            raise ConfigError(
                f"{self.where}: says {said} of its length: give one of tokens, steps, samples, share, epochs"
            )
        if not given:
            return sum(phases[0][1].values(), Fraction(0))
        if section.tokens is not None:
            return Fraction(section.tokens)
        if section.steps is not None:
            return Fraction(section.steps * self.batch * self.seq_length)
        if section.samples is not None:
            return Fraction(section.samples * self.seq_length)
        if section.share is not None:
            if run_tokens is None:
                raise ConfigError(f"{self.where}: its length is a share of the run: set train.tokens")
            return Fraction(section.share) * run_tokens
        return self._tokens_for_epochs(phases)

    def _tokens_for_epochs(self, phases: Phases) -> Fraction:
        asked = self.section.epochs
        assert asked is not None
        if asked.source not in self.sizes:
            raise ConfigError(f"{self.where}: epochs names {asked.source!r}, which is not a source")
        part = sum(
            (share * weights.get(asked.source, Fraction(0)) / sum(weights.values()) for share, weights in phases),
            Fraction(0),
        )
        if self.section.ramp_to is not None:
            end = self._flat(self.section.ramp_to)
            part = (part + end.get(asked.source, Fraction(0)) / sum(end.values())) / 2
        if part == 0:
            raise ConfigError(f"{self.where}: epochs counts {asked.source!r}, whose weight in the stage is zero")
        return Fraction(asked.count) * self.sizes[asked.source] / part

    # -- exact weights ---------------------------------------------------------------------------------------------

    def _weights(self, phases: Phases, samples: int) -> WeightFunction:
        absolute = self.section.mixture_tokens is not None or self.section.mixture_epochs is not None
        # A length in epochs is met to the sample, however long it is.
        denominator = samples if absolute else max(samples if self.section.epochs else 1, DENOMINATOR)
        try:
            rounded = [round_shares(weights, denominator) for _, weights in phases]
            if self.section.ramp_to is not None:
                self._check_sum(self.section.ramp_to)
                end = self._flat(self.section.ramp_to)
                return WeightFunction.make([Segment(0, rounded[0], samples, round_shares(end, denominator))])
        except ValueError as error:
            raise ConfigError(f"{self.where}: {error}") from None
        segments: list[Segment] = []
        begin = Fraction(0)
        for (share, _), units in zip(phases, rounded, strict=True):
            start = int(begin * samples + Fraction(1, 2))
            if segments and start <= segments[-1].start:
                raise ConfigError(f"{self.where}: a phase is shorter than one of its {samples} samples")
            segments.append(Segment(start, units))
            begin += share
        return WeightFunction.make(segments)

    def _without_dry(self, weights: WeightFunction, samples: int) -> WeightFunction:
        """The weights with sources that run dry under `renormalise` taken out from where they do."""
        room = {
            name: max(0, self.facts[name].cap_tokens - self.used[name]) // self.seq_length
            for name in weights.sources
            if self.facts[name].dry == "renormalise"
        }
        if not room:
            return weights
        solved, events = solve_events(weights, room, samples, self.where)
        self.notes += [
            f"{name} runs dry at sample {at} of the stage: the others share its weight" for name, at in events
        ]
        return solved

    def check_caps(self, counts: Mapping[str, int]) -> None:
        """Refuses a stage that needs more of a source than its cap allows, where the source says dry = "error"."""
        for name, count in counts.items():
            fact = self.facts[name]
            need = self.used[name] + count * self.seq_length
            if fact.dry != "error" or need <= fact.cap_tokens:
                continue
            epochs = Fraction(need, max(1, fact.epoch_tokens))
            remedy = Decimal(ceil(epochs * 100)) / 100
            raise ConfigError(
                f"{self.where}: source {name!r} runs dry: {format_count(need)} tokens of it are needed by the "
                f"stage's end, that is {float(epochs):.2f} epochs of {format_count(fact.epoch_tokens)} tokens, and "
                f"max_epochs is {fact.max_epochs}. Set sources.{name}.max_epochs = {remedy}, or sources.{name}.dry to "
                f'"repeat" or "renormalise", or give it less weight'
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
    return SourceFacts(fact.group, frozen.sizes.get(name, 0), max_epochs, dry)
