"""A training stage's mixture, from what is written to a profile over its time, whichever of the ten ways it is said."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from megatron.config.errors import ConfigError
from megatron.config.schema import BlendSection, Mixture, PhaseSection, StageSection
from megatron.data.mixture_profile import MixtureProfile, ProfilePart, Weights, blend_of
from megatron.data.mixture_words import MixtureWords

WAYS = (
    "mixture", "mixture_tokens", "mixture_epochs", "adjust", "phases", "like", "reverse", "aggregate_of", "blend",
)  # fmt: skip


def weighted_names(section: StageSection) -> set[str]:
    """The sources and groups that a stage itself gives a weight or an amount above zero."""
    tables: list[Mapping[str, Decimal | int] | None] = [
        section.mixture, section.mixture_tokens, section.mixture_epochs, section.adjust, section.ramp_to,
    ]  # fmt: skip
    tables += [phase.mixture for phase in section.phases or []] + [phase.ramp_to for phase in section.phases or []]
    tables += [part.mixture for part in section.blend or []]
    return {name for table in tables if table for name, weight in table.items() if weight}


@dataclass(frozen=True)
class MixtureReference:
    """What other stages may take of a stage or template: its mixture over time, and its tokens of each source."""

    profile: MixtureProfile
    tokens: Weights


class StageMixture:
    """Reads the mixture of one stage.

    words: names to sources · before: the weights as the stage before it ends, for `adjust` · references: by name, the
    stages and templates that it may refer to · notes: receives what was normalised · where: the stage, for messages.
    """

    def __init__(
        self,
        section: StageSection,
        words: MixtureWords,
        before: Weights,
        references: Mapping[str, MixtureReference],
        notes: list[str],
        where: str,
    ) -> None:
        self._section = section
        self._words = words
        self._before = before
        self._references = references
        self._notes = notes
        self._where = where

    @property
    def is_absolute(self) -> bool:
        """Whether its totals are met to the sample: amounts, and not only shares, were given."""
        section = self._section
        return any(way is not None for way in (section.mixture_tokens, section.mixture_epochs, section.aggregate_of))

    def profile(self) -> MixtureProfile:
        """The mixture over the stage's time. Raises ConfigError where it is said in no way, two ways, or wrongly."""
        section = self._section
        given = self._given()
        if section.ramp_to is not None and given != "mixture":
            raise ConfigError(f"{self._where}: ramp_to goes with mixture, which is missing")
        if section.phases is not None:
            return self._stepwise(section.phases)
        if section.blend is not None:
            return self._blend(section.blend)
        if section.reverse is not None:
            return self._reference(section.reverse, "reverse").profile.reversed()
        if section.adjust is not None:
            shares = {name: Fraction(share) for name, share in section.adjust.items()}
            return MixtureProfile.constant(self._words.adjusted(shares, self._adjusted_from()))
        if section.like is not None:
            return self._reference(section.like, "like").profile
        if section.mixture is not None:
            return self._written(section.mixture, section.ramp_to)
        return MixtureProfile.constant(self.amounts())

    def amounts(self) -> dict[str, Fraction]:
        """Tokens of each source, for the ways that give amounts."""
        section = self._section
        if section.mixture_tokens is not None:
            return self._flat(section.mixture_tokens)
        if section.mixture_epochs is not None:
            tokens = {name: Fraction(count) * self._words.size(name) for name, count in section.mixture_epochs.items()}
            return self._words.flat(tokens)
        assert section.aggregate_of is not None
        if not section.aggregate_of:
            raise ConfigError(f"{self._where}: aggregate_of is empty: name at least one stage or template")
        total: dict[str, Fraction] = {}
        for name in section.aggregate_of:
            for source, amount in self._reference(name, "aggregate_of").tokens.items():
                total[source] = total.get(source, Fraction(0)) + amount
        return total

    def _given(self) -> str:
        section = self._section
        given = [way for way in WAYS if getattr(section, way) is not None]
        if given == ["adjust", "like"]:  # the shares of another stage, with some of them set
            return "adjust"
        if len(given) != 1:
            said = " and ".join(given) if given else "none of them"
            raise ConfigError(f"{self._where}: says {said}: give one of {', '.join(WAYS[:-1])} or {WAYS[-1]}")
        return given[0]

    def _adjusted_from(self) -> Weights:
        if self._section.like is None:
            return self._before
        last = self._reference(self._section.like, "like").profile.parts[-1]
        return last.weights_at(Fraction(1))

    def _reference(self, name: str, key: str) -> MixtureReference:
        if name in self._references:
            return self._references[name]
        near = difflib.get_close_matches(name, list(self._references), n=1)
        known = ", ".join(self._references) or "none"
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {known}"
        raise ConfigError(
            f"{self._where}: {key} names {name!r}, which is neither an earlier stage nor a template that stands before "
            f"it: {hint}"
        )

    def _stepwise(self, phases: list[PhaseSection]) -> MixtureProfile:
        said = [phase.share for phase in phases if phase.share is not None]
        if not phases:
            raise ConfigError(f"{self._where}: phases is empty: give at least one, or mixture instead")
        if said and len(said) != len(phases):
            raise ConfigError(f"{self._where}: phases: give every phase a share, or none for equal parts")
        if said and sum(said) != 1:
            raise ConfigError(f"{self._where}: the shares of its phases sum to {sum(said)}, not to 1")
        parts = []
        for phase in phases:
            share = Fraction(phase.share) if phase.share is not None else Fraction(1, len(phases))
            (part,) = self._written(phase.mixture, phase.ramp_to).parts
            parts.append(ProfilePart(share, part.first, part.last))
        return MixtureProfile(tuple(parts))

    def _blend(self, parts: list[BlendSection]) -> MixtureProfile:
        if not parts:
            raise ConfigError(f"{self._where}: blend is empty: give at least one part")
        columns = []
        for number, part in enumerate(parts):
            if (part.like is None) == (part.mixture is None):
                raise ConfigError(f"{self._where}: blend[{number}]: give either like or mixture")
            if part.like is not None:
                profile = self._reference(part.like, f"blend[{number}].like").profile
            else:
                assert part.mixture is not None
                profile = self._written(part.mixture, None)
            columns.append((Fraction(part.weight), profile))
        total = sum(part.weight for part in parts)
        if self._section.strict and total != 1:
            raise ConfigError(f"{self._where}: strict is set and the weights of blend sum to {total}, not to 1")
        return blend_of(columns)

    def _written(self, mixture: Mixture, ramp_to: Mixture | None) -> MixtureProfile:
        self._check_sum(mixture)
        if ramp_to is None:
            return MixtureProfile.constant(self._flat(mixture))
        self._check_sum(ramp_to)
        return MixtureProfile.ramp(self._flat(mixture), self._flat(ramp_to))

    def _flat(self, weights: Mapping[str, Decimal | int]) -> dict[str, Fraction]:
        return self._words.flat({name: Fraction(weight) for name, weight in weights.items()})

    def _check_sum(self, mixture: Mixture) -> None:
        total = sum(mixture.values())
        if total == 1 or total == 0:
            return
        if self._section.strict:
            raise ConfigError(f"{self._where}: strict is set and the weights sum to {total}, not to 1")
        self._notes.append(f"weights sum to {total}: normalised")
