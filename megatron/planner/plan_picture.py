"""The plan as a picture: mixture, learning rate and epochs over tokens. The one file that imports matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.config.errors import UnavailableError
from megatron.config.quantities import format_count
from megatron.planner.mixture_slices import Ink, corners_of, inks
from megatron.planner.plan_curves import epoch_curve, rate_curves
from megatron.planner.plan_page import write_aside
from megatron.planner.repetition import MARKS
from megatron.planner.resolve import ResolvedRun

_INK, _SOFT, _PAPER = "#1d2026", "#5d6470", "#ffffff"


def write_picture(path: Path, name: str, run: ResolvedRun, plan: Mapping[str, Any]) -> Path:
    """Draws without a display. Raises UnavailableError where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UnavailableError("--png needs matplotlib: pip install 'stagemix[plot]', or use --html") from None
    ink = inks(run.schedule)
    # a legend of many sources needs the height that it needs
    height = max(8.4, 1.2 + 0.23 * (len(ink) + len(plan["groups"])))
    figure = Figure(figsize=(11.5, height), dpi=150, facecolor=_PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1.2, 1.2]})
    total = f"{format_count(plan['tokens'])} tokens, {plan['steps']:,} steps"
    figure.suptitle(f"{name}   ·   {total}", x=0.012, ha="left", fontsize=14, color=_INK, fontweight="bold")
    _mixture(axes[0], run, ink)
    _rates(axes[1], run)
    _epochs(axes[2], run, plan, ink)
    for axis in axes:
        _frame(axis, run, plan)
    _name_stages(axes[0], plan)
    axes[2].set_xlabel("tokens", color=_SOFT)
    axes[2].xaxis.set_major_formatter(lambda value, _: format_count(value) if value >= 0 else "")
    _legend(figure, run, ink)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": "stagemix plan"})
    return write_aside(path, content.getvalue())


def _mixture(axis: Any, run: ResolvedRun, ink: Mapping[str, Ink]) -> None:
    for stage in run.schedule.stages:
        corners = corners_of(stage, list(ink))
        tokens = [corner.token for corner in corners]
        shares = [[corner.shares[name] for corner in corners] for name in ink]
        axis.stackplot(tokens, shares, colors=[its.light for its in ink.values()], edgecolor=_PAPER, linewidth=0.4)
    axis.set_ylim(0, 1)
    axis.set_ylabel("share of tokens", color=_SOFT)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _rates(axis: Any, run: ResolvedRun) -> None:
    curves = rate_curves(run.schedule, run.lr)
    for curve in curves:
        axis.plot(*zip(*curve, strict=True), color="#2a6fbb", linewidth=1.8)
    for before, after in zip(curves, curves[1:], strict=False):
        (x, y), (_, z) = before[-1], after[0]
        axis.plot([x, x], [y, z], color="#c0392b", linewidth=1.2, linestyle="dotted")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("learning rate", color=_SOFT)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _epochs(axis: Any, run: ResolvedRun, plan: Mapping[str, Any], ink: Mapping[str, Ink]) -> None:
    sources = {row["source"]: row for row in plan["sources"]}
    most = 0.1
    for name, its in ink.items():
        curve = epoch_curve(run.schedule, name, sources[name]["epoch_tokens"])
        if curve:
            most = max(most, curve[-1][1])
            axis.plot(*zip(*curve, strict=True), color=its.light, linewidth=1.5)
        for mark in sources[name]["passes"]:
            axis.plot([mark["token"]], [mark["epochs"]], "o", color=its.light, markersize=5, markeredgecolor=_PAPER)
    for epochs in (mark for mark in MARKS if mark <= most * 1.1):
        axis.axhline(epochs, color=_SOFT, linewidth=0.8, linestyle="dashed")
    axis.set_ylim(0, most * 1.1)
    axis.set_ylabel("epochs", color=_SOFT)


def _frame(axis: Any, run: ResolvedRun, plan: Mapping[str, Any]) -> None:
    axis.set_xlim(0, plan["tokens"])
    axis.tick_params(colors=_SOFT, labelsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for stage in run.schedule.stages[1:]:
        axis.axvline(stage.start_token, color=_INK, linewidth=0.9, linestyle=(0, (2, 3)))


def _name_stages(axis: Any, plan: Mapping[str, Any]) -> None:
    """Names above the bands that have room for them; otherwise numbers, where those have."""
    for number, row in enumerate(plan["stages"], start=1):
        share = row["tokens"] / plan["tokens"]
        letters = int(share * 95)
        words = row["name"] if len(row["name"]) <= letters else row["name"][: letters - 1] + "…" if letters > 5 else ""
        words = words or (str(number) if letters >= 1 else "")
        middle = row["start_token"] + row["tokens"] / 2
        axis.annotate(
            words, (middle, 1), (0, 4), textcoords="offset points", ha="center", fontsize=9, color=_INK, xycoords="data"
        )


def _legend(figure: Any, run: ResolvedRun, ink: Mapping[str, Ink]) -> None:
    """Groups as headings, their sources beneath, from the top band down."""
    from matplotlib.patches import Patch

    facts = run.schedule.stages[-1].facts
    handles: list[Any] = []
    group = ""
    for name, its in reversed(list(ink.items())):
        if facts[name].group != group:
            group = facts[name].group
            if group != name:
                handles.append(Patch(alpha=0, label=f"{group}:"))
        handles.append(Patch(color=its.light, label=name))
    figure.legend(handles=handles, loc="outside right upper", fontsize=9, frameon=False, labelcolor=_INK)
