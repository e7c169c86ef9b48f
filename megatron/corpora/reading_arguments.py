"""Reading on a command line: `add_reading_arguments(parser.add_argument_group(…))`, then `read_options(args)`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from megatron.corpora.read_options import ReadOptions


def add_reading_arguments(group: argparse._ArgumentGroup) -> None:
    """Add what every command that reads corpora takes. A command may add more: `read_options` knows them by name."""
    add = group.add_argument
    add("--text-field", default="text", metavar="F", help="JSON field or column with the text (default: text)")
    add("--language-field", default="", metavar="F", help="field with the language, for --language")
    add(
        "--suffix", dest="suffixes", action="append", default=[], metavar="S", help="in folders, only files ending in S"
    )
    add(
        "--language",
        dest="languages",
        action="append",
        default=[],
        metavar="L",
        help="keep only documents in L, such as Python",
    )
    add("--max-file-bytes", type=int, metavar="N", help="pass over larger text and code files")
    add("--no-gitignore", dest="gitignore", action="store_false", help="read also what .gitignore files name")
    add("--git", action="store_true", help="read repositories at HEAD, tracked files only")
    add(
        "--text-documents",
        choices=("file", "line", "blank-line"),
        default="file",
        help="what a document of a text file is: the file, a line, or what blank lines part (default: file)",
    )


def read_options(args: argparse.Namespace) -> ReadOptions:
    """The options of a parsed command line; what its command does not offer is at its default."""
    said = vars(args)
    given: dict[str, Any] = {field.name: said[field.name] for field in fields(ReadOptions) if field.name in said}
    for name in ("suffixes", "languages", "licences"):
        given[name] = tuple(given.get(name, ()))
    return ReadOptions(**given)
