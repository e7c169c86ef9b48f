"""Cleaning on a command line: `add_cleaning_arguments(parser)`, then `cleaning_options(parser.parse_args())`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron.config.errors import ConfigError
from megatron.corpora.cleaning import CleaningOptions
from megatron.corpora.decontamination import DecontaminationOptions
from megatron.corpora.exact_duplicates import NORMALISATIONS
from megatron.corpora.filters import SETS, describe_filters, parse_filters
from megatron.corpora.near_duplicates import UNITS, NearOptions, library


class _ListFilters(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(describe_filters())
        parser.exit()


def add_cleaning_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `cleaning_options` reads, in a group of their own."""
    group = parser.add_argument_group("cleaning (each optional; what it drops is counted in the manifest)")
    group.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help=f"drop documents by a rule or a set ({', '.join(SETS)}), such as max-line-length=1000 or "
        "word-count=minimum=20,maximum=5000; NAME=off takes one out of a set; may be repeated",
    )
    group.add_argument(
        "--list-filters", action=_ListFilters, nargs=0, help="print all filters, their defaults and sources, and stop"
    )
    group.add_argument(
        "--exact-duplicates",
        nargs="?",
        const="exact",
        default="",
        choices=NORMALISATIONS,
        help="keep the first of documents with the same text, or with the same text but for white space",
    )
    _add_near_arguments(group)
    _add_decontamination_arguments(group)


def _add_near_arguments(group: argparse._ArgumentGroup) -> None:
    default = NearOptions()
    group.add_argument(
        "--near-duplicates",
        nargs="?",
        const="words",
        default="",
        choices=tuple(UNITS),
        help="keep the first of documents with mostly the same n-grams of words (prose) or identifiers (code)",
    )
    for name, letter, value, what in (
        ("bands", "B", default.bands, "MinHash bands"),
        ("rows", "R", default.rows, "rows of a band"),
        ("n", "N", default.n, "words of an n-gram"),
        ("shortest", "W", default.shortest, "documents of fewer words have no near duplicates"),
    ):
        group.add_argument(f"--near-{name}", type=int, default=value, metavar=letter, help=f"{what} (default: {value})")


def _add_decontamination_arguments(group: argparse._ArgumentGroup) -> None:
    default = DecontaminationOptions(())
    group.add_argument(
        "--decontaminate",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="drop documents that contain parts of these evaluation sets (.jsonl, or text with one item a line)",
    )
    group.add_argument(
        "--decontaminate-fields", default="", metavar="F,F", help="only these fields of .jsonl (default: every string)"
    )
    for name, letter, value, what in (
        ("n", "N", default.n, "words in a row that a document must have in common with an item"),
        ("shortest", "W", default.shortest, "items of fewer than N words but at least W must occur whole"),
        ("matches", "M", default.minimum_matches, "such places in a document from which on it is dropped"),
    ):
        group.add_argument(
            f"--decontaminate-{name}", type=int, default=value, metavar=letter, help=f"{what} (default: {value})"
        )
    group.add_argument(
        "--decontaminate-share",
        type=float,
        default=default.minimum_share,
        metavar="S",
        help="share of a document's words that the matches must cover as well (default: 0)",
    )


def cleaning_options(arguments: argparse.Namespace) -> CleaningOptions:
    """The options that the arguments choose. Raises ConfigError for what cannot be carried out, UnavailableError where
    near-duplicate removal needs a library that is missing.
    """
    near = evaluation = None
    if arguments.near_duplicates:
        near = NearOptions(
            arguments.near_bands,
            arguments.near_rows,
            arguments.near_n,
            arguments.near_duplicates,
            arguments.near_shortest,
        )
        for name, value in (("bands", near.bands), ("rows", near.rows), ("n", near.n), ("shortest", near.shortest)):
            _at_least_one(f"--near-{name}", value)
        library()
    if arguments.decontaminate:
        missing = [name for name in arguments.decontaminate if not Path(name).is_file()]
        if missing:
            raise ConfigError(f"--decontaminate {missing[0]}: no such file: name a .jsonl or text file")
        fields = tuple(filter(None, map(str.strip, arguments.decontaminate_fields.split(","))))
        evaluation = DecontaminationOptions(
            tuple(arguments.decontaminate),
            fields,
            arguments.decontaminate_n,
            arguments.decontaminate_shortest,
            arguments.decontaminate_matches,
            arguments.decontaminate_share,
        )
        _at_least_one("--decontaminate-n", evaluation.n)
        _at_least_one("--decontaminate-shortest", evaluation.shortest)
        _at_least_one("--decontaminate-matches", evaluation.minimum_matches)
        if not 0 <= evaluation.minimum_share <= 1:
            raise ConfigError(f"--decontaminate-share {evaluation.minimum_share}: give a share from 0 to 1")
    return CleaningOptions(parse_filters(arguments.filter), arguments.exact_duplicates, near, evaluation)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} {value}: give 1 or more")
