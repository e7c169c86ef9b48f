"""Plots of a study over tokens: each arm's mixture as a strip, and loss by source along each arm's path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from megatron.metrics.report_data import Point
from megatron.metrics.report_plots import COLOURS
from megatron.metrics.report_svg import NARROW, WIDE, Axis, Drawing, Size, shortened
from megatron.study.graph import PlacedArm
from megatron.study.report_curves import NodeCurve, bands_of, groups_of, path_of
from megatron.study.report_data import StudyReport

LETTER = 6.9
"""Pixels that a letter of 12.5 takes, a little more than it does."""
_BOLD = 7.7
_EARLY = 0.04


@dataclass(frozen=True)
class Plot:
    """A figure. name: of its file · legend: (css class of the swatch, words) · wide, narrow: SVG elements."""

    name: str
    title: str
    caption: str
    legend: Sequence[tuple[str, str]]
    wide: str
    narrow: str


def file_name(words: str) -> str:
    """Words as a part of a file's name and of an id."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in words)


def ink(number: int) -> str:
    """The CSS classes of an arm's line: seven colours, then the same with dashes. The eighth, grey, is the trunks'."""
    dashes, colours = ("", " dash", " dots"), COLOURS - 1
    return f"c{number % colours}{dashes[number // colours % 3]}"


def members_words(report: StudyReport, arms: Sequence[str]) -> str:
    """What a caption says of arms with averages of several behind them: of which member the way is that is drawn."""
    found = [
        f"{report.label(arm)} averages several, the way of {first} is drawn"
        for arm in arms
        if (first := report.first_of(arm))
    ]
    return f" {'; '.join(found)}." if found else ""


def first_seed(report: StudyReport, arms: Sequence[str]) -> list[PlacedArm]:
    """These arms with the study's first seed."""
    return [next(one for one in report.placed(arm) if one.seed == report.seeds[0]) for arm in arms]


# -- mixture -----------------------------------------------------------------------------------------------------------


def mixture_plot(report: StudyReport, arms: Sequence[str], curves: Mapping[str, NodeCurve], name: str) -> Plot | None:
    """A strip for each arm: stacked shares of its tokens by source, on one axis of tokens."""
    rows = [(arm, path_of(report, arm, curves)) for arm in first_seed(report, arms)]
    rows = [(arm, path) for arm, path in rows if path]
    if not rows:
        return None
    groups = groups_of(report)
    used = {name for _, path in rows for one in path for _, _, shares in one.shares for name, x in shares.items() if x}
    everything = sorted(groups, key=lambda source: (groups[source], source))
    inks = {source: f"c{number % COLOURS}" for number, source in enumerate(everything)}  # the same in every plot
    sources = {source: inks[source] for source in everything if source in used}
    end = max(path[-1].end for _, path in rows)
    pictures = [_strips(report, size, rows, sources, end, name) for size in (WIDE, NARROW)]
    legend = [(f"block {css}", source) for source, css in sources.items()]
    nodes = [one for _, path in rows for one in path]
    shared = any(len(report.nodes[one.node].node.arms) > 1 for one in nodes)
    legend += [("trunk", "trunk: trained once for several arms")] if shared else []
    planned = not all(one.realised for one in nodes)
    caption = "Shares of samples as they were trained on" + (
        ", first seed; pale: as planned, where there are no metrics." if planned else ", first seed."
    )
    caption += members_words(report, [arm.name for arm, _ in rows])
    return Plot(name, "Mixture over tokens", caption, legend, *pictures)


def _strips(
    report: StudyReport,
    base: Size,
    rows: Sequence[tuple[PlacedArm, Sequence[NodeCurve]]],
    sources: Mapping[str, str],
    end: float,
    name: str,
) -> str:
    wide = base is WIDE
    longest = max(len(report.label(arm.name)) for arm, _ in rows)
    row, left = (62, min(270, 26 + int(_BOLD * longest))) if wide else (70, 10)
    size = Size(base.name, base.width, 14 + row * len(rows) + 40, left, 14, 14, 40)
    drawing = Drawing(size, Axis("tokens trained on", 0.0, end, "count"), Axis("", 0.0, 1.0))
    bottom = size.height - size.bottom
    for value in drawing.x.ticks(8 if wide else 4):
        x = drawing.px(value)
        drawing.add(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{size.top}" y2="{bottom}"/>')
        drawing.add(f'<text class="tick mid" x="{x:.1f}" y="{bottom + 16}">{escape(drawing.x.text(value))}</text>')
    middle = (size.left + size.width - size.right) / 2
    drawing.add(f'<text class="label mid" x="{middle:.0f}" y="{size.height - 6}">tokens trained on</text>')
    for number, (arm, path) in enumerate(rows):
        top = size.top + row * number
        letters = int(((left if wide else size.width) - 20) / _BOLD)
        title = escape(shortened(report.label(arm.name), letters, "…"))
        place = (
            f'class="task end" x="{left - 12}" y="{top + 38}"' if wide else f'class="task" x="{left}" y="{top + 12}"'
        )
        drawing.add(f"<text {place}>{title}</text>")
        _strip(report, drawing, path, sources, top + (18 if wide else 30))
    spoken = "; ".join(f"{report.label(arm.name)}: {_spoken(path)}" for arm, path in rows)
    return drawing.svg(f"{name}-{base.name}", f"Mixture over tokens of each arm. {spoken}.")


def _strip(
    report: StudyReport, drawing: Drawing, path: Sequence[NodeCurve], sources: Mapping[str, str], top: float
) -> None:
    """One arm's: names of stages, shares, bounds, and a bar below what it shares with others."""
    high = 30
    for one in path:
        pale = "" if one.realised else " planned"
        for start, end, shares in one.shares:
            left, right = drawing.px(start), drawing.px(end)
            level = top + high
            for source, css in sources.items():
                if (share := shares.get(source, 0.0)) <= 0:
                    continue
                level -= share * high
                drawing.add(
                    f'<rect class="fill {css}{pale}" x="{left:.2f}" y="{level:.2f}" '
                    f'width="{right - left:.2f}" height="{share * high:.2f}"/>'
                )
        left, right = drawing.px(one.start), drawing.px(one.end)
        words = shortened(one.label, int((right - left - 6) / LETTER), "")
        drawing.add(f'<text class="stage" x="{left + 3:.1f}" y="{top - 5:.1f}">{escape(words)}</text>')
        drawing.add(f'<line class="edge" x1="{left:.1f}" x2="{left:.1f}" y1="{top - 14}" y2="{top + high + 6}"/>')
        if len(report.nodes[one.node].node.arms) > 1:
            drawing.add(
                f'<rect class="trunk" x="{left:.1f}" y="{top + high + 2}" width="{right - left:.1f}" height="4"/>'
            )


def _spoken(path: Sequence[NodeCurve]) -> str:
    said = []
    for one in path:
        total = sum(end - start for start, end, _ in one.shares) or 1.0
        names = sorted({name for _, _, shares in one.shares for name in shares})
        means = {name: sum((b - a) * shares.get(name, 0) for a, b, shares in one.shares) / total for name in names}
        said.append(
            f"{one.label} " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in means.items() if share)
        )
    return ", then ".join(said)


# -- loss --------------------------------------------------------------------------------------------------------------


def loss_plots(report: StudyReport, arms: Sequence[str], curves: Mapping[str, NodeCurve], name: str) -> list[Plot]:
    """A plot for each source: every arm's loss over its tokens; what arms share is drawn once."""
    paths = {arm.name: path_of(report, arm, curves) for arm in first_seed(report, arms)}
    groups = groups_of(report)
    nodes = {one.node: one for path in paths.values() for one in path}
    sources = sorted({source for one in nodes.values() for source in (*one.losses, *one.held_out)})
    plots = []
    for source in sorted(sources, key=lambda source: (groups[source], source)):
        plots.append(_loss_plot(report, source, paths, nodes, f"{name}-{file_name(source)}"))
    return plots


def _loss_plot(
    report: StudyReport,
    source: str,
    paths: Mapping[str, Sequence[NodeCurve]],
    nodes: Mapping[str, NodeCurve],
    name: str,
) -> Plot:
    """Each node once, in its arm's colour; what several of these arms share in grey."""
    arms = list(paths)
    owners = {node: [arm for arm in arms if any(one.node == node for one in paths[arm])] for node in nodes}
    css = {node: _css(report, node, of, arms) for node, of in owners.items()}
    end = max(path[-1].end for path in paths.values() if path)
    lows, high, cut = _frame(list(nodes.values()), source, end)
    there = {node: one for node, one in nodes.items() if one.losses.get(source) or one.held_out.get(source)}
    pictures = []
    for size in (WIDE, NARROW):
        across = Axis("tokens trained on", 0.0, 1.012 * end, "count")  # dots at the end are not cut
        drawing = Drawing(size, across, Axis("loss (nats a token)", lows, high))
        drawing.axes()
        for start in sorted({band.start for path in paths.values() for band in bands_of(path)} - {0.0}):
            x = drawing.px(start)
            drawing.add(
                f'<line class="bound" x1="{x:.1f}" x2="{x:.1f}" y1="{size.top}" y2="{size.height - size.bottom}"/>'
            )
        for node, one in there.items():
            drawing.line(one.raw.get(source, ()), f"{css[node].split()[0]} faint")
        for node in there:
            drawing.line(_joined(report, node, source, nodes), css[node])
        for node, one in there.items():
            drawing.dots(one.held_out.get(source, ()), css[node].split()[0])
        pictures.append(drawing.svg(name, f"Loss of {source} over tokens. {_said(report, source, paths)}"))
    drawn = {css[node] for node in there}
    legend = [(ink(number), report.label(arm)) for number, arm in enumerate(arms) if ink(number) in drawn]
    if "shared" in drawn:
        legend.append(("shared", "trunk of several arms"))
    if any(one.held_out.get(source) for one in there.values()):
        legend.append(("point shared", "held-out documents"))
    caption = (
        "Mean loss of the source's own tokens in training, first seed; pale: single steps. Dots: held-out documents. "
        "Dashed: stages begin."
    )
    caption += members_words(report, arms)
    if cut:
        caption += f" Losses of the first tokens, up to {cut:.1f}, are above the frame."
    return Plot(name, f"Loss: {source}", caption, legend, *pictures)


def _css(report: StudyReport, node: str, owners: Sequence[str], arms: Sequence[str]) -> str:
    """The ink of the arm that has a node alone, or that ends with it; grey where several pass through."""
    ends = [arm.name for arm in first_seed(report, owners) if arm.path[-1] == node]
    whose = owners if len(owners) == 1 else ends
    return ink(arms.index(whose[0])) if whose else "shared"


def _joined(report: StudyReport, node: str, source: str, nodes: Mapping[str, NodeCurve]) -> list[Point]:
    """A node's line, from where its parent's ends, so that an arm's path is one line."""
    points = list(nodes[node].losses.get(source, ()))
    parents = report.nodes[node].node.parents
    before = nodes[parents[0]].losses.get(source) if parents and parents[0] in nodes else None
    return [before[-1], *points] if before and points else points


def _frame(nodes: Sequence[NodeCurve], source: str, end: float) -> tuple[float, float, float | None]:
    """(low, high, highest that is cut off): all that comes after the first tokens, which are far above the rest."""
    points = [point for one in nodes for point in (*one.losses.get(source, ()), *one.held_out.get(source, ()))]
    late = [y for x, y in points if x > _EARLY * end] or [y for _, y in points]
    low, high, most = min(y for _, y in points), max(late), max(y for _, y in points)
    margin = 0.06 * ((high - low) or abs(high) or 1.0)
    return low - margin, high + margin, most if most > high + margin else None


def _said(report: StudyReport, source: str, paths: Mapping[str, Sequence[NodeCurve]]) -> str:
    words = []
    for arm, path in paths.items():
        points = [point for one in path for point in one.losses.get(source, ())]
        dots = [point for one in path for point in one.held_out.get(source, ())]
        if points:
            words.append(f"{report.label(arm)}: from {points[0][1]:.4g} to {points[-1][1]:.4g}")
        if dots:
            words.append(f"{report.label(arm)} held out: last {dots[-1][1]:.4g}")
    return "; ".join(words) + "."
