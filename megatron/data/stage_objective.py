"""What the loss of a training stage is on, and weights that are shares of it.

In an instruction stage a target counts where its source's loss mask marks it; of the sources in `whole_loss` all do.
Weights by loss tokens become weights of samples once, when the stage is resolved: a source whose samples hold half as
many loss tokens gets twice as many of them. The counts are those of the documents that are trained on, the slice's less
what is held out; the ledger keeps them, so that a begun stage is never counted again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

from megatron.config.errors import ConfigError
from megatron.config.schema import StageSection
from megatron.data.document_stream import DocumentRule
from megatron.data.mixture_profile import MixtureProfile, ProfilePart, Weights, normalised
from megatron.data.mixture_words import MixtureWords

INSTRUCTION = "instruction"
PLANNED, NO_MASK = "planned", "none"
"""In place of a checksum: of a source without data, and of one of a begun stage whose files have lost their masks."""
OF_LOSS_TOKENS = "of loss tokens"
"""In the note on what shares of loss tokens come to in samples."""
_BY_WEIGHT = ("mixture", "phases", "blend")


class LearnedSource(Protocol):
    """What is asked of a source."""

    @property
    def is_planned(self) -> bool:
        """Whether it is a size alone, without data."""

    @property
    def mask_checksum(self) -> str | None:
        """Identifies its loss masks; None where a file has none."""

    def loss_tokens(self, masked: bool, rule: DocumentRule | None) -> int:
        """Targets of one epoch that count: those that the masks mark, or all, as far as they are known. rule: of a
        padded stage."""


@dataclass(frozen=True)
class StageObjective:
    """What a stage's loss is on.

    whole_loss: sources with a weight whose loss is on every token all the same · masks: by source whose mask is read,
    its checksum · loss_tokens: by source, targets of an epoch that count · weigh_by: what the weights were shares of.
    """

    name: str = "language-modelling"
    whole_loss: tuple[str, ...] = ()
    weigh_by: str = "samples"
    masks: Mapping[str, str] = field(default_factory=dict)
    loss_tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_instruction(self) -> bool:
        """Whether loss masks are read."""
        return self.name == INSTRUCTION

    def words(self) -> str:
        """What the loss is on; empty where it is on every token."""
        if not self.is_instruction:
            return ""
        masked = f"the masked targets of {', '.join(self.masks)}" if self.masks else ""
        whole = f"all of {', '.join(self.whole_loss)}" if self.whole_loss else ""
        return " and ".join(part for part in (masked, whole) if part)

    def to_json(self) -> dict[str, Any]:
        """As plain values; empty where the loss is on every token."""
        if not self.is_instruction:
            return {}
        return {
            "name": self.name,
            "whole_loss": list(self.whole_loss),
            "weigh_by": self.weigh_by,
            "masks": dict(self.masks),
            "loss_tokens": dict(self.loss_tokens),
        }

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> StageObjective:
        """The inverse of `to_json`."""
        if not record:
            return StageObjective()
        return StageObjective(
            record["name"],
            tuple(record["whole_loss"]),
            record["weigh_by"],
            dict(record["masks"]),
            dict(record["loss_tokens"]),
        )

    def differences(self, now: StageObjective) -> list[tuple[str, object, object]]:
        """(what, then, now) of everything in which a stage that has begun is another today."""
        found: list[tuple[str, object, object]] = [
            (what, then, today)
            for what, then, today in (
                ("objective", self.name, now.name),
                ("whole_loss", list(self.whole_loss), list(now.whole_loss)),
                ("weigh_by", self.weigh_by, now.weigh_by),
            )
            if then != today
        ]
        if self.name == now.name:
            found += [
                (f"loss mask of source {name!r}", mask, now.masks[name])
                for name, mask in self.masks.items()
                if name in now.masks and now.masks[name] != mask
            ]
        return found


class ObjectiveWords:
    """Reads the objective of one stage.

    sources: by name; one that is not there is planned · sizes: places of the samples of an epoch of each · rule: of a
    padded stage · frozen: of a begun one · where: the stage, for messages · notes: receives what is worth saying.
    """

    def __init__(
        self,
        section: StageSection,
        groups: Mapping[str, str],
        sizes: Mapping[str, int],
        sources: Mapping[str, LearnedSource],
        rule: DocumentRule | None,
        frozen: StageObjective | None,
        where: str,
        notes: list[str],
    ) -> None:
        self._section, self._sizes, self._sources, self._rule = section, sizes, sources, rule
        self._frozen, self._where, self._notes = frozen, where, notes
        self._names = MixtureWords(groups, sizes, {}, where)
        self._whole = {member for name in section.whole_loss for member in self._names.members(name, "whole_loss")}
        self._by_loss = section.weigh_by == "loss-tokens"
        if self._by_loss:
            self._check_ways()

    def sizes(self) -> Mapping[str, int]:
        """What sources of a group share its weight by: tokens of an epoch, or those of them that the loss is on."""
        return _Counted(self._sizes, self.count) if self._by_loss else self._sizes

    def in_samples(self, profile: MixtureProfile) -> MixtureProfile:
        """A profile in shares of samples; of a stage by loss tokens, what its shares of loss tokens come to."""
        if not self._by_loss:
            return profile
        parts = tuple(
            ProfilePart(part.share, self._in_samples(part.first), self._in_samples(part.last)) for part in profile.parts
        )
        self._notes += [self._words_of_part(number, profile.parts[number], part) for number, part in enumerate(parts)]
        return MixtureProfile(parts)

    def objective(self, sources: Sequence[str], fim: Mapping[str, object]) -> StageObjective:
        """For the sources that have a weight. fim: those of them that fill-in-the-middle rearranges.

        Raises ConfigError for a source without a mask whose loss is not said to be on all of it, for one of whose
        targets none counts, and for fill-in-the-middle of a masked source.
        """
        if self._section.objective != INSTRUCTION:
            return StageObjective()
        masks = {name: self._mask(name) for name in sources if name not in self._whole}
        self._note_without_weight(sources)
        for name in masks:
            if name in fim:
                raise ConfigError(
                    f"{self._where}: source {name!r} has a fill-in-the-middle rate, and its loss mask speaks of tokens "
                    f"in their own order: set fim = {{ {name} = 0 }} in the stage, or name it in whole_loss"
                )
        made = StageObjective(
            INSTRUCTION,
            tuple(name for name in sources if name in self._whole),
            self._section.weigh_by,
            masks,
            {name: self.count(name) for name in sources},
        )
        self._notes.append(self._note(made))
        return made

    def _note_without_weight(self, sources: Sequence[str]) -> None:
        for name in self._section.whole_loss:
            if not set(self._names.members(name, "whole_loss")) & set(sources):
                self._notes.append(f"whole_loss names {name!r}, which has no weight in the stage: it changes nothing")

    def count(self, name: str) -> int:
        """Targets of an epoch of a source that count. Raises ConfigError where there are tokens and none counts."""
        if self._frozen is not None and name in self._frozen.loss_tokens:
            return self._frozen.loss_tokens[name]
        source, size = self._sources.get(name), self._sizes[name]
        masked = name not in self._whole
        if source is None or not size or (masked and self._mask(name) == NO_MASK):
            return size
        if source.is_planned:  # of a padded stage the places that its tokens fill
            return min(size, source.loss_tokens(masked, self._rule))
        count = source.loss_tokens(masked, self._rule)
        if not count:
            raise ConfigError(
                f"{self._where}: source {name!r}: the loss is on none of the {size:,} "
                f"{'tokens' if self._rule is None else 'places of samples'} that are trained on"
                f"{self._lost_by_length(source, masked)}: look at it with inspect_data --documents {name} --loss, "
                "leave it out, or name it in whole_loss"
            )
        return count

    def _lost_by_length(self, source: LearnedSource, masked: bool) -> str:
        """What a padded stage does with long documents, where that is why none of their targets is left."""
        rule = self._rule
        if rule is None or not (whole := source.loss_tokens(masked, None)):
            return ""
        done, another = ("left out", "truncate") if rule.too_long == "drop" else ("cut off", "drop")
        return (
            f", since the {whole:,} that its mask marks lie in documents of more than {rule.seq_length:,} tokens, and "
            f"are {done} (too_long = {rule.too_long!r}): set the stage's seq_length above {rule.seq_length:,}, or "
            f"too_long = {another!r}; or"
        )

    def _in_samples(self, weights: Weights) -> dict[str, Fraction]:
        """A sample of every source has as many places, so that its loss tokens are as their density."""
        return normalised(
            {
                name: weight * self._sizes[name] / self.count(name) if weight else Fraction(0)
                for name, weight in weights.items()
            }
        )

    def _words_of_part(self, number: int, loss: ProfilePart, samples: ProfilePart) -> str:
        """What shares of loss tokens come to in samples, by the names that the stage says them by."""
        section = self._section
        said = section.phases[number] if section.phases is not None else section
        names = list(said.mixture or loss.first)
        names += [name for name in said.ramp_to or {} if name not in names]
        members = {name: self._names.members(name, "mixture") for name in names}
        words = _in_words(members, loss.first, samples.first)
        if loss.is_ramp:
            words += f"; at its end {_in_words(members, loss.last, samples.last)}; between them samples change linearly"
        return f"phase {number + 1}: {words}" if section.phases is not None else words

    def _mask(self, name: str) -> str:
        source = self._sources.get(name)
        if source is None or source.is_planned:
            return PLANNED
        if source.mask_checksum is not None:
            return source.mask_checksum
        if self._frozen is not None:  # what a resume compares, and names
            return NO_MASK
        raise ConfigError(
            f"{self._where}: source {name!r} has no loss mask (or a file of it has none), and objective is "
            f'"instruction": make its data with preprocess_data --format chat, or, to learn all of its tokens, add it '
            f'to whole_loss = ["{name}"]'
        )

    def _check_ways(self) -> None:
        section = self._section
        given = [way for way in _BY_WEIGHT if getattr(section, way) is not None]
        by_reference = any(part.like is not None for part in section.blend or [])
        if len(given) != 1 or by_reference:
            raise ConfigError(
                f'{self._where}: weigh_by = "loss-tokens" goes with weights that the stage says itself: mixture, '
                "phases, or a blend of mixtures; what refers to another stage is in shares of samples, and amounts are "
                "of all tokens"
            )

    def _note(self, made: StageObjective) -> str:
        words, of = [], "tokens" if self._rule is None else "samples' places"
        for name, count in made.loss_tokens.items():
            if made.masks.get(name) == PLANNED:
                words.append(f"{name}, not there yet, all of it as far as is known")
            elif name in made.masks:
                words.append(f"{name} {count / max(1, self._sizes[name]):.1%} of its {of}, as its mask marks them")
            else:
                words.append(f"{name} all of it")
        return f"the loss is on: {'; '.join(words)}"


class _Counted(Mapping[str, int]):
    """Sizes that are counted when they are asked for: of sources that have no part in a stage nothing is read."""

    def __init__(self, sizes: Mapping[str, int], count: Callable[[str], int]) -> None:
        self._sizes, self._count = sizes, count

    def __getitem__(self, name: str) -> int:
        return self._count(name) if self._sizes[name] else 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)


def ratio_words(shares: Sequence[Fraction]) -> str:
    """Shares in small whole numbers where there are such ("5:3"), else as decimals."""
    least = min(share for share in shares)
    for factor in range(1, 13):
        scaled = [share / least * factor for share in shares]
        if all(part.denominator == 1 for part in scaled) and max(scaled) < 100:
            return ":".join(str(part) for part in scaled)
    return ":".join(f"{float(share):.3g}" for share in shares)


def _in_words(members: Mapping[str, Sequence[str]], loss: Weights, samples: Weights) -> str:
    sums = [
        {name: sum((part.get(source, Fraction(0)) for source in members[name]), Fraction(0)) for name in members}
        for part in (loss, samples)
    ]
    names = [name for name in members if sums[0][name]]
    asked, given = ratio_words([sums[0][name] for name in names]), [_share_words(sums[1][name]) for name in names]
    return f"{':'.join(names)} = {asked} {OF_LOSS_TOKENS} = {':'.join(given)} of samples"


def _share_words(share: Fraction) -> str:
    return f"{float(share):.2f}" if 0.01 <= share < 1 else f"{float(share):.2g}"
