"""A mixture over the time of a stage, before it is a number of samples: parts with weights at both ends.

What stages say of one another is said here: the reverse of one, a blend of several, the mean of one over its time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

Weights = Mapping[str, Fraction]


@dataclass(frozen=True)
class ProfilePart:
    """A share of the stage's time, with weights that sum to 1: constant, or linear from `first` to `last`."""

    share: Fraction
    first: Weights
    last: Weights

    def weights_at(self, place: Fraction) -> dict[str, Fraction]:
        """The weights at a place of the part, from 0 to 1."""
        names = {*self.first, *self.last}
        zero = Fraction(0)
        return {
            name: self.first.get(name, zero) * (1 - place) + self.last.get(name, zero) * place for name in sorted(names)
        }

    @property
    def is_ramp(self) -> bool:
        """Whether its weights change."""
        return dict(self.first) != dict(self.last)


@dataclass(frozen=True)
class MixtureProfile:
    """Parts whose shares sum to 1."""

    parts: tuple[ProfilePart, ...]

    @staticmethod
    def constant(weights: Weights) -> MixtureProfile:
        """One mixture for the whole stage."""
        flat = normalised(weights)
        return MixtureProfile((ProfilePart(Fraction(1), flat, flat),))

    @staticmethod
    def ramp(first: Weights, last: Weights) -> MixtureProfile:
        """Linear from one mixture to another; each is normalised before the weights are interpolated."""
        return MixtureProfile((ProfilePart(Fraction(1), normalised(first), normalised(last)),))

    def reversed(self) -> MixtureProfile:
        """The same in reversed time."""
        return MixtureProfile(tuple(ProfilePart(part.share, part.last, part.first) for part in reversed(self.parts)))

    def mean(self) -> dict[str, Fraction]:
        """The weight of each source over the whole time."""
        result: dict[str, Fraction] = {}
        for part in self.parts:
            for name, weight in part.weights_at(Fraction(1, 2)).items():
                result[name] = result.get(name, Fraction(0)) + part.share * weight
        return result

    def _cut_at(self, borders: Sequence[Fraction]) -> list[ProfilePart]:
        """The same parts, cut further at these places of the whole time (ascending, the last one 1)."""
        pieces: list[ProfilePart] = []
        begin, remaining = Fraction(0), list(borders)
        for part in self.parts:
            end, at = begin + part.share, begin
            while remaining and remaining[0] <= end:
                border = remaining.pop(0)
                ends = [part.weights_at((place - begin) / part.share) for place in (at, border)]
                pieces.append(ProfilePart(border - at, ends[0], ends[1]))
                at = border
            begin = end
        return pieces

    def borders(self) -> list[Fraction]:
        """Where its parts end, as places of the whole time."""
        ends, at = [], Fraction(0)
        for part in self.parts:
            at += part.share
            ends.append(at)
        return ends


def normalised(weights: Weights) -> dict[str, Fraction]:
    """The weights scaled to a sum of 1. They must not all be zero."""
    total = sum(weights.values(), Fraction(0))
    return {name: Fraction(weight) / total for name, weight in weights.items()}


def blend_of(parts: Sequence[tuple[Fraction, MixtureProfile]]) -> MixtureProfile:
    """Several mixtures side by side, each in its share; piecewise linear where they are."""
    total = sum((share for share, _ in parts), Fraction(0))
    borders = sorted({border for _, profile in parts for border in profile.borders()})
    columns = [(share / total, profile._cut_at(borders)) for share, profile in parts]
    blended = []
    for number in range(len(borders)):
        first: dict[str, Fraction] = {}
        last: dict[str, Fraction] = {}
        for share, pieces in columns:
            for side, weights in ((first, pieces[number].first), (last, pieces[number].last)):
                for name, weight in weights.items():
                    side[name] = side.get(name, Fraction(0)) + share * weight
        blended.append(ProfilePart(columns[0][1][number].share, first, last))
    return MixtureProfile(tuple(blended))
