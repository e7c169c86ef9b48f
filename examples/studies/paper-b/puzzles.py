"""Makes the puzzles of puzzles.toml: four beginnings, and one text that goes with one of them; always the same.

python examples/studies/paper-b/puzzles.py --output examples/studies/paper-b/puzzles
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

ITEMS = 200
CHOICES = 4

_NAMES = (  # parted by spaces, as what follows
    "width height colour weight first second left right start stop count total index value key name path line text "
    "size rate time year month city price item node parent child source target old new low high mean limit step scale"
)
_FUNCTIONS = "combine compute measure update select merge compare convert reduce adjust collect resolve"
_BODIES = (
    "    return {a} + {b}",
    "    return {b} - {a}",
    "    if {a} > {b}:\n        return {a}\n    return {b}",
    "    result = {a} * {b}\n    return result",
    "    return [{a}, {b}]",
    "    while {a} < {b}:\n        {a} = {a} + 1\n    return {a}",
)
_SYLLABLES = "ba bel da dor fen gar hol ka lan lu mar mi nor pa ren ro sal ti tor vel vi wen za zor"
_SENTENCES = (
    ("The teacher of the class was {name}.", "Every student in the class knew {name} and listened."),
    ("The new version of the library is called {name}.", "It is not possible to use {name} without an account."),
    ("There was a river that people called {name}.", "In the summer the water of {name} was low."),
    ("The first message was sent to {name}.", "After some time an answer from {name} was received."),
    ("A small town near the sea is called {name}.", "Many people have moved to {name} in recent years."),
    ("The author of this book is {name}.", "Most of the examples were written by {name} as well."),
)
_CLOSE = {"(": ")", "[": "]", "{": "}"}
_OPENINGS = [one + two for one in "([{" for two in "([{"]

Puzzle = tuple[str, str, list[str]]
"""(the right beginning, the text that follows it, wrong beginnings)."""


def recall_code(generator: random.Random) -> Puzzle:
    """Heads of one function with different parameters, and a body that uses two of them."""
    function, body = generator.choice(_FUNCTIONS.split()), generator.choice(_BODIES)
    names = generator.sample(_NAMES.split(), 2 * CHOICES)
    heads = [f"def {function}({a}, {b}):" for a, b in zip(names[::2], names[1::2], strict=True)]
    return heads[0], body.format(a=names[0], b=names[1]), heads[1:]


def recall_text(generator: random.Random) -> Puzzle:
    """One sentence with different made-up names, and a sentence that uses one of them again."""
    names: list[str] = []
    while len(names) < CHOICES:
        name = "".join(generator.sample(_SYLLABLES.split(), 2)).capitalize()
        if name not in names:
            names.append(name)
    first, second = generator.choice(_SENTENCES)
    return first.format(name=names[0]), second.format(name=names[0]), [first.format(name=name) for name in names[1:]]


def brackets(generator: random.Random) -> Puzzle:
    """A list over two lines that is opened by different brackets, and the brackets that close one of them."""
    openings = generator.sample(_OPENINGS, CHOICES)
    name, one, two = generator.sample(_NAMES.split(), 3)
    begun = [f"{name} = {opening}\n    {one},\n    {two}," for opening in openings]
    return begun[0], "".join(_CLOSE[bracket] for bracket in reversed(openings[0])), begun[1:]


KINDS: dict[str, Callable[[random.Random], Puzzle]] = {
    "recall_code": recall_code,
    "recall_text": recall_text,
    "brackets": brackets,
}


def lines_of(kind: str, items: int = ITEMS) -> list[str]:
    """The data file of a task, a JSON object a line; no puzzle twice."""
    generator = random.Random(f"{kind} 1")
    found: dict[str, None] = {}
    while len(found) < items:
        right, rest, wrong = KINDS[kind](generator)
        answer = generator.randrange(CHOICES)
        choices = [*wrong[:answer], right, *wrong[answer:]]
        found[json.dumps({"choices": choices, "answer": answer, "rest": rest})] = None
    return list(found)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the puzzles of examples/studies/paper-b/puzzles.toml.")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="gets a .jsonl for each task")
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        (folder / f"{kind}.jsonl").write_text("\n".join(lines_of(kind)) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
