"""Tables on the terminal, all in one style."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table

_WORDS = ("stage", "source", "when dry")
_WIDE_ENOUGH = 130


def console_for_tables() -> Console:
    """A console that keeps a table's lines whole where the output is a file or a pipe."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE_ENOUGH)


def new_table(title: str, *columns: str) -> Table:
    """An empty table with columns of names to the left and of numbers to the right."""
    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in _WORDS else "right", no_wrap=True)
    return table
