"""Multiple-choice questions from held-out documents: which of four continuations is the true one?

A question is a place in a document: some two hundred and fifty characters of context, cut where a word or a line
ends, and the hundred characters that follow. The three distractors follow other places, of *other* held-out documents
of the same source, cut in the same way (after a line's end or within a line, as the truth is) and of nearly the same
length. So neither kind nor length gives the answer away; topic, names and syntax do. Chance is one in four.

Everything is a function of (seed, source name, texts).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron.config.errors import DataError

CHOICES = 4
CONTEXT_CHARACTERS = (200, 300)
CONTINUATION_CHARACTERS = (80, 120)
SHORTEST_DOCUMENT = CONTEXT_CHARACTERS[0] + 2 * CONTINUATION_CHARACTERS[1]
_ATTEMPTS_A_QUESTION = 60
_LEAST_LETTERS = 0.45


@dataclass(frozen=True)
class Question:
    """`context` ends with a visible character; each choice begins with the white space that follows it."""

    context: str
    choices: tuple[str, ...]
    answer: int
    document: int


@dataclass(frozen=True)
class _Cut:
    """A place in a document where a context may end. `line_end`: a new line follows."""

    document: int
    position: int
    line_end: bool


def make_questions(source: str, texts: Sequence[str], count: int, seed: int = 0) -> list[Question]:
    """Up to `count` questions of one source, no context and no continuation twice.

    texts: held-out documents. Raises DataError where fewer than four of them are long enough, or where fewer than a
    third of the questions can be made.
    """
    generator = random.Random(int.from_bytes(hashlib.blake2b(f"{seed}/{source}".encode()).digest()[:8], "little"))
    if why := too_few(texts):
        raise DataError(
            f"source {source}: {why}: give the source more documents, or raise validation.fraction before training "
            "(never after: what is held out then has been trained on)"
        )
    usable = [number for number, text in enumerate(texts) if len(text) >= SHORTEST_DOCUMENT]
    questions: list[Question] = []
    seen: set[str] = set()
    for _ in range(count * _ATTEMPTS_A_QUESTION):
        if len(questions) == count:
            break
        question = _attempt(texts, usable, generator, seen)
        if question is not None:
            questions.append(question)
    if 3 * len(questions) < count:
        raise DataError(
            f"source {source}: only {len(questions)} of {count} questions could be made from {len(usable)} held-out "
            "documents: ask for fewer questions, or raise validation.fraction before training"
        )
    return questions


def too_few(texts: Iterable[str]) -> str:
    """Why no question can be made from these held-out documents, in words; "" where enough of them are long enough. No
    more of them are looked at than it takes."""
    usable = total = 0
    for text in texts:
        total += 1
        usable += len(text) >= SHORTEST_DOCUMENT
        if usable == CHOICES:
            return ""
    return (
        f"{usable} held-out documents of at least {SHORTEST_DOCUMENT} characters, among {total}, and questions need "
        f"{CHOICES}"
    )


def _attempt(texts: Sequence[str], usable: Sequence[int], generator: random.Random, seen: set[str]) -> Question | None:
    cut = _random_cut(texts, usable[generator.randrange(len(usable))], generator)
    if cut is None:
        return None
    context = _context(texts[cut.document], cut.position, generator)
    length = generator.randint(*CONTINUATION_CHARACTERS)
    truth = _continuation(texts[cut.document], cut.position, length)
    if context is None or truth is None or context in seen or truth.strip() in seen:
        return None
    choices = [truth]
    for choice in _distractors(texts, usable, cut, len(truth), generator):
        if choice.strip() not in seen and all(choice.strip() != other.strip() for other in choices):
            choices.append(choice)
        if len(choices) == CHOICES:
            break
    if len(choices) < CHOICES:
        return None
    seen.update([context, *(choice.strip() for choice in choices)])
    answer = generator.randrange(CHOICES)
    choices[0], choices[answer] = choices[answer], choices[0]
    return Question(context, tuple(choices), answer, cut.document)


def _distractors(
    texts: Sequence[str], usable: Sequence[int], truth: _Cut, length: int, generator: random.Random
) -> Iterator[str]:
    """Continuations of other documents, no two of one document, cut as `truth` is."""
    documents = {truth.document}
    for _ in range(12 * CHOICES):
        document = usable[generator.randrange(len(usable))]
        if document in documents or texts[document] == texts[truth.document]:
            continue
        cut = _random_cut(texts, document, generator, truth.line_end)
        choice = _continuation(texts[document], cut.position, length) if cut else None
        if choice is not None:
            documents.add(document)
            yield choice


def _random_cut(
    texts: Sequence[str], document: int, generator: random.Random, line_end: bool | None = None
) -> _Cut | None:
    """A place before white space, behind a visible character; before a new line if `line_end` says so."""
    text = texts[document]
    first, last = CONTEXT_CHARACTERS[0], len(text) - CONTINUATION_CHARACTERS[1] - 20
    if last <= first:
        return None
    start = generator.randrange(first, last)
    for position in range(start, min(start + 200, last)):
        if text[position] in " \n" and not text[position - 1].isspace():
            found = text[position] == "\n"
            if line_end is None or found == line_end:
                return _Cut(document, position, found)
    return None


def _context(text: str, end: int, generator: random.Random) -> str | None:
    """The characters before `end`, from the start of a line or of a word on."""
    begin = max(0, end - generator.randint(*CONTEXT_CHARACTERS))
    if begin > 0:
        breaks = [at for at in (text.find("\n", begin, begin + 60), text.find(" ", begin, begin + 60)) if at >= 0]
        if not breaks:
            return None
        begin = breaks[0] + 1
    context = text[begin:end]
    return context if _readable(context) and context == context.rstrip() else None


def _continuation(text: str, position: int, length: int) -> str | None:
    """About `length` characters from `position` on, ending where a word does, or None."""
    end = position + length
    for stop in range(end, min(end + 20, len(text))):
        if text[stop].isspace() and not text[stop - 1].isspace():
            choice = text[position:stop]
            return choice if _readable(choice) else None
    return None


def _readable(text: str) -> bool:
    """Enough letters to be about something: no rulers, tables of numbers or blank stretches."""
    visible = len(text.strip())
    return visible > 0 and sum(map(str.isalpha, text)) >= _LEAST_LETTERS * len(text) and len(set(text)) > 12
