"""Writes a study's report: page, Markdown, CSV, plots, pages of ledgers, and each run's own report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.config.durable_files import write_whole
from megatron.config.errors import IO_REMEDIES, ConfigError, StagemixError
from megatron.study.report_columns import columns_of
from megatron.study.report_curves import NodeCurve, curves_of
from megatron.study.report_data import StudyReport
from megatron.study.report_diffs import diff_name, diff_page, diffs_of
from megatron.study.report_links import Links
from megatron.study.report_page import Contents, graph_of, study_report_page
from megatron.study.report_plots import Plot, loss_plots, mixture_plot
from megatron.study.report_provenance import tokens_of
from megatron.study.report_score_plots import pareto_plot, share_plots
from megatron.study.report_svg_files import graph_file, svg_file
from megatron.study.report_tables import Table, tables_of
from megatron.study.report_text import markdown, results_csv, table_csv
from megatron.study.report_words import headline

_FILES = "files.json"
RunReport = Callable[[Path, list[Path]], str]
"""The page of a run, from its folder and evaluation files."""


@dataclass(frozen=True)
class Written:
    """What was written. page: index.html · files: how many · headline, missing, notes: as the page has them · removed:
    files of an earlier report in the folder that this one does not have."""

    page: Path
    files: int
    headline: Sequence[str]
    missing: Sequence[str]
    notes: Sequence[str]
    removed: Sequence[str] = ()


def write_study_report(report: StudyReport, folder: Path, run_report: RunReport | None = None) -> Written:
    """Writes everything below `folder`; index.html last. run_report: None for no reports of runs.

    The same inputs give the same bytes. ConfigError where no such folder can be made or written to, OSError where the
    disk is full or failing.
    """
    _try(folder, lambda: folder.mkdir(parents=True, exist_ok=True))
    notes = list(report.notes)
    columns, more = columns_of(report)
    tables = tables_of(report, columns)
    curves, damaged = curves_of(report)
    notes += [*more, *damaged]
    files: dict[str, str] = {}
    runs = _run_reports(report, run_report, files, notes)
    diffs = {arm: found for arm in report.arms if (found := diffs_of(report, arm))}
    places = {arm: diff_name(arm, report.baseline or "") for arm in diffs}
    files |= {places[arm]: diff_page(report, arm, found) for arm, found in diffs.items()}
    plots = {table.experiment: _plots(report, table, curves, number) for number, table in enumerate(tables)}
    files |= {f"plots/{plot.name}.svg": svg_file(plot) for of in plots.values() for plot in of}
    files["plots/graph.svg"] = graph_file(graph_of(report))
    links = Links(report, folder, frozenset(runs), places)
    contents = Contents(report, tables, plots, diffs, tokens_of(report), notes)
    files |= {
        "report.md": markdown(contents, links),
        "results.csv": results_csv(report, links),
        "table.csv": table_csv(report, tables),
        "index.html": study_report_page(contents, links),
    }
    files[_FILES] = json.dumps(sorted(files), indent=0) + "\n"
    removed = _clear(folder, files)
    _try(folder, lambda: _write(folder, files))
    return Written(folder / "index.html", len(files), headline(report, tables), report.missing, notes, removed)


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.encode())


def _try(folder: Path, act: Callable[[], None]) -> None:
    """Does it; a folder that cannot be is the user's to name anew, a disk that fails is not."""
    try:
        act()
    except OSError as error:
        if error.errno in IO_REMEDIES:
            raise
        raise ConfigError(
            f"{folder}: no report can be written there ({error.strerror or error}): name another folder with --output"
        ) from None


def _clear(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Removes what an earlier report wrote here and this one does not: pages of arms that are gone, say. Names them."""
    try:
        before = json.loads((folder / _FILES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    removed = []
    inside = folder.resolve()
    for name in before if isinstance(before, list) else []:
        path = (folder / str(name)).resolve()
        if name not in files and path.is_relative_to(inside) and path.is_file():
            path.unlink()
            removed.append(str(name))
    return removed


def _plots(report: StudyReport, table: Table, curves: Mapping[str, NodeCurve], number: int) -> list[Plot]:
    """Of one experiment, in the page's order."""
    prefix = f"{number + 1}-" if number or len({report.experiment(arm) for arm in report.arms}) > 1 else ""
    scores = [column for column in table.columns if column.score] or list(table.columns)
    found = share_plots(report, table, scores, f"{prefix}share")
    pareto = pareto_plot(report, table, table.columns, f"{prefix}pareto")
    mixture = mixture_plot(report, table.arms, curves, f"{prefix}mixture")
    found += [plot for plot in (pareto, mixture) if plot is not None]
    return found + loss_plots(report, table.arms, curves, f"{prefix}loss")


def _run_reports(
    report: StudyReport, run_report: RunReport | None, files: dict[str, str], notes: list[str]
) -> list[str]:
    """Adds the page of each node that has metrics; ids of these. One that cannot be made is named."""
    made = []
    for name, one in report.nodes.items():
        if run_report is None or one.node.kind != "train" or not (one.folder.path / "metrics.jsonl").is_file():
            continue
        given = (
            [one.folder.path / entry.file for suite, entry in one.results.suites.items() if suite in one.suites]
            if (one.results is not None)
            else []
        )
        try:
            files[f"runs/{name}.html"] = run_report(one.folder.path, given)
            made.append(name)
        except StagemixError as error:
            notes.append(f"No report of {one.ends}: {error}")
    return made
