"""Scores of arms in the plane: against the share of a group in their tokens, and one score against another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megatron.metrics.report_svg import NARROW, WIDE, Axis, Drawing
from megatron.study.report_columns import Column
from megatron.study.report_curves import share_of_group
from megatron.study.report_data import StudyReport
from megatron.study.report_plots import Plot, file_name, ink
from megatron.study.report_tables import Entry, Table

_HEIGHT, _APART = 15.0, 8.0
_BOLD = 7.7
"""Pixels that a bold letter takes at most on the average."""


@dataclass(frozen=True)
class Mark:
    """An arm's point. up, across: half lengths of its error bars, 0 for none · line: marks of one are joined."""

    label: str
    x: float
    y: float
    up: float
    across: float
    css: str
    line: str | None = None


def bars_of(entry: Entry) -> float:
    """Half the length of a figure's error bar: the standard deviation over seeds, of one seed 1.96 standard errors."""
    return entry.sd if entry.sd is not None else 1.96 * (entry.stderr or 0.0)


def bar_words(table: Table) -> str:
    """What error bars of this table's figures are."""
    several = any(entry.sd is not None for entry in table.entries.values())
    single = any(entry.sd is None for entry in table.entries.values())
    seeds, items = "one standard deviation over seeds each way", "95 % intervals over items"
    return f"Bars: {seeds}; of one seed {items}." if several and single else f"Bars: {seeds if several else items}."


def share_plots(report: StudyReport, table: Table, columns: Sequence[Column], name: str) -> list[Plot]:
    """A plot for each score: value over the share of `report.share`'s group in an arm's tokens."""
    group = report.words.share
    shares: dict[str, float] = {}
    for arm in table.arms:
        found = [share for one in report.placed(arm) if (share := share_of_group(report, one)) is not None]
        if found:
            shares[arm] = found[0]
    if len({round(share, 6) for share in shares.values()}) < 2:
        return []
    whole = "the last stage's tokens" if report.words.share_of == "last-stage" else "all tokens"
    plots = []
    for column in columns:
        marks = _share_marks(report, table, column, shares)
        if len(marks) < 2:
            continue
        across = Axis(
            f"share of {group} in {whole}", *_room([mark.x for mark in marks], [0.0] * len(marks), (0, 1)), "percent"
        )
        caption = f"{bar_words(table)} {_better(column)}"
        if any(mark.line for mark in marks):
            caption += " Joined: arms of one axis."
        if len({round(mark.x, 4) for mark in marks}) < len(marks):
            caption += " Arms of one share stand side by side."
        title = f"{column.title} over the share of {group}"
        upright = _axis(column, marks, True)
        if column.chance is not None and column.chance < upright.low:
            caption += f" Chance, {100 * column.chance:.3g}%, is below the frame."
        line = column.chance if column.chance is not None and column.chance >= upright.low else None
        plots.append(_plot(f"{name}-{file_name(column.key)}", title, caption, across, upright, marks, [], line))
    return plots


def pareto_plot(report: StudyReport, table: Table, columns: Sequence[Column], name: str) -> Plot | None:
    """One score against the other, with the front: arms that no other is at least as good as in both."""
    chosen = _pareto_columns(report, columns)
    if chosen is None:
        return None
    x, y = chosen
    marks = []
    for number, arm in enumerate(table.arms):
        one, other = table.entry(arm, x), table.entry(arm, y)
        if one is not None and other is not None:
            marks.append(Mark(report.label(arm), one.mean, other.mean, bars_of(other), bars_of(one), ink(number)))
    if len(marks) < 2:
        return None
    front = front_of([(mark.x, mark.y) for mark in marks], x.higher_is_better, y.higher_is_better)
    steps = _stairs([(marks[at].x, marks[at].y) for at in front], x.higher_is_better)
    names = ", ".join(marks[at].label for at in front)
    caption = f"{bar_words(table)} Dashed: the front of means, {names}; bars that overlap may exchange places on it."
    turned = [Mark(m.label, m.y, m.x, m.across, m.up, m.css) for m in marks]
    title = f"{y.title} against {x.title}"
    return _plot(name, title, caption, _axis(x, turned, False), _axis(y, marks, False), marks, steps)


def front_of(points: Sequence[tuple[float, float]], higher_x: bool, higher_y: bool) -> list[int]:
    """Places of the points that none dominates (at least as good in both and better in one), from left to right."""
    signs = (1 if higher_x else -1), (1 if higher_y else -1)
    turned = [(signs[0] * x, signs[1] * y) for x, y in points]
    free = [
        at for at, (x, y) in enumerate(turned) if not any(a >= x and b >= y and (a > x or b > y) for a, b in turned)
    ]
    return sorted(free, key=lambda at: points[at])


def _pareto_columns(report: StudyReport, columns: Sequence[Column]) -> tuple[Column, Column] | None:
    scores = {column.key: column for column in columns if column.score}
    names = report.words.pareto or [name for name in ("text", "code") if name in scores]
    if len(names) != 2:
        names = list(scores)[:2]
    return (scores[names[0]], scores[names[1]]) if len(names) == 2 and all(name in scores for name in names) else None


def _share_marks(report: StudyReport, table: Table, column: Column, shares: dict[str, float]) -> list[Mark]:
    tables = {arm: report.planned.arms[arm].table for arm in table.arms}
    several = {name for name in tables.values() if list(tables.values()).count(name) > 1}
    inks: dict[str, str] = {}
    marks = []
    for arm in table.arms:
        entry = table.entry(arm, column)
        line = tables[arm] if tables[arm] in several else None
        css = inks.setdefault(line or f"arm {arm}", ink(len(inks)))
        if entry is not None and arm in shares:
            marks.append(Mark(report.label(arm), shares[arm], entry.mean, bars_of(entry), 0.0, css, line))
    return marks


def _better(column: Column) -> str:
    return "Higher is better." if column.higher_is_better else "Lower is better."


def _axis(column: Column, marks: Sequence[Mark], chance: bool) -> Axis:
    share = column.kind == "share"
    bounds = (0.0, 1.0) if share else (None, None)
    low, high = _room([mark.y for mark in marks], [mark.up for mark in marks], bounds)
    if chance and column.chance is not None and low - column.chance < high - low:
        low = min(low, max(0.0, column.chance - 0.02))
    word = "higher is better" if column.higher_is_better else "lower is better"
    return Axis(f"{column.title} ({word})", low, high, "percent" if share and high - low > 0.05 else "plain")


def _room(
    values: Sequence[float], bars: Sequence[float], bounds: tuple[float | None, float | None]
) -> tuple[float, float]:
    """Ends of an axis with all points and bars inside, and some room; not beyond what the quantity can be by much."""
    low = min(value - bar for value, bar in zip(values, bars, strict=True))
    high = max(value + bar for value, bar in zip(values, bars, strict=True))
    margin = 0.1 * ((high - low) or abs(high) or 1.0)
    low, high = low - margin, high + margin
    if bounds[0] is not None:
        low = max(low, bounds[0] - 0.03)
    if bounds[1] is not None:
        high = min(high, bounds[1] + 0.03)
    return low, high


def _stairs(points: Sequence[tuple[float, float]], higher_x: bool) -> list[tuple[float, float]]:
    """The border of what the front's points dominate."""
    line: list[tuple[float, float]] = []
    for point in points:
        if line:
            before = line[-1]
            line.append((before[0], point[1]) if higher_x else (point[0], before[1]))
        line.append(point)
    return line


def _plot(
    name: str,
    title: str,
    caption: str,
    x: Axis,
    y: Axis,
    marks: Sequence[Mark],
    front: Sequence[tuple[float, float]],
    chance: float | None = None,
) -> Plot:
    pictures = []
    for size in (WIDE, NARROW):
        drawing = Drawing(size, x, y)
        drawing.axes()
        drawing.line(front, "plan")
        if chance is not None:
            drawing.line([(x.low, chance), (x.high, chance)], "chance")
        lines = [front]
        for line in dict.fromkeys(mark.line for mark in marks if mark.line):
            lines.append(sorted((mark.x, mark.y) for mark in marks if mark.line == line))
            drawing.line(lines[-1], f"{next(mark.css for mark in marks if mark.line == line)} joined")
        shifts = _shifts(drawing, marks)
        for mark, beside in zip(marks, shifts, strict=True):
            _mark(drawing, mark, beside)
        _name(drawing, marks, lines, shifts)
        spoken = "; ".join(f"{mark.label}: {x.text(mark.x)} and {y.text(mark.y)}" for mark in marks)
        pictures.append(drawing.svg(name, f"{title}. {spoken}."))
    below = [("chance", f"chance {100 * chance:.3g}%")] if chance is not None else []
    return Plot(name, title, caption, [*_legend(marks), *below], *pictures)


def _legend(marks: Sequence[Mark]) -> list[tuple[str, str]]:
    rows = []
    for number, mark in enumerate(marks, start=1):
        rows.append((f"point {mark.css.split()[0]}", f"{number} {mark.label}"))
    return rows


def _mark(drawing: Drawing, mark: Mark, beside: float) -> None:
    """Its bars and its dot, `beside` pixels to the right."""
    x, y, css = drawing.px(mark.x) + beside, drawing.py(mark.y), mark.css.split()[0]
    if mark.up:
        top, bottom = drawing.py(mark.y + mark.up), drawing.py(mark.y - mark.up)
        drawing.add(f'<line class="bar {css}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>', True)
    if mark.across:
        left, right = drawing.px(mark.x - mark.across), drawing.px(mark.x + mark.across)
        drawing.add(f'<line class="bar {css}" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>', True)
    drawing.add(f'<circle class="dot {css}" cx="{x:.1f}" cy="{y:.1f}" r="4.6"/>')


def _shifts(drawing: Drawing, marks: Sequence[Mark]) -> list[float]:
    """Pixels to the right for marks without bars across, so that those at one place do not hide each other; what is on
    a line stays."""
    shifts: list[float] = []
    for number, mark in enumerate(marks):
        before = [at for at in range(number) if abs(drawing.px(marks[at].x) - drawing.px(mark.x)) < _APART]
        free = not mark.across and mark.line is None and any(not marks[at].across for at in before)
        used = {shifts[at] for at in before}
        steps = (sign * _APART * count for count in range(1, len(marks) + 1) for sign in (1, -1))
        shifts.append(next(step for step in steps if step not in used) if free else 0.0)
    return shifts


Box = tuple[float, float, float, float]


def _name(
    drawing: Drawing,
    marks: Sequence[Mark],
    lines: Sequence[Sequence[tuple[float, float]]],
    shifts: Sequence[float],
) -> None:
    """Each mark's name beside it and nearer to it than to any other, over no dot and no other name, and if it can over
    no bar and no line; else its number, which the legend explains."""
    along = [box for line in lines for box in _boxes_along(drawing, line)]
    dots = [(drawing.px(mark.x) + beside, drawing.py(mark.y)) for mark, beside in zip(marks, shifts, strict=True)]
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    bars: list[Box] = []
    for mark, beside in zip(marks, shifts, strict=True):
        x, y = drawing.px(mark.x) + beside, drawing.py(mark.y)
        bars.append((x - 2, drawing.py(mark.y + mark.up), x + 2, drawing.py(mark.y - mark.up)))
        bars.append((drawing.px(mark.x - mark.across), y - 2, drawing.px(mark.x + mark.across), y + 2))
    for number, (mark, at) in enumerate(zip(marks, dots, strict=True), start=1):
        tries = [(mark.label, [*bars, *along]), (mark.label, bars), (mark.label, []), (str(number), [])]
        for words, others in tries:
            place = _free_place(drawing, at, len(words) * _BOLD, [*taken, *others], dots)
            if place is not None:
                box, begin = place
                taken.append(box)
                css = "task" if words == mark.label else "task number"
                drawing.add(f'<text class="{css}" x="{begin[0]:.1f}" y="{begin[1]:.1f}">{escape(words)}</text>')
                break


def _boxes_along(drawing: Drawing, line: Sequence[tuple[float, float]]) -> list[Box]:
    """Small boxes that cover a line of corners."""
    boxes = []
    for (x, y), (to_x, to_y) in zip(line, line[1:], strict=False):
        a, b, c, d = drawing.px(x), drawing.py(y), drawing.px(to_x), drawing.py(to_y)
        count = 1 + int(max(abs(c - a), abs(d - b)) / 5)
        for number in range(count + 1):
            at = a + (c - a) * number / count, b + (d - b) * number / count
            boxes.append((at[0] - 1.5, at[1] - 1.5, at[0] + 1.5, at[1] + 1.5))
    return boxes


def _free_place(
    drawing: Drawing,
    near: tuple[float, float],
    width: float,
    taken: Sequence[Box],
    dots: Sequence[tuple[float, float]],
) -> tuple[Box, tuple[float, float]] | None:
    """A place for words of so many pixels near a mark, inside the frame, over nothing and nearer to no other dot; (box,
    where they begin)."""
    size, (x, y) = drawing.size, near
    for away in (9.0, 16.0, 26.0):
        for begin, base in (
            (x + away, y - 5),
            (x + away, y + 14),
            (x - away - width, y - 5),
            (x - away - width, y + 14),
            (x - width / 2, y - away),
            (x - width / 2, y + away + 10),
        ):
            box = begin, base - 11, begin + width, base - 11 + _HEIGHT
            inside = (
                box[0] > size.left + 2 and box[2] < size.width - 2 and box[1] > 2 and box[3] < size.height - size.bottom
            )
            own = _distance(box, near)
            clear = inside and not any(_overlap(box, other) for other in taken)
            if clear and all(dot == near or _distance(box, dot) > own for dot in dots):
                return box, (begin, base)
    return None


def _distance(box: Box, point: tuple[float, float]) -> float:
    across = max(box[0] - point[0], 0.0, point[0] - box[2])
    return math.hypot(across, max(box[1] - point[1], 0.0, point[1] - box[3]))


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
