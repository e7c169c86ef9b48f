"""The report as Markdown, and its figures as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from megatron.study.node_results import Figure
from megatron.study.report_columns import Column
from megatron.study.report_data import ReportNode, StudyReport
from megatron.study.report_links import Links
from megatron.study.report_page import Contents
from megatron.study.report_provenance import facts_of, length_of, tokens_words
from megatron.study.report_tables import Entry, Table
from megatron.study.report_words import (
    cell_change_words,
    change_words,
    findings,
    headline,
    interval_words,
    note_of,
    p_words,
    title_of,
    unit,
    value_words,
)

_RESULT_HEADS = (
    "arm", "experiment", "seed", "node", "stage", "end_of_arm", "tokens", "suite", "task", "group", "metric", "value",
    "stderr", "items", "higher_is_better", "weights", "run", "results", "evaluation", "export",
)  # fmt: skip


def results_csv(report: StudyReport, links: Links) -> str:
    """Long form: a row for each arm, seed, evaluated node of its path and figure; a trunk's stand with each arm that
    goes over it. Paths are relative to the report's folder."""
    rows = []
    for arm in report.planned.graph.arms:
        for name in arm.path:
            one = report.nodes[name]
            for figure in one.results.metrics if one.results is not None else ():
                rows.append(
                    [arm.name, arm.experiment, arm.seed, name, one.node.label, int(name == arm.path[-1])]
                    + _figure_cells(report, one, figure, links)
                )
    return _csv(_RESULT_HEADS, rows)


def _figure_cells(report: StudyReport, one: ReportNode, figure: Figure, links: Links) -> list[object]:
    results = one.results
    assert results is not None
    return [
        length_of(report, one.node.id)[0],
        figure.suite,
        figure.task,
        figure.group,
        figure.metric,
        repr(figure.value),
        "" if figure.stderr is None else repr(figure.stderr),
        figure.items,
        int(figure.higher_is_better),
        results.weights,
        links.to(one.folder.path),
        links.to(one.folder.results),
        links.to(one.folder.path / results.suites[figure.suite].file) if figure.suite in results.suites else "",
        links.to(one.folder.path / results.export) if results.export is not None else "",
    ]


def table_csv(report: StudyReport, tables: Sequence[Table]) -> str:
    """The tables: a row for each experiment, arm and column. Figures and differences in their own units."""
    heads = (
        "experiment", "arm", "baseline", "figure", "kind", "score_of", "higher_is_better", "seeds", "mean", "sd",
        "stderr", "difference", "low", "high", "p", "holm_p", "family", "change_percent", "told", "best",
    )  # fmt: skip
    rows = []
    for table in tables:
        for arm in table.arms:
            for column in table.columns:
                if (entry := table.entry(arm, column)) is not None:
                    rows.append(_table_cells(report, table, arm, column, entry))
    return _csv(heads, rows)


def _table_cells(report: StudyReport, table: Table, arm: str, column: Column, entry: Entry) -> list[object]:
    beside, found = entry.beside, entry.beside.found if entry.beside is not None else None
    numbers = [
        entry.mean,
        entry.sd,
        entry.stderr,
        beside.difference if beside is not None else None,
        found.low if found is not None else None,
        found.high if found is not None else None,
        found.p if found is not None else None,
        beside.holm if beside is not None else None,
    ]
    return [
        table.experiment,
        arm,
        table.baseline or "",
        column.key,
        column.kind,
        " ".join(column.parts),
        int(column.higher_is_better),
        len(entry.values),
        *(_shown(number) for number in numbers),
        table.family,
        _shown(beside.relative if beside is not None else None),
        "" if beside is None else int(beside.told(report.words.alpha)),
        int(entry.best),
    ]


def _shown(number: float | None) -> str:
    """Nine digits: what different processors may make of the last is not shown."""
    return "" if number is None else f"{number:.9g}"


def _csv(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    into = io.StringIO()
    writer = csv.writer(into, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    return into.getvalue()


# -- Markdown ----------------------------------------------------------------------------------------------------------


def markdown(contents: Contents, links: Links) -> str:
    """report.md: the page without its colours."""
    report = contents.report
    lines = [f"# {report.plan['study']}: report of a study", ""]
    if report.missing:
        lines += [f"**Incomplete: {len(report.missing)} missing.**", "", *(f"- {_text(m)}" for m in report.missing), ""]
    lines += [f"- {_text(words)}" for words in headline(report, contents.tables)]
    lines += ["", *(f"{_text(note)}\n" for note in contents.notes)]
    for table in contents.tables:
        lines += [f"## {_text(title_of(table))}", ""]
        if not table.columns:
            lines += ["Nothing of these arms is evaluated yet.", ""]
            continue
        lines += [*_results(report, table, links), "", _text(note_of(table, report, "with a *", "Bold")), ""]
        lines += [*(f"- {_text(line)}" for line in findings(report, table)), "", *_comparisons(report, table)]
        for plot in contents.plots.get(table.experiment, ()):
            lines += [f"![{_text(plot.title)}](plots/{plot.name}.svg)", ""]
    lines += _ledgers(contents, links)
    lines += ["## Where the figures are from", ""]
    facts = facts_of(report, contents.tokens)
    lines += _table(["", ""], [[_text(key), _text(value)] for key, value in facts.items()], 2)
    lines += ["", *(f"{_text(words)}\n" for words in contents.tokens.wrong)]
    lines += _nodes(report, links)
    return "\n".join(lines).rstrip() + "\n"


def _results(report: StudyReport, table: Table, links: Links) -> list[str]:
    heads = ["arm", *(_text(c.title + (f", {unit(c)}" if unit(c) else "") + _lower(c)) for c in table.columns)]
    rows = []
    for arm in table.arms:
        end = next((report.end(arm, seed) for seed in report.seeds), None)
        name = _text(report.label(arm)) + (" (baseline)" if arm == table.baseline else "")
        if end is not None and end.folder.path.is_dir():
            name = f"[{name}]({links.to(end.folder.path)}/)"
        cells = []
        for column in table.columns:
            entry = table.entry(arm, column)
            start = table.entry(table.baseline or "", column)
            cells.append("–" if entry is None else _cell(report, entry, start, column))
        rows.append([name, *cells])
    return _table(heads, rows, 1)


def _lower(column: Column) -> str:
    return "" if column.higher_is_better else " (lower is better)"


def _cell(report: StudyReport, entry: Entry, start: Entry | None, column: Column) -> str:
    words = value_words(entry, column)
    words = f"**{words}**" if entry.best else words
    if not (change := cell_change_words(entry, start)):
        return words
    told = entry.beside is not None and entry.beside.told(report.words.alpha)
    return f"{words}<br>{change}{'*' if told else ''}"


def _comparisons(report: StudyReport, table: Table) -> list[str]:
    rows = []
    for column in table.columns:
        for arm in table.arms:
            entry = table.entry(arm, column)
            if entry is None or entry.beside is None:
                continue
            beside = entry.beside
            rows.append(
                [
                    _text(column.title),
                    _text(report.label(arm)),
                    interval_words(beside, column),
                    change_words(beside),
                    p_words(beside.found.p if beside.found is not None else None),
                    p_words(beside.holm),
                    str(len(beside.seeds)),
                ]
            )
    if not rows:
        return []
    heads = ["figure", "arm", "difference and 95 % interval", "change", "p", "Holm's p", "seeds"]
    title = (
        f"Differences from {_text(report.label(table.baseline or ''))} (in the table a * marks those that are told):"
    )
    return [title, "", *_table(heads, rows, 2), ""]


def _ledgers(contents: Contents, links: Links) -> list[str]:
    rows = [
        [
            f"[{_text(contents.report.label(arm))}]({links.diffs[arm]})",
            str(one.seed),
            *map(_text, one.cells()),
            f"{one.repeated:,}",
        ]
        for arm, diffs in contents.diffs.items()
        for one in diffs
    ]
    if not rows:
        return []
    heads = ["arm", "seed", "aggregate", "order", "differs besides", "tokens trained on twice"]
    return ["## Ledgers beside the baseline", "", *_table(heads, rows, 1), ""]


def _nodes(report: StudyReport, links: Links) -> list[str]:
    rows = []
    for name, one in report.nodes.items():
        where = " · ".join(f"[{words}]({link})" for words, link in links.node(one))
        rows.append(
            [name[:8], _text(one.node.label), str(one.node.seed), tokens_words(report, name), one.state.state, where]
        )
    graph = ["## Nodes", "", "![graph of nodes](plots/graph.svg)", ""]
    return [*graph, *_table(["node", "stage", "seed", "tokens", "state", "where"], rows, 2)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> list[str]:
    marks = [":--" if place < words else "--:" for place in range(len(heads))]
    lines = [heads, marks, *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _text(words: str) -> str:
    """Words that Markdown takes as they are."""
    for letter in "\\`*_|<>[]":
        words = words.replace(letter, "\\" + letter)
    return words
