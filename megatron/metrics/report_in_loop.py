"""What a run could do while it trained: figures of its own checkpoints over tokens, with error bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.metrics.in_loop import main_metric
from megatron.metrics.report_data import ReportData
from megatron.metrics.report_plots import COLOURS, figure, token_axis
from megatron.metrics.report_svg import NARROW, WIDE, Axis, Drawing


@dataclass(frozen=True)
class Curve:
    """One task's figure over tokens: (tokens, value, standard error, step). chance: what guessing gives."""

    task: str
    points: Sequence[tuple[float, float, float, int]]
    chance: float | None


def column_name(record: Mapping[str, Any]) -> str:
    """The head of a checkpoint's column: its training stage and step."""
    about = record["evaluated"]
    return f"{about['training_stage']}, step {about['step']:,}"


def in_loop_plots(data: ReportData) -> str:
    """A figure for each metric: shares of items on one scale, bits a byte and others on their own."""
    by_metric: dict[str, list[Curve]] = {}
    for task, metric in _tasks(data).items():
        points = _points(data, task, metric)
        if points:
            chance = _known(data, task).get("chance") if metric.startswith("acc") else None
            by_metric.setdefault(_scale(metric), []).append(Curve(task, points, chance))
    return "".join(_plot(data, scale, curves, n) for n, (scale, curves) in enumerate(by_metric.items()))


def _tasks(data: ReportData) -> dict[str, str]:
    """The metric to show of each task that was ever evaluated."""
    found: dict[str, str] = {}
    for record in data.in_loop:
        for task, result in record["models"][0]["results"].items():
            metric = main_metric(result["metrics"], _known(data, task).get("metric"))
            if metric is not None:
                found.setdefault(task, metric)
    return found


def _known(data: ReportData, task: str) -> Mapping[str, Any]:
    return next((r["tasks"][task] for r in data.in_loop if task in r.get("tasks", {})), {})


def _points(data: ReportData, task: str, metric: str) -> list[tuple[float, float, float, int]]:
    points = []
    for record in data.in_loop:
        about, result = record["evaluated"], record["models"][0]["results"].get(task, {})
        found = result.get("metrics", {}).get(metric)
        if found and found["value"] is not None:
            error = found["stderr"] or 0.0
            points.append((float(about["consumed_tokens"]), float(found["value"]), float(error), int(about["step"])))
    return points


def _scale(metric: str) -> str:
    """Shares of items have one scale, whatever they are called."""
    return "accuracy" if metric.startswith(("acc", "exact_match", "pass@")) else metric


def _plot(data: ReportData, scale: str, curves: Sequence[Curve], number: int) -> str:
    low = min(value - 2.2 * error for curve in curves for _, value, error, _ in curve.points)
    high = max(value + 2.2 * error for curve in curves for _, value, error, _ in curve.points)
    chances = sorted({curve.chance for curve in curves if curve.chance is not None})
    low, high = min([low, *chances]), max([high, *chances])
    margin = 0.06 * ((high - low) or abs(high) or 1.0)
    share, identity = scale == "accuracy", f"in-loop-{number}"
    if share:
        vertical = Axis("share of items", max(0.0, low - margin), min(1.0, high + margin), "percent")
    else:
        vertical = Axis(scale.replace("_", " "), low - margin, high + margin)
    across = token_axis(data)
    last = max(tokens for curve in curves for tokens, _, _, _ in curve.points)
    across = Axis(across.label, across.low, max(across.high, last), across.form)
    svgs = []
    for size in (WIDE, NARROW):
        drawing = Drawing(size, across, vertical)
        drawing.bands(data.bands())
        drawing.axes()
        for chance in chances:
            drawing.line([(across.low, chance), (across.high, chance)], "plan")
        for place, curve in enumerate(curves):
            _draw(drawing, curve, f"c{place % COLOURS}", (place - (len(curves) - 1) / 2) * 3.0)
        svgs.append(drawing.svg(identity, f"{scale} over tokens. {_spoken(curves)}"))
    legend = [(f"point c{place % COLOURS}", curve.task) for place, curve in enumerate(curves)]
    legend += [("plan", f"chance {100 * chance:.0f}%") for chance in chances]
    caption = "The run's own checkpoints. Bars: 95 % intervals, 1.96 standard errors each way."
    title = "Tasks while it trained" if share else f"{scale.replace('_', ' ').capitalize()} while it trained"
    return figure(identity, title, caption, legend, svgs)


def _draw(drawing: Drawing, curve: Curve, css: str, beside: float) -> None:
    """The curve; `beside` pixels to the right, so that bars of several tasks do not hide each other."""
    drawing.line([(tokens, value) for tokens, value, _, _ in curve.points], f"{css} faint")
    for tokens, value, error, _ in curve.points:
        left, right = drawing.size.left + 2.0, drawing.size.width - drawing.size.right - 2.0
        x = min(max(drawing.px(tokens) + beside, left), right)
        top, bottom = drawing.py(value + 1.96 * error), drawing.py(value - 1.96 * error)
        if error:
            drawing.add(f'<line class="bar {css}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>', True)
        drawing.add(f'<circle class="dot {css}" cx="{x:.1f}" cy="{drawing.py(value):.1f}" r="3.6"/>', True)


def _spoken(curves: Sequence[Curve]) -> str:
    said = []
    for curve in curves:
        figures = (f"step {step} {value:.4g}, standard error {error:.2g}" for _, value, error, step in curve.points)
        said.append(f"{curve.task}: {'; '.join(figures)}")
    return ". ".join(said) + "."
