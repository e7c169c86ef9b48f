"""index.html: the whole report of a study in one file, without script and without anything from outside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from megatron.config.quantities import format_count
from megatron.metrics.report_page import Cell, table
from megatron.metrics.report_plots import figure
from megatron.metrics.report_style import STYLE
from megatron.study.page import graph_figure
from megatron.study.report_columns import Column
from megatron.study.report_data import StudyReport
from megatron.study.report_diffs import LedgerDiff
from megatron.study.report_links import Links
from megatron.study.report_plots import Plot
from megatron.study.report_provenance import Tokens, facts_of, study_texts, tokens_words
from megatron.study.report_style import OWN_STYLE
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


@dataclass(frozen=True)
class Contents:
    """All that a report shows. plots: of each experiment by its name · diffs: of each arm · notes: on what was read."""

    report: StudyReport
    tables: Sequence[Table]
    plots: Mapping[str, Sequence[Plot]]
    diffs: Mapping[str, Sequence[LedgerDiff]]
    tokens: Tokens
    notes: Sequence[str]


def study_report_page(contents: Contents, links: Links) -> str:
    """The document."""
    report = contents.report
    sections: list[tuple[str, str]] = []
    for one in contents.tables:
        plots = "".join(_figure(plot) for plot in contents.plots.get(one.experiment, ()))
        said = "".join(f"<li>{escape(line)}</li>" for line in findings(report, one))
        words = f'<ul class="said">{said}</ul>' if said else ""
        sections.append((title_of(one), _results(report, one, links) + words + _comparisons(report, one) + plots))
    sections += [
        ("Nodes", _graph(report, links) + _nodes(report, links)),
        ("Ledgers beside the baseline", _ledgers(contents, links)),
        ("Where the figures are from", _provenance(contents)),
    ]
    body = "".join(f"<section><h2>{escape(heading)}</h2>{html}</section>" for heading, html in sections if html)
    name = escape(str(report.plan["study"]))
    top = "".join(f"<li>{escape(line)}</li>" for line in headline(report, contents.tables))
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in contents.notes)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name} · Stagemix study</title><style>{STYLE}{OWN_STYLE}</style></head><body><main>"
        f'<header><p class="kind">Stagemix · report of a study</p><h1>{name}</h1>{_banner(report)}'
        f'<p class="lead">{escape(_lead(contents))}</p><ul class="said">{top}</ul>{notes}</header>{body}'
        "<footer>Made by <code>stagemix study report</code> from the nodes' results, metrics and ledgers. How to read "
        "it: docs/studies.md, Reading a result.</footer></main></body></html>\n"
    )


def _banner(report: StudyReport) -> str:
    """What is missing, before anything else."""
    if not report.missing:
        return ""
    items = "".join(f"<li>{escape(words)}</li>" for words in report.missing)
    return f'<div class="banner"><p>Incomplete: {len(report.missing)} missing.</p><ul>{items}</ul></div>'


def _lead(contents: Contents) -> str:
    report, tokens = contents.report, contents.tokens
    seeds = len(report.seeds)
    padding = f"; {format_count(tokens.padding)} of those trained are padding" if tokens.padding else ""
    trained = (
        f" {format_count(tokens.trained)} tokens were trained, {format_count(tokens.naive)} had every arm been trained "
        f"alone ({tokens.ratio:.3f}, by the ledgers{padding})."
        if tokens.trained and tokens.naive
        else ""
    )
    beside = f", beside {report.label(report.baseline)}" if report.baseline else ""
    return f"{len(report.arms)} arms{beside}, {seeds} seed{'s' if seeds > 1 else ''}.{trained}"


def _figure(plot: Plot) -> str:
    html = figure(plot.name, plot.title, plot.caption, plot.legend, (plot.wide, plot.narrow))
    return html.replace("</figcaption>", f' <a href="plots/{plot.name}.svg">svg</a></figcaption>')


# -- tables ------------------------------------------------------------------------------------------------------------


def _results(report: StudyReport, one: Table, links: Links) -> str:
    if not one.columns:
        return '<p class="absent">Nothing of these arms is evaluated yet.</p>'
    heads = "".join(f'<th scope="col">{_head(column)}</th>' for column in one.columns)
    rows = []
    for arm in one.arms:
        mark = "<small>baseline</small>" if arm == one.baseline else ""
        cells = "".join(_cell(report, one, arm, column, links) for column in one.columns)
        css = ' class="base"' if arm == one.baseline else ""
        rows.append(f"<tr{css}><td>{escape(report.label(arm))}{mark}</td>{cells}</tr>")
    return (
        f'<div class="scroll results"><table><thead><tr><th scope="col">arm</th>{heads}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="note">{escape(note_of(one, report))} A click on a '
        "figure shows where it is from.</p>"
    )


def _head(column: Column) -> str:
    below = [word for word in (unit(column), "" if column.higher_is_better else "lower is better") if word]
    if column.score:
        below.append(f"mean of {len(column.parts)}" if len(column.parts) > 1 else column.parts[0])
    if column.chance is not None:
        below.append(f"chance {100 * column.chance:.0f}")
    small = re.sub(r"([/_])", r"\1<wbr>", escape(", ".join(below)))  # long keys break where a reader would
    return escape(column.title) + (f"<small>{small}</small>" if below else "")


def _cell(report: StudyReport, one: Table, arm: str, column: Column, links: Links) -> str:
    entry = one.entry(arm, column)
    if entry is None:
        return "<td>–</td>"
    change = ""
    if words := cell_change_words(entry, one.entry(one.baseline or "", column)):
        told = ' class="told"' if entry.beside is not None and entry.beside.told(report.words.alpha) else ""
        change = f"<small{told}>{escape(words)}</small>"
    where = "".join(f"<p>{escape(words)}: {_anchors(found)}</p>" for words, found in links.cell(arm, column))
    best = ' class="best"' if entry.best else ""
    shown = f"<b>{escape(value_words(entry, column))}</b>"
    return f"<td{best}><details><summary>{shown}{change}</summary>{where}</details></td>"


def _anchors(links: Sequence[tuple[str, str]]) -> str:
    return " · ".join(f'<a href="{escape(link)}">{escape(words)}</a>' for words, link in links)


def _comparisons(report: StudyReport, one: Table) -> str:
    """Every difference from the baseline with its interval, folded away."""
    rows: list[list[Cell]] = []
    for column in one.columns:
        for arm in one.arms:
            entry = one.entry(arm, column)
            if entry is not None and entry.beside is not None:
                rows.append(_comparison(report, arm, column, entry))
    if not rows:
        return ""
    heads = ["figure", "arm", "difference and 95 % interval", "change", "p", "Holm's p", "told", "seeds", "items"]
    body = table(heads, rows, 2)
    summary = f"Differences from {report.label(one.baseline or '')}, with intervals"
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _comparison(report: StudyReport, arm: str, column: Column, entry: Entry) -> list[Cell]:
    beside = entry.beside
    assert beside is not None
    told = beside.told(report.words.alpha)
    return [
        ("left", column.title + (f", {unit(column)}" if unit(column) else "")),
        ("left", report.label(arm)),
        ("", interval_words(beside, column)),
        ("", change_words(beside)),
        ("", p_words(beside.found.p if beside.found is not None else None)),
        ("better" if told else "", p_words(beside.holm)),
        (
            "",
            "yes" if told else "no" if beside.found is not None else "noise not known" if not beside.same_node else "",
        ),
        ("", str(len(beside.seeds))),
        ("", f"{max(value.items for value in entry.values.values()):,}"),
    ]


# -- nodes, ledgers, provenance ----------------------------------------------------------------------------------------


def _graph(report: StudyReport, links: Links) -> str:
    undone = [name for name, one in report.nodes.items() if not one.trained]
    targets = {
        name: f"runs/{name}.html" if name in links.runs else links.to(one.folder.path) + "/"
        for name, one in report.nodes.items()
        if one.folder.path.is_dir()
    }
    seeds = report.seeds
    same = f", the same for each of {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
    note = (
        f'<p class="note">Seed {seeds[0]}{same}. Blue frame: needed by several arms. Dashed red: not trained yet. '
        '<a href="plots/graph.svg">svg</a></p>'
    )
    return graph_figure(report.plan, undone, targets) + note


def graph_of(report: StudyReport) -> str:
    """The graph without links."""
    return graph_figure(report.plan, [name for name, one in report.nodes.items() if not one.trained])


def _nodes(report: StudyReport, links: Links) -> str:
    rows = []
    for name, one in report.nodes.items():
        left = [name[:8], escape(one.node.label), escape(one.state.state), _anchors(links.node(one))]
        words = "".join(f'<td class="left">{cell}</td>' for cell in left)
        rows.append(f"<tr>{words}<td>{one.node.seed}</td><td>{tokens_words(report, name)}</td></tr>")
    heads = "".join(f'<th scope="col" class="left">{head}</th>' for head in ("node", "stage", "state", "where"))
    heads += "".join(f'<th scope="col">{head}</th>' for head in ("seed", "tokens"))
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _ledgers(contents: Contents, links: Links) -> str:
    rows = []
    for arm, diffs in contents.diffs.items():
        for one in diffs:
            left = [_anchors([(contents.report.label(arm), links.diffs[arm])]), *map(escape, one.cells())]
            words = "".join(f'<td class="left">{cell}</td>' for cell in left)
            rows.append(f"<tr>{words}<td>{one.seed}</td><td>{one.repeated:,}</td></tr>")
    if not rows:
        return ""
    heads = "".join(
        f'<th scope="col" class="left">{head}</th>' for head in ("arm", "aggregate", "order", "differs besides")
    )
    heads += "".join(f'<th scope="col">{head}</th>' for head in ("seed", "tokens trained on twice"))
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _provenance(contents: Contents) -> str:
    facts = facts_of(contents.report, contents.tokens)
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in facts.items())
    wrong = "".join(f'<p class="note">{escape(words)}</p>' for words in contents.tokens.wrong)
    texts = "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
        for name, text in study_texts(contents.report).items()
    )
    return f'<div class="scroll"><table class="facts">{rows}</table></div>{wrong}{texts}'
