"""Filters for prose: the Gopher quality and repetition rules, and C4's rules that concern whole pages.

Sources: Rae et al. 2021, "Scaling Language Models: Gopher", arXiv 2112.11446, appendix A1.1 and its table A1; Raffel et
al. 2020, "T5", arXiv 1910.10683, section 2.2 (C4). Words are what white space separates; the thresholds were chosen for
English, and languages without spaces need other ones.

Gopher leaves a few things open. Where it does, these follow datatrove (github.com/huggingface/datatrove), which made
FineWeb: a word of punctuation alone does not count as a word for word-count and mean-word-length; a bullet is "•" or
"-"; n-gram characters are measured against all characters of the text.
"""

from __future__ import annotations

import re
from functools import partial
from itertools import filterfalse

from megatron.corpora.filter_rule import DocumentView, Rule

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})  # Gopher, appendix A1.1
# Gopher, table A1: n and the largest allowed share of characters
TOP_GRAMS = ((2, 0.20), (3, 0.18), (4, 0.16))
DUPLICATE_GRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


def word_count(view: DocumentView, minimum: int = 50, maximum: int = 100_000) -> bool:
    """Fewer than `minimum` or more than `maximum` words. Gopher, A1.1: 50 and 100,000."""
    # a text of far too many words is not cut into all of them, symbols or not
    if len(view.text) > 16 * maximum and len(view.text.split(None, 2 * maximum)) > 2 * maximum:
        return True
    return not minimum <= len(view.words) - len(view.symbols) <= maximum


def mean_word_length(view: DocumentView, minimum: float = 3.0, maximum: float = 10.0) -> bool:
    """Words of fewer than `minimum` or more than `maximum` characters on average. Gopher, A1.1: 3 and 10."""
    words = len(view.words) - len(view.symbols)
    characters = sum(map(len, view.words)) - sum(map(len, view.symbols))
    return words > 0 and not minimum * words <= characters <= maximum * words


def hash_ratio(view: DocumentView, maximum: float = 0.1) -> bool:
    """More than `maximum` signs "#" a word. Gopher, A1.1, symbol-to-word ratio: 0.1."""
    return view.text.count("#") > maximum * len(view.words)


def ellipsis_ratio(view: DocumentView, maximum: float = 0.1) -> bool:
    """More than `maximum` ellipses ("..." or "…") a word. Gopher, A1.1, symbol-to-word ratio: 0.1."""
    return view.text.count("...") + view.text.count("…") > maximum * len(view.words)


def bullet_lines(view: DocumentView, maximum: float = 0.9) -> bool:
    """More than `maximum` of the lines begin with a bullet ("•" or "-"). Gopher, A1.1: 0.9."""
    return sum(line.lstrip().startswith(("•", "-")) for line in view.lines) > maximum * len(view.lines)


def ellipsis_lines(view: DocumentView, maximum: float = 0.3) -> bool:
    """More than `maximum` of the lines end with an ellipsis ("..." or "…"). Gopher, A1.1: 0.3."""
    return sum(line.rstrip().endswith(("...", "…")) for line in view.lines) > maximum * len(view.lines)


def alphabetic_words(view: DocumentView, minimum: float = 0.8) -> bool:
    """Less than `minimum` of the words have a letter in them. Gopher, A1.1: 0.8."""
    doubtful = [word for word in filterfalse(str.isalpha, view.words) if not word[0].isalpha()]
    without = sum(not any(map(str.isalpha, word)) for word in doubtful)
    return len(view.words) - without < minimum * len(view.words)


def stop_words(view: DocumentView, minimum: int = 2) -> bool:
    """Fewer than `minimum` different ones of: the, be, to, of, and, that, have, with. Gopher, A1.1: 2."""
    return len(STOP_WORDS.intersection(view.words)) < minimum


def duplicate_lines(view: DocumentView, maximum: float = 0.3) -> bool:
    """More than `maximum` of the lines repeat an earlier one. Gopher, table A1: 0.30."""
    lines = view.filled_lines
    return len(lines) - len(set(lines)) > maximum * len(lines)


def duplicate_paragraphs(view: DocumentView, maximum: float = 0.3) -> bool:
    """More than `maximum` of the paragraphs repeat an earlier one. Gopher, table A1: 0.30."""
    paragraphs = view.paragraphs
    return len(paragraphs) - len(set(paragraphs)) > maximum * len(paragraphs)


def duplicate_line_characters(view: DocumentView, maximum: float = 0.2) -> bool:
    """More than `maximum` of the characters are in lines that repeat an earlier one. Gopher, table A1: 0.20."""
    return _repeated_characters(view.filled_lines) > maximum * len(view.text)


def duplicate_paragraph_characters(view: DocumentView, maximum: float = 0.2) -> bool:
    """More than `maximum` of the characters are in paragraphs that repeat an earlier one. Gopher, table A1: 0.20."""
    return _repeated_characters(view.paragraphs) > maximum * len(view.text)


def top_gram(view: DocumentView, n: int, maximum: float = 0.2) -> bool:
    """More than `maximum` of the characters are in the most frequent n-gram of words (one that occurs twice or more).

    Gopher, table A1: 0.20, 0.18 and 0.16 for n of 2, 3 and 4.
    """
    return view.repeated.top_characters(n) > maximum * len(view.text)


def duplicate_gram(view: DocumentView, n: int, maximum: float = 0.15) -> bool:
    """More than `maximum` of the characters are in n-grams of words that occurred before, none counted twice.

    Gopher, table A1: 0.15, 0.14, 0.13, 0.12, 0.11 and 0.10 for n from 5 to 10.
    """
    allowed = maximum * len(view.text)
    return view.repeated.duplicate_characters(n, allowed) > allowed


def lorem_ipsum(view: DocumentView) -> bool:
    """ "lorem ipsum" anywhere, in any case. C4."""
    return "lorem ipsum" in view.text.lower()


def curly_bracket(view: DocumentView) -> bool:
    """A "{" anywhere. C4: most pages with one were code."""
    return "{" in view.text


def sentence_count(view: DocumentView, minimum: int = 5) -> bool:
    """Fewer than `minimum` sentences: runs of text that end in ".", "!" or "?", perhaps with closing quotes or
    brackets.

    C4: 5, there counted after lines without a final mark were dropped; here no text is changed.
    """
    for count, _ in enumerate(_SENTENCE_END.finditer(view.text), 1):
        if count >= minimum:
            return False
    return minimum > 0


def _repeated_characters(parts: list[str]) -> int:
    """Characters of the parts that equal an earlier part."""
    return sum(map(len, parts)) - sum(map(len, set(parts)))


def _of_length(check: object, name: str, n: int, maximum: float) -> Rule:
    rule = Rule.of(check, maximum=maximum)  # type: ignore[arg-type]
    return Rule(name, partial(rule.check, n=n), rule.defaults, rule.description)


_QUALITY = (
    word_count,
    mean_word_length,
    hash_ratio,
    ellipsis_ratio,
    bullet_lines,
    ellipsis_lines,
    alphabetic_words,
    stop_words,
)
_REPETITION = (
    *(
        Rule.of(check)
        for check in (
            duplicate_lines,
            duplicate_paragraphs,
            duplicate_line_characters,
            duplicate_paragraph_characters,
        )
    ),
    *(_of_length(top_gram, f"top-{n}-gram", n, maximum) for n, maximum in TOP_GRAMS),
    *(_of_length(duplicate_gram, f"duplicate-{n}-gram", n, maximum) for n, maximum in DUPLICATE_GRAMS),
)
_PAGE = (lorem_ipsum, curly_bracket, sentence_count)

RULES = (*(Rule.of(check) for check in _QUALITY), *_REPETITION, *(Rule.of(check) for check in _PAGE))
GOPHER_QUALITY = tuple(Rule.of(check).name for check in _QUALITY)
GOPHER_REPETITION = tuple(rule.name for rule in _REPETITION)
C4 = tuple(Rule.of(check).name for check in _PAGE)
