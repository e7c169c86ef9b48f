"""The plots of a report: mixture, loss, learning rate, throughput, gradient norm, evaluation. Each is a <figure>."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from megatron.metrics.report_data import Band, Point, ReportData, binned, planned_shares, realised_shares, series
from megatron.metrics.report_svg import NARROW, WIDE, Axis, Drawing, Size, short_count

COLOURS = 8


@dataclass(frozen=True)
class Line:
    """A named line. `faint` points are drawn behind it: the values before smoothing. `dots` are measurements."""

    name: str
    css: str
    points: Sequence[Point]
    faint: Sequence[Point] = ()
    dots: Sequence[Point] = ()


def figure(identity: str, title: str, caption: str, legend: Sequence[tuple[str, str]], svgs: Sequence[str]) -> str:
    """The figure's HTML: title, legend (css class of the swatch, words), both drawings, caption."""
    items = "".join(f'<li><i class="swatch {css}"></i>{escape(words)}</li>' for css, words in legend)
    return (
        f'<figure id="{identity}"><h3>{escape(title)}</h3><ul class="legend">{items}</ul>{"".join(svgs)}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def colour(data: ReportData, source: str) -> str:
    """The CSS class of a source, the same in every plot."""
    return f"c{data.sources.index(source) % COLOURS}"


def token_axis(data: ReportData) -> Axis:
    """The common horizontal axis."""
    return Axis("tokens trained on", 0.0, data.tokens or 1.0, "count")


def mixture_plot(data: ReportData) -> str:
    """Realised shares as a stacked area, planned bounds between sources dashed on top."""
    realised, planned = realised_shares(data), planned_shares(data)
    bands = data.planned_bands() or data.bands()
    axis = Axis("tokens trained on", 0.0, max(data.tokens, bands[-1].end), "count")
    svgs = []
    spoken = "; ".join(f"stage {band.name}: {_spoken_shares(data, band)}" for band in data.bands())
    for size in (WIDE, NARROW):
        drawing = Drawing(size, axis, Axis("share of samples", 0.0, 1.0, "percent"))
        below = [0.0] * len(realised)
        for source in data.sources:
            lower = _stairs(realised, below)
            below = [base + shares[source] for base, (_, _, shares) in zip(below, realised, strict=True)]
            drawing.area(_stairs(realised, below), lower, colour(data, source))
        drawing.bands(bands)
        drawing.axes()
        together = [0.0] * len(planned)
        for source in data.sources[:-1]:
            together = [base + shares[source] for base, (_, shares) in zip(together, planned, strict=True)]
            drawing.line([(x, y) for (x, _), y in zip(planned, together, strict=True)], "plan")
        svgs.append(drawing.svg("mixture", f"Stacked area: share of samples by source over tokens. {spoken}."))
    legend = [(f"block {colour(data, source)}", f"{source}, realised") for source in data.sources]
    if planned:
        legend.append(("plan", "planned"))
    caption = "Filled: what was trained on, counted sample by sample. Dashed: what the config asked for."
    if not planned:
        caption = "What was trained on, counted sample by sample. The plan was not found."
    return figure("mixture", "Mixture over tokens", caption, legend, svgs)


def _stairs(stretches: Sequence[tuple[float, float, Mapping[str, float]]], heights: Sequence[float]) -> list[Point]:
    return [
        point
        for (start, end, _), height in zip(stretches, heights, strict=True)
        for point in ((start, height), (end, height))
    ]


def _spoken_shares(data: ReportData, band: Band) -> str:
    rows = [row for row in data.steps if row["training_stage"] == band.name]
    counts = {source: sum(row["samples_by_source"].get(source, 0) for row in rows) for source in data.sources}
    total = max(1, sum(counts.values()))
    return ", ".join(f"{source} {100 * count / total:.1f} percent" for source, count in counts.items())


def loss_plot(data: ReportData) -> str:
    """Training loss by source, smoothed over the raw values, with validation points."""
    lines = []
    for source in data.sources:
        raw = series(data.steps, lambda row, s=source: row.get("loss_by_source", {}).get(s))  # type: ignore[misc]
        held = series(data.validations, lambda row, s=source: row["validation"].get(s))  # type: ignore[misc]
        lines.append(Line(source, colour(data, source), binned(raw, 70), binned(raw, 420), held))
    legend = [(line.css, f"{line.name}, training") for line in lines]
    legend += [(f"point {line.css}", f"{line.name}, held out") for line in lines if line.dots]
    caption = "Mean loss of a source's own tokens; pale: single steps. Dots: the same held-out documents each time."
    if not data.validations:
        caption += " This run was not validated."
    return lines_figure(data, "loss", "Loss by source", "loss (nats a token)", lines, legend, caption)


def rate_plot(data: ReportData) -> str:
    """The learning rate."""
    points = series(data.steps, lambda row: row.get("lr"))
    lines = [Line("learning rate", "c0", _corners(points))]
    caption = "As applied at each step."
    axis = "learning rate"
    return lines_figure(data, "rate", "Learning rate", axis, lines, [("c0", "learning rate")], caption, True, "power")


def _corners(points: Sequence[Point], most: int = 400) -> list[Point]:
    """Thinned without averaging: a schedule's corners matter."""
    step = max(1, len(points) // most)
    return [point for index, point in enumerate(points) if index % step == 0 or index == len(points) - 1]


def throughput_plot(data: ReportData) -> str:
    """Tokens a second."""
    points = series(data.steps, lambda row: row.get("tokens_per_second"))
    lines = [Line("tokens a second", "c2", binned(points, 70), binned(points, 420))]
    legend = [("c2", "mean of neighbouring steps"), ("c2 faint", "single steps")]
    middle = statistics.median(y for _, y in points) if points else 0.0
    caption = f"Median {short_count(middle)} tokens/s; validation and checkpoints are left out of the time."
    title, axis = "Throughput", "tokens / s"
    return lines_figure(data, "throughput", title, axis, lines, legend, caption, True, "count")


def norm_plot(data: ReportData) -> str:
    """Gradient norm before clipping; steps without an update are marked."""
    points = series(data.steps, lambda row: row.get("grad_norm"))
    left_out = [(float(row["consumed_tokens"]), 0.0) for row in data.steps if row.get("skipped")]
    lines = [Line("gradient norm", "c1", binned(points, 70), binned(points, 420), left_out)]
    legend = [("c1", "mean of neighbouring steps"), ("c1 faint", "single steps")]
    if left_out:
        legend.append(("point c1", "step without an update"))
    caption = "L2 norm over all parameters, before clipping."
    return lines_figure(data, "norm", "Gradient norm", "gradient norm (L2)", lines, legend, caption, True)


def lines_figure(
    data: ReportData,
    identity: str,
    title: str,
    axis: str,
    lines: Sequence[Line],
    legend: Sequence[tuple[str, str]],
    caption: str,
    from_zero: bool = False,
    form: str = "plain",
) -> str:
    """A figure of lines over tokens; a plot with nothing to show says so."""
    values = [y for line in lines for _, y in (*line.points, *line.dots)]
    if not values:
        return f'<figure id="{identity}"><h3>{escape(title)}</h3><p class="absent">Nothing was recorded.</p></figure>'
    low, high = (0.0 if from_zero else min(values)), max(values)
    margin = 0.06 * ((high - low) or abs(high) or 1.0)
    vertical = Axis(axis, low if from_zero else low - margin, high + margin, form)
    svgs = []
    for size in (WIDE, NARROW):
        drawing = Drawing(size, token_axis(data), vertical)
        drawing.bands(data.bands())
        drawing.axes()
        for line in lines:
            drawing.line(line.faint, f"{line.css} faint")
        for line in lines:
            drawing.line(line.points, line.css)
            drawing.dots(line.dots, line.css)
        svgs.append(drawing.svg(identity, f"{title} over tokens. {_spoken_lines(lines)}"))
    return figure(identity, title, caption, legend, svgs)


def _spoken_lines(lines: Sequence[Line]) -> str:
    said = []
    for line in lines:
        if line.points:
            said.append(f"{line.name}: from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}")
        if line.dots and line.dots[-1][1]:
            said.append(f"{line.name} held out: last {line.dots[-1][1]:.4g}")
    return "; ".join(said) + "."


def evaluation_plot(evaluation: Mapping[str, Any], identity: str) -> str:
    """Accuracy of each model on each task with 95 % intervals, beside chance."""
    rows = accuracy_rows(evaluation)
    if not rows:
        return ""
    models = [model["name"] for model in evaluation["models"]]
    tasks = list(dict.fromkeys(task for task, _, _, _ in rows))
    chances = {task: evaluation.get("tasks", {}).get(task, {}).get("chance") for task in tasks}
    svgs = []
    for size in (WIDE, NARROW):
        height = 70 + len(tasks) * (26 + 20 * len(models))
        left = 150 if size is WIDE else 24
        svgs.append(
            _accuracy_drawing(Size(size.name, size.width, height, left), rows, models, tasks, chances, identity)
        )
    legend = [(f"point c{number % COLOURS}", name) for number, name in enumerate(models)]
    if any(chance is not None for chance in chances.values()):
        legend.append(("chance", "chance"))
    by_context = any("acc_mutual_info" in r["metrics"] for m in evaluation["models"] for r in m["results"].values())
    how = "the continuation whose likelihood the context raises most" if by_context else "acc"
    caption = f"Share of questions answered rightly ({how}). Bars: 95 % intervals, 1.96 standard errors each way."
    title = "Which continuation is the true one?" if evaluation.get("suite") == "heldout" else "Accuracy by task"
    return figure(identity, title, caption, legend, svgs)


def accuracy_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str, float, float]]:
    """(task, model, accuracy, standard error) of every task that has an accuracy; of several, that by mutual
    information."""
    rows = []
    for model in evaluation["models"]:
        for task, result in model["results"].items():
            found = result["metrics"].get("acc_mutual_info") or result["metrics"].get("acc")
            if found and found["value"] is not None:
                rows.append((task, model["name"], found["value"], found["stderr"] or 0.0))
    return rows


def _accuracy_drawing(
    size: Size,
    rows: Sequence[tuple[str, str, float, float]],
    models: Sequence[str],
    tasks: Sequence[str],
    chances: Mapping[str, float | None],
    identity: str,
) -> str:
    known = [chance for chance in chances.values() if chance is not None]
    high = max([value + 2.2 * error for _, _, value, error in rows] + known)
    low = min([value - 2.2 * error for _, _, value, error in rows] + known)
    across = Axis("accuracy", max(0.0, low - 0.06), min(1.0, high + 0.04), "percent")
    drawing = Drawing(size, across, Axis("", 0, 1))
    top, bottom = size.top, size.height - size.bottom
    for value in across.ticks(6 if size.width > 500 else 4):
        x = drawing.px(value)
        drawing.add(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        drawing.add(f'<text class="tick mid" x="{x:.1f}" y="{bottom + 17}">{across.text(value)}</text>')
    middle = (size.left + size.width - size.right) / 2
    drawing.add(f'<text class="label mid" x="{middle:.0f}" y="{size.height - 6}">accuracy (share of questions)</text>')
    block = (bottom - top) / len(tasks)
    for number, task in enumerate(tasks):
        start = top + number * block
        if size.left > 100:
            place = f'class="task end" x="{size.left - 12}" y="{start + block / 2 + 4:.1f}"'
        else:
            place = f'class="task" x="{size.left}" y="{start + 13:.1f}"'
        drawing.add(f"<text {place}>{escape(task)}</text>")
        if (chance := chances[task]) is not None:
            x, above = drawing.px(chance), start + (4 if size.left > 100 else 20)
            drawing.add(
                f'<line class="chance" x1="{x:.1f}" x2="{x:.1f}" y1="{above:.1f}" y2="{start + block - 4:.1f}"/>'
            )
        for name, value, error in ((m, v, e) for t, m, v, e in rows if t == task):
            place_in_block = (models.index(name) + 0.5) / len(models)
            y = start + 20 + place_in_block * (block - 26)
            css = f"c{models.index(name) % COLOURS}"
            left, right = drawing.px(value - 1.96 * error), drawing.px(value + 1.96 * error)
            drawing.add(f'<line class="bar {css}" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            drawing.add(f'<circle class="dot {css}" cx="{drawing.px(value):.1f}" cy="{y:.1f}" r="4.5"/>')
    spoken = "; ".join(
        f"{task}, {model}: {100 * v:.1f} percent, standard error {100 * e:.1f}" for task, model, v, e in rows
    )
    return drawing.svg(identity, f"Accuracy by task and model. {spoken}.")
