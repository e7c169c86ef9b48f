"""Tables on the terminal, all in one style."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from rich import box
from rich.console import Console
from rich.table import Table

_WORDS = ("stage", "source", "when dry", "of", "passes", "file", "begins", "held out", "in slice")
_WIDE_ENOUGH = 130


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        """A reader that has gone away (`| head`) is the frame's to name: rich would end the process with 1."""
        self.quiet = True
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def console_for_tables(width: int | None = None) -> Console:
    """A console that keeps a table's lines whole where the output is a file or a pipe, and that never fails over a
    letter that the output's encoding does not have. width: in columns, where the user said one."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower().replace("-", "") != "utf8":
        sys.stdout.reconfigure(errors="replace")
    return _Console(highlight=False, markup=False, width=width or (None if sys.stdout.isatty() else _WIDE_ENOUGH))


def new_table(title: str, *columns: str) -> Table:
    """An empty table with columns of names to the left and of numbers to the right."""
    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in _WORDS else "right", no_wrap=True)
    return table


def in_chunks(columns: Sequence[str], widest: int, fixed: int, width: int) -> list[range]:
    """The numbers of a table's repeated columns, cut so that each part fits `width` beside `fixed` characters."""
    most = max(1, (width - fixed) // (widest + 3))
    return [range(start, min(start + most, len(columns))) for start in range(0, len(columns), most)]


def clipped(words: str, most: int) -> str:
    """The words, or their beginning and an ellipsis."""
    return words if len(words) <= most else words[: most - 1] + "…"
