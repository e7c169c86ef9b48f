"""Fill-in-the-middle at training time: which spans are rearranged, and how (Bavarian et al. 2022, arXiv 2207.14255).

A span is what a sample takes of one piece within one window. Whether it is rearranged, where it is cut and whether the
suffix comes first are drawn by a key of (seed, source, epoch, document, offset): anew in each epoch, the same after
any restart and at any layout, whatever the rate of the training stage. The span keeps its length: its last three
tokens before the end of the document give place to the three sentinels, and are counted as displaced.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron.config.errors import ConfigError
from megatron.config.schema import FimSection
from megatron.data.mixture_words import MixtureWords
from megatron.data.permutation import GOLDEN, Integers, Words, derive_key, mix64, mix64_array
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.fim_tokens import fim_tokens

DISPLACED = 3
SHORTEST_SPAN = 8
_MASK = 2**64 - 1
# Draws of one span: whether it is rearranged, its order, its two cuts.
_WHETHER, _ORDER, _CUT_A, _CUT_B = range(1, 5)


@dataclass(frozen=True)
class FimRates:
    """Share of the spans that are rearranged, and the share of those that have the suffix first."""

    rate: Decimal
    spm: Decimal

    def to_json(self) -> list[str]:
        """As the ledger keeps them."""
        return [str(self.rate.normalize()), str(self.spm.normalize())]


@dataclass(frozen=True)
class FimSentinels:
    """Ids of the tokenizer's sentinels."""

    prefix: int
    middle: int
    suffix: int

    def ids(self) -> list[int]:
        """Prefix, middle, suffix: as the ledger keeps them."""
        return [self.prefix, self.middle, self.suffix]


def source_rates(sections: Mapping[str, FimSection | None]) -> dict[str, FimRates]:
    """The rates that sources say for themselves."""
    return {name: FimRates(section.rate, section.spm) for name, section in sections.items() if section is not None}


def stage_rates(
    said: Mapping[str, Decimal], own: Mapping[str, FimRates], words: MixtureWords, sources: Sequence[str]
) -> dict[str, FimRates]:
    """The rates of one stage for its sources: what the stage says by source or group, else the sources' own.

    Raises ConfigError for a name that is neither a source nor a group.
    """
    by_source = {member: rate for name, rate in said.items() for member in words.members(name, "fim")}
    result = {}
    for name in sources:
        rates = own.get(name, FimRates(Decimal(0), Decimal("0.5")))
        rates = FimRates(by_source.get(name, rates.rate), rates.spm)
        if rates.rate > 0:
            result[name] = rates
    return result


@dataclass(frozen=True)
class FimRule:
    """The draws for the spans of one source in one training stage. Without sentinels it only says which."""

    seed: int
    fingerprint: str
    rates: FimRates
    sentinels: FimSentinels | None

    @cached_property
    def _key(self) -> int:
        return derive_key("fim", self.seed, self.fingerprint)

    def chosen(self, rows: Integers) -> npt.NDArray[np.bool_]:
        """Which rows of (epoch, document, start, end), int64 [n, 4], are rearranged: bool [n]."""
        words = self._words(rows)
        long_enough: npt.NDArray[np.bool_] = rows[:, 3] - rows[:, 2] >= SHORTEST_SPAN
        rate = _threshold(self.rates.rate)
        if rate > _MASK:
            return long_enough
        return long_enough & (mix64_array(words + np.uint64(_WHETHER * GOLDEN & _MASK)) < np.uint64(rate))

    def rearrange(self, place: tuple[int, int, int], ids: npt.NDArray[np.integer], ends: bool) -> Integers:
        """The ids of a chosen span in their new order, int64 of the same length.

        Args:
            place: epoch, document and start of the span.
            ids: its ids, at least 8. ends: whether the last one is the document's end, which stays last.
        """
        assert self.sentinels is not None, "the planner refuses a rate where the tokenizer has no sentinels"
        word = self._word(*place)
        content = ids[: len(ids) - ends - DISPLACED]
        cuts = sorted(_draw(word, number) * (len(content) + 1) >> 64 for number in (_CUT_A, _CUT_B))
        prefix, middle, suffix = np.split(content.astype(np.int64), cuts)
        names = self.sentinels
        if _draw(word, _ORDER) < _threshold(self.rates.spm):
            parts = [[names.prefix, names.suffix], suffix, [names.middle], prefix, middle]
        else:
            parts = [[names.prefix], prefix, [names.suffix], suffix, [names.middle], middle]
        end = ids[len(ids) - ends :]
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in (*parts, end)])

    def _words(self, rows: Integers) -> Words:
        columns = rows[:, :3].astype(np.uint64)
        words = mix64_array(columns[:, 0] + np.uint64(self._key))
        words = mix64_array(words ^ columns[:, 1])
        return mix64_array(words + columns[:, 2])

    def _word(self, epoch: int, document: int, start: int) -> int:
        word = mix64((epoch + self._key) & _MASK)
        return mix64((mix64(word ^ document) + start) & _MASK)


def _draw(word: int, number: int) -> int:
    """A uniform 64-bit number."""
    return mix64((word + number * GOLDEN) & _MASK)


def _threshold(share: Decimal) -> int:
    """The number that a uniform 64-bit one is below with this probability."""
    return int(Fraction(share) * 2**64)


def sentinels_of(tokenizer: Tokenizer, named: tuple[str, str, str] | None) -> FimSentinels | None:
    """The sentinels of a tokenizer: those named (prefix, middle, suffix), else those of a known family, if any.

    Raises ConfigError where a named one is no special token.
    """
    if named is None:
        found = fim_tokens(tokenizer)
        return FimSentinels(found.prefix, found.middle, found.suffix) if found else None
    for name in named:
        if name not in tokenizer.special_ids:
            near = difflib.get_close_matches(name, tokenizer.special_ids, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(tokenizer.special_ids) or 'none'}"
            raise ConfigError(f"tokenizer.fim: {name!r} is no special token of {tokenizer.name}: {hint}")
    prefix, middle, suffix = (tokenizer.special_ids[name] for name in named)
    return FimSentinels(prefix, middle, suffix)
