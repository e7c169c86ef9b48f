"""The report's HTML: headline figures, sections, tables. One file, nothing from outside it, no script."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron.metrics.report_data import ReportData
from megatron.metrics.report_in_loop import column_name, in_loop_plots
from megatron.metrics.report_plots import accuracy_rows, evaluation_plot
from megatron.metrics.report_style import STYLE
from megatron.metrics.report_svg import short_count

Cell = tuple[str, str]


def page(data: ReportData, sections: Sequence[tuple[str, str]]) -> str:
    """The whole document. `sections` are (heading, HTML)."""
    body = "".join(f"<section><h2>{escape(heading)}</h2>{html}</section>" for heading, html in sections)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in data.notes)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(data.name)} · Stagemix report</title><style>{STYLE}</style></head><body><main>"
        f'<header><p class="kind">Stagemix · training report</p><h1>{escape(data.name)}</h1>'
        f'<p class="lead">{escape(lead(data))}</p>{headline(data)}{notes}</header>{body}'
        "<footer>Made by <code>stagemix report</code> from the run's own metrics and ledger.</footer>"
        "</main></body></html>\n"
    )


def lead(data: ReportData) -> str:
    """One sentence that says what was done."""
    size = f"A decoder of {short_count(round_to(data.parameters, 3))} parameters" if data.parameters else "A decoder"
    bands = data.bands()
    if not bands:
        return f"{size}. Nothing has been trained yet."
    stages = [f"{band.name} ({short_count(round_to(band.end - band.start, 3))} tokens)" for band in bands]
    path = stages[0] if len(stages) == 1 else f"{', '.join(stages[:-1])} and {stages[-1]}"
    planned = len(data.planned)
    noun = "training stage" if len(bands) == 1 else "training stages"
    progress = f" The plan has {planned} stages; the run is in number {len(bands)}." if planned > len(bands) else ""
    return f"{size}, trained on {len(data.sources)} sources through {len(bands)} {noun}: {path}.{progress}"


def headline(data: ReportData) -> str:
    """The figures that a reader looks for first."""
    figures: list[tuple[str, str]] = []
    if data.parameters:
        figures.append((short_count(round_to(data.parameters, 3)), "parameters"))
    figures.append((short_count(round_to(data.tokens, 3)), "tokens trained on"))
    if data.steps:
        figures.append((f"{data.steps[-1]['step']:,}", "optimizer steps"))
        figures.append((duration(sum(row.get("step_seconds") or 0.0 for row in data.steps)), "training time"))
        speeds = [row["tokens_per_second"] for row in data.steps if row.get("tokens_per_second")]
        if speeds:
            figures.append((short_count(round_to(statistics.median(speeds), 3)), "tokens a second, median"))
    if data.validations:
        last = data.validations[-1]["validation"]
        figures += [(f"{last[name]:.3f}", f"held-out loss, {name}") for name in data.sources if last.get(name)]
    passed_over = sum(bool(row.get("passed_over")) for row in data.steps)
    skipped = sum(bool(row.get("skipped")) for row in data.steps) - passed_over
    if skipped:
        figures.append((str(skipped), "steps without an update (not finite, or a spike)"))
    if passed_over:
        figures.append((str(passed_over), "steps passed over after a spike"))
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(words)}</span></div>" for value, words in figures)
    return f'<div class="figures">{cells}</div>'


def ledger_table(data: ReportData) -> str:
    """Training stage x source: what was asked for, what was done."""
    if not data.ledger:
        return '<p class="absent">No checkpoint with a ledger was found, so the exact account is missing here.</p>'
    rows = [
        [
            ("left", row["training_stage"]),
            ("left", row["source"]),
            ("left", row["group"]),
            ("", f"{row['samples']:,}"),
            ("", f"{row['target']:,.2f}"),
            ("", f"{row['error']:+.2f}".replace("-", "−")),
            ("", short_count(round_to(row["tokens"], 4))),
            ("", f"{100 * row['share']:.2f}%"),
            ("", f"{row['epochs']:.3f}"),
        ]
        for row in data.ledger
    ]
    heads = ["training stage", "source", "group", "samples", "target", "error", "tokens", "share", "epochs"]
    worst = max(abs(row["error"]) for row in data.ledger)
    text = f"The largest error is {worst:.2f} of a sample: every source stays within one sample of its target."
    note = f'<p class="note">{text if worst < 1 else f"The largest error is {worst:.2f} samples."}</p>'
    return table(heads, rows, 3) + note


def evaluation_section(data: ReportData) -> str:
    """Plots and tables of what was evaluated while it trained, then of every evaluation file."""
    if not data.evaluations and not data.in_loop:
        return (
            '<p class="absent">No evaluation was given. Make one with <code>stagemix evaluate</code> and pass it with '
            "<code>--evaluation</code>.</p>"
        )
    files = [_evaluation(evaluation, number) for number, evaluation in enumerate(data.evaluations)]
    return in_loop_plots(data) + _in_loop(data) + "".join(files)


def _in_loop(data: ReportData) -> str:
    """A table with a column for each checkpoint that was evaluated while the run trained."""
    if not data.in_loop:
        return ""
    models = [{**record["models"][0], "name": column_name(record)} for record in data.in_loop]
    tasks = {name: known for record in data.in_loop for name, known in record.get("tasks", {}).items()}
    return _results_table({**data.in_loop[-1], "models": models, "tasks": tasks})


def _evaluation(evaluation: Mapping[str, Any], number: int) -> str:
    """One file: the plot, and the table."""
    return evaluation_plot(evaluation, f"evaluation-{number}") + _results_table(evaluation)


def _results_table(evaluation: Mapping[str, Any]) -> str:
    """A column for each model, a row for each metric of a task."""
    models = evaluation["models"]
    kinds = dict.fromkeys(
        (t, m) for model in models for t, result in model["results"].items() for m in result["metrics"]
    )
    rows: list[list[Cell]] = []
    for task, metric in kinds:
        if metric == "word_perplexity":
            continue  # of little meaning for code, and a matter of taste for text: bits a byte say the same, fairly
        chance = evaluation.get("tasks", {}).get(task, {}).get("chance") if metric.startswith("acc") else None
        results = [model["results"].get(task, {}) for model in models]
        items = max(result.get("items", 0) for result in results)
        cells = [_found(metric, result.get("metrics", {}).get(metric), chance) for result in results]
        least = f"{100 * chance:.0f}%" if chance is not None else "–"
        rows.append([("left", task), ("left", metric), ("", f"{items:,}"), ("", least), *cells])
    heads = ["task", "metric", "items", "chance", *(model["name"] for model in models)]
    made = ", ".join(str(evaluation[key]) for key in ("harness", "dtype", "device") if evaluation.get(key))
    better = " Bold: above chance by more than two standard errors." if accuracy_rows(evaluation) else ""
    note = f'<p class="note">{escape(made)}. Values with one standard error.{better}</p>'
    return table(heads, rows, 2) + note


def _found(metric: str, found: Mapping[str, Any] | None, chance: float | None) -> Cell:
    if not found or found["value"] is None:
        return "", "–"
    scale, digits = (100, ".1f") if metric.startswith("acc") else (1, ".3f")
    words = f"{scale * found['value']:{digits}}" + ("%" if scale == 100 else "")
    if found["stderr"] is not None:
        words += f" ± {scale * found['stderr']:{digits}}"
    above = chance is not None and found["value"] - chance > 2 * (found["stderr"] or 0.0)
    return "better" if above else "", words


def facts_section(data: ReportData) -> str:
    """What ran, and the resolved config folded away."""
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in data.facts.items())
    facts = f'<div class="scroll"><table class="facts">{rows}</table></div>' if rows else ""
    if not data.config:
        return facts + '<p class="absent">The resolved config was not found.</p>'
    return facts + f"<details><summary>The resolved config</summary><pre>{escape(data.config)}</pre></details>"


def table(heads: Sequence[str], rows: Sequence[Sequence[Cell]], words: int) -> str:
    """A table that scrolls by itself where it is too wide; the first `words` columns are words."""
    head = "".join(
        f'<th scope="col"{_class("left" if i < words else "")}>{escape(h)}</th>' for i, h in enumerate(heads)
    )
    body = "".join(
        "<tr>" + "".join(f"<td{_class(css)}>{escape(str(cell))}</td>" for css, cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _class(css: str) -> str:
    return f' class="{css}"' if css else ""


def round_to(value: float | None, digits: int) -> float:
    """Rounded to so many significant digits."""
    return float(f"{value or 0:.{digits}g}")


def duration(seconds: float) -> str:
    """4210 -> "1 h 10 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.1f} days"
