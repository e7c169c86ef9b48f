"""What a quality filter is: a named function of one document, and the document as such functions look at it.

A filter is a plain function `check(view, **parameters) -> bool`, True for a document to reject. Its name is the
function's with hyphens, its parameters and their defaults are the function's keyword arguments, its description the
docstring: nothing is said twice.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import filterfalse

from megatron.corpora.document import Document
from megatron.corpora.repetition import RepeatedGrams

_LETTER_OR_DIGIT = re.compile(r"[^\W_]")


class DocumentView:
    """One document with what several filters need of it, each computed once and only where a filter asks."""

    def __init__(self, document: Document) -> None:
        self.text = document.text
        self.language = document.language.casefold()

    @cached_property
    def lines(self) -> list[str]:
        """Lines as `str.splitlines` cuts them, without their ends."""
        return self.text.splitlines()

    @cached_property
    def ascii(self) -> bytes:
        """The text's ASCII characters, one byte each, in order."""
        return self.text.encode("ascii", "ignore")

    @cached_property
    def words(self) -> list[str]:
        """What white space separates, punctuation left on."""
        return self.text.split()

    @cached_property
    def symbols(self) -> list[str]:
        """Those words that have no letter or digit."""
        # the first character settles it for nearly all
        doubtful = [word for word in filterfalse(str.isalnum, self.words) if not word[0].isalnum()]
        return [word for word in doubtful if _LETTER_OR_DIGIT.search(word) is None]

    @cached_property
    def repeated(self) -> RepeatedGrams:
        """The n-grams of words that occur twice or more."""
        return RepeatedGrams(self.words)

    @cached_property
    def paragraphs(self) -> list[str]:
        """What two or more line feeds in a row separate, the text's ends stripped."""
        parts = self.text.strip().split("\n\n")
        # of an odd number of line feeds one is left, of four or more an empty part
        return parts if "\n\n\n" not in self.text else [part.lstrip("\n") for part in parts if part] or [""]

    @cached_property
    def filled_lines(self) -> list[str]:
        """What one or more line feeds separate; an end of the text at a line feed counts as an empty line."""
        lines = self.text.split("\n")
        return lines if len(lines) < 3 else [lines[0], *filter(None, lines[1:-1]), lines[-1]]


Check = Callable[..., bool]


@dataclass(frozen=True)
class Rule:
    """A filter by name. `defaults` holds every parameter with its default; its type is the type a value must have."""

    name: str
    check: Check
    defaults: dict[str, float]
    description: str

    @staticmethod
    def of(check: Check, name: str = "", **defaults: float) -> Rule:
        """The rule of a function; `defaults` take the place of the function's own."""
        said = {
            parameter.name: parameter.default
            for parameter in inspect.signature(check).parameters.values()
            if parameter.default is not inspect.Parameter.empty
        }
        return Rule(name or check.__name__.replace("_", "-"), check, said | defaults, inspect.getdoc(check) or "")
