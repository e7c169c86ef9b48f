"""Text that does not begin a text: how a tokenizer encodes what follows a special token, or a cut inside a text.

Many SentencePiece models put a space before the first word of a text. Text that goes on must not get it: it is encoded
behind a separator whose ids are then taken off again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from megatron.tokenizers.base import Tokenizer

Place = Literal["start", "after-special", "continued"]
"""Where a text stands: at the beginning, right behind a special token, or behind other text that was cut off there."""

_SEPARATORS = ("\n", "\t", "|", ";", "0")


@dataclass(frozen=True)
class SpecialRules:
    """What a tokenizer's file says of the text beside its special tokens.

    begins_anew: text behind a special token is encoded as if it began a text. strips: for ids whose token takes the
    white space beside it away, whether it does so before and behind itself.
    """

    begins_anew: bool = True
    strips: Mapping[int, tuple[bool, bool]] = field(default_factory=dict)


@runtime_checkable
class RulesItsSpecials(Protocol):
    """A tokenizer whose file has such rules."""

    def special_rules(self) -> SpecialRules:
        """The rules."""


class ContinuedText:
    """Encodes text by its place. What a tokenizer does without special tokens, it must do with them between."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.rules = tokenizer.special_rules() if isinstance(tokenizer, RulesItsSpecials) else SpecialRules()
        self._separators = [(mark, tokenizer.encode(mark)) for mark in _SEPARATORS]
        plain = tokenizer.encode("a")
        self._prefixes = not any(tokenizer.encode(f"{mark}a") == [*ids, *plain] for mark, ids in self._separators)

    def asked(self, text: str, place: Place) -> tuple[str, list[int]]:
        """What to encode for a text, and the ids that must begin the result and are not the text's."""
        continued = place == "continued" or (place == "after-special" and not self.rules.begins_anew)
        if not continued or not self._prefixes:
            return text, []
        mark, ids = self._separators[0]
        return mark + text, ids

    def taken(self, text: str, given: Sequence[int], before: Sequence[int]) -> Sequence[int]:
        """The text's ids out of what `asked` led to. Where its separator melted with the text, another one is tried;
        where all do, the text is encoded as if it began one."""
        if list(given[: len(before)]) == list(before):
            return given[len(before) :]
        for mark, ids in self._separators[1:]:
            found = self._tokenizer.encode(mark + text)
            if found[: len(ids)] == ids:
                return found[len(ids) :]
        return self._tokenizer.encode(text)
