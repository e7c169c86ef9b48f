"""The table at the end of a test run: how far each layout's curve lies from the one-process curve.

Rows travel with the tests' reports, so that the table is whole whatever number of processes ran them.
"""

from __future__ import annotations

from typing import Any

import pytest

PROPERTY = "layout table"
HEAD = ("layout", "precision", "optimizer", "loss", "gradient norm", "loss by source")
_rows = pytest.StashKey[list[tuple[str, ...]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = []
    config.pluginmanager.register(_Collector(config.stash[_rows]))


class _Collector:
    def __init__(self, rows: list[tuple[str, ...]]) -> None:
        self._rows = rows

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self._rows += [tuple(row) for name, rows in report.user_properties if name == PROPERTY for row in rows]  # type: ignore[attr-defined]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash.get(_rows, [])
    if not rows:
        return
    terminalreporter.section("layouts against one process: worst relative error over all steps")
    table = [HEAD, *sorted(set(rows))]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEAD))]
    for row in table:
        terminalreporter.write_line("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)))
