"""Where the evidence of a figure lies, as links relative to the report's folder, so that a study can be moved whole."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from megatron.study.node_results import WIN_RATE
from megatron.study.report_columns import Column
from megatron.study.report_data import ReportNode, StudyReport


@dataclass(frozen=True)
class Links:
    """Makes links. folder: the report's · runs: nodes that have a run report · diffs: pages of ledgers by arm."""

    report: StudyReport
    folder: Path
    runs: frozenset[str]
    diffs: dict[str, str]

    def to(self, path: Path) -> str:
        """A relative link to a file or folder of the study."""
        return quote(Path(os.path.relpath(path.absolute(), self.folder.absolute())).as_posix())

    def node(self, one: ReportNode) -> list[tuple[str, str]]:
        """(words, link) of a node: its folder, its own report, its results and exported model; only what is there."""
        found = []
        if one.folder.path.is_dir():
            found.append(("run", self.to(one.folder.path) + "/"))
        if one.node.id in self.runs:
            found.append(("run's report", f"runs/{one.node.id}.html"))
        if one.results is not None:
            found.append(("results", self.to(one.folder.results)))
            if one.results.export is not None:
                found.append(("model", self.to(one.folder.path / one.results.export) + "/"))
            if one.results.samples is not None:
                found.append(("samples", self.to(one.folder.path / one.results.samples)))
        if one.checkpoint.is_dir():
            found.append(("checkpoint", self.to(one.checkpoint) + "/"))
        return found

    def evaluations(self, one: ReportNode, keys: Iterable[str]) -> list[tuple[str, str]]:
        """(words, link) of the files that hold the items of figures, by keys "SUITE/TASK/METRIC"."""
        if one.results is None:
            return []
        suites = dict.fromkeys(key.split("/", 1)[0] for key in keys)
        files = {suite: one.results.suites[suite].file for suite in suites if suite in one.results.suites}
        if WIN_RATE in suites and one.results.win_rate is not None:
            files[WIN_RATE] = one.results.win_rate["file"]
        return [(f"evaluation {suite}", self.to(one.folder.path / file)) for suite, file in files.items()]

    def cell(self, arm: str, column: Column) -> list[tuple[str, list[tuple[str, str]]]]:
        """Of each seed that a figure is of, and then the ledgers' difference: (words, its links)."""
        rows = []
        for seed in self.report.seeds:
            one = self.report.end(arm, seed)
            if one.node.id in column.values:
                found = [*self.node(one), *self.evaluations(one, column.parts or (column.key,))]
                rows.append((f"seed {seed}", found))
        if arm in self.diffs:
            rows.append(("beside the baseline", [("ledger diff", self.diffs[arm])]))
        return rows
