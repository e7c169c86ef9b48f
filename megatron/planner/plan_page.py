"""The plan as one self-contained page: inline SVG, no script, nothing from outside; light or dark as the reader is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron.config.quantities import format_count
from megatron.metrics.report_data import Band
from megatron.metrics.report_page import Cell, table
from megatron.metrics.report_plots import figure
from megatron.metrics.report_style import STYLE
from megatron.metrics.report_svg import NARROW, WIDE, Axis, Drawing, Size
from megatron.planner.mixture_slices import Corner, Ink, corners_of, inks
from megatron.planner.plan import shapes_words
from megatron.planner.plan_curves import Point, epoch_curve, rate_curves
from megatron.planner.plan_page_hardware import hardware_html
from megatron.planner.repetition import MARKS
from megatron.planner.resolve import ResolvedRun

_OWN_STYLE = """
.warnings{list-style:none;margin:22px 0 8px;padding:0}
.warnings li{padding:10px 14px;margin:0 0 8px;background:var(--card);border:1px solid var(--rule);border-left-width:5px;
border-radius:8px;font-size:14.5px;overflow-wrap:anywhere}
.warnings .high{border-left-color:#c0392b}.warnings .medium{border-left-color:#d49a1a}
.warnings b{font-size:12px;letter-spacing:.06em;text-transform:uppercase;color:var(--soft);margin-right:8px}
.legend b{margin-right:-8px}
#mixture .area,.legend .block{opacity:1}
#mixture .area{stroke:var(--card);stroke-width:.6}
#mixture .area:hover{opacity:.8}
svg .mark{stroke:var(--soft);stroke-dasharray:5 4}
svg .jump{stroke:#c0392b;stroke-width:1.6;stroke-dasharray:3 3}
tr.sum td{font-weight:600}
"""


def write_page(path: Path, name: str, run: ResolvedRun, plan: Mapping[str, Any]) -> Path:
    """Writes the page, whole or not at all; folders are made. OSError where the disk refuses."""
    return write_aside(path, page_of(name, run, plan).encode())


def write_aside(path: Path, content: bytes) -> Path:
    """Writes a file beside its place and renames it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_bytes(content)
    aside.replace(path)
    return path


def page_of(name: str, run: ResolvedRun, plan: Mapping[str, Any]) -> str:
    """The document. `plan` is `plan_of`'s, with "warnings"."""
    ink = inks(run.schedule)
    stages = plan["stages"]
    lead = f"{len(stages)} training stages: {', '.join(stage['name'] for stage in stages)}."
    sections = (
        ("Mixture over tokens", _mixture(run, plan, ink)),
        ("Learning rate", _rates(run, plan)),
        ("Repetition", _repetition(run, plan, ink)),
        ("Tokens by source and training stage", _tokens(plan)),
        ("Training stages", _stages(plan)),
        *((("Hardware", hardware_html(plan["hardware"])),) if "hardware" in plan else ()),
        ("Warnings", _warnings(plan, ("high", "medium", "low")) or '<p class="note">None.</p>'),
    )
    body = "".join(f"<section><h2>{escape(heading)}</h2>{html}</section>" for heading, html in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} · Stagemix plan</title><style>{STYLE}{_OWN_STYLE}{_colours(ink)}</style></head>"
        f'<body><main><header><p class="kind">Stagemix · plan of a run</p><h1>{escape(name)}</h1>'
        f'<p class="lead">{escape(lead)}</p>{_headline(plan)}{_warnings(plan, ("high",))}</header>{body}'
        "<footer>Made by <code>stagemix plan</code> from the run's config, before it was trained.</footer>"
        "</main></body></html>\n"
    )


def _colours(ink: Mapping[str, Ink]) -> str:
    light = "".join(f".s{number}{{color:{its.light}}}" for number, its in enumerate(ink.values()))
    dark = "".join(f".s{number}{{color:{its.dark}}}" for number, its in enumerate(ink.values()))
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}@media print{{{light}}}"


def _headline(plan: Mapping[str, Any]) -> str:
    most = max(plan["sources"], key=lambda row: row["epochs_after"][-1])
    figures = [
        (format_count(plan["tokens"]), "tokens"),
        (f"{plan['steps']:,}", "optimizer steps"),
        (f"{plan['samples']:,}", "samples"),
        (str(sum(1 for row in plan["sources"] if row["tokens"])), f"sources in {len(plan['groups'])} groups"),
        (f"{most['epochs_after'][-1]:.2f}", f"epochs at most, of {most['source']}"),
    ]
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(words)}</span></div>" for value, words in figures)
    return f'<div class="figures">{cells}</div>'


def _warnings(plan: Mapping[str, Any], gravities: Sequence[str]) -> str:
    words = {"high": "grave", "medium": "mind", "low": "note"}
    rows = "".join(
        f'<li class="{row["gravity"]}"><b>{words[row["gravity"]]}</b>{escape(row["text"])}</li>'
        for row in plan.get("warnings", ())
        if row["gravity"] in gravities
    )
    return f'<ul class="warnings">{rows}</ul>' if rows else ""


def _bands(plan: Mapping[str, Any], drawing: Drawing) -> list[Band]:
    """The stages along the axis; one without room even for its number has no name."""
    rows = plan["stages"]
    wide = [drawing.px(row["start_token"] + row["tokens"]) - drawing.px(row["start_token"]) >= 18 for row in rows]
    return [
        Band(row["name"] if named else "", row["start_token"], row["start_token"] + row["tokens"])
        for row, named in zip(rows, wide, strict=True)
    ]


def _mixture(run: ResolvedRun, plan: Mapping[str, Any], ink: Mapping[str, Ink]) -> str:
    """Stacked bands: for each stage and source one surface, with its name and figures as a hover title."""
    svgs = []
    spoken = []
    for size in (_tall(WIDE), _tall(NARROW)):
        drawing = Drawing(
            size, Axis("tokens", 0.0, plan["tokens"], "count"), Axis("share of tokens", 0.0, 1.0, "percent")
        )
        for stage, row in zip(run.schedule.stages, plan["stages"], strict=True):
            corners = corners_of(stage, list(ink))
            use = {source["source"]: source for source in row["sources"]}
            below = [0.0] * len(corners)
            for number, name in enumerate(ink):
                above = [base + corner.shares[name] for base, corner in zip(below, corners, strict=True)]
                if name in use:
                    title = (
                        f"{stage.name} · {name}: {_share_words(corners, name)}; {format_count(use[name]['tokens'])} "
                    )
                    title += (
                        f"tokens, {use[name]['epochs']:.3g} epochs here, {use[name]['epochs_after']:.3g} by its end"
                    )
                    drawing.add(_surface(drawing, corners, above, below, f"s{number}", title), clipped=True)
                below = above
        drawing.bands(_bands(plan, drawing))
        drawing.axes()
        spoken = [
            f"{row['name']}: " + ", ".join(f"{s['source']} {s['share']:.1%}" for s in row["sources"])
            for row in plan["stages"]
        ]
        svgs.append(drawing.svg("mixture", f"Stacked bands: share of tokens by source. {'; '.join(spoken)}."))
    legend = [(f"block s{number}", name) for number, name in enumerate(ink)]
    html = figure("mixture", "Share of each source", "From the resolved weights, exactly; hover for figures.", (), svgs)
    return html.replace('<ul class="legend"></ul>', _legend(run, legend))


def _tall(size: Size) -> Size:
    return Size(size.name, size.width, size.height + 60, size.left, size.right, size.top, size.bottom)


def _legend(run: ResolvedRun, entries: Sequence[tuple[str, str]]) -> str:
    """One line for each group: its sources in the order of the bands, from the bottom up."""
    facts = run.schedule.stages[-1].facts
    lists, alone = [], []
    for group, members in groupby(entries, key=lambda entry: facts[entry[1]].group):
        rows = list(members)
        items = "".join(f'<li><i class="swatch {css}"></i>{escape(name)}</li>' for css, name in rows)
        if [name for _, name in rows] == [group]:
            alone.append(items)
        else:
            lists.append(f'<ul class="legend"><li><b>{escape(group)}</b></li>{items}</ul>')
    return "".join(lists) + (f'<ul class="legend">{"".join(alone)}</ul>' if alone else "")


def _share_words(corners: Sequence[Corner], name: str) -> str:
    shares = [corner.shares[name] for corner in corners]
    kept = [share for number, share in enumerate(shares) if number == 0 or share != shares[number - 1]]
    return " → ".join(f"{share:.2%}" for share in kept[:6]) + (" → …" if len(kept) > 6 else "")


def _surface(
    drawing: Drawing, corners: Sequence[Corner], above: Sequence[float], below: Sequence[float], css: str, title: str
) -> str:
    there = [f"{drawing.px(c.token):.2f} {drawing.py(y):.2f}" for c, y in zip(corners, above, strict=True)]
    back = [f"{drawing.px(c.token):.2f} {drawing.py(y):.2f}" for c, y in zip(corners, below, strict=True)]
    path = "L".join([*there, *reversed(back)])
    return f'<path class="area {css}" d="M{path}Z"><title>{escape(title)}</title></path>'


def _rates(run: ResolvedRun, plan: Mapping[str, Any]) -> str:
    curves = rate_curves(run.schedule, run.lr)
    most = max(y for curve in curves for _, y in curve) or 1.0
    svgs = []
    for size in (WIDE, NARROW):
        drawing = Drawing(
            size, Axis("tokens", 0.0, plan["tokens"], "count"), Axis("learning rate", 0.0, most * 1.08, "power")
        )
        drawing.bands(_bands(plan, drawing))
        drawing.axes()
        for curve in curves:
            drawing.line(curve, "c0")
        for row in plan["stages"][1:]:
            _boundary(drawing, row)
        svgs.append(drawing.svg("rate", f"Learning rate over tokens. {_spoken_rates(plan)}"))
    rows: list[list[Cell]] = [
        [
            ("left", row["name"]),
            ("", "–" if row["lr_before"] is None else f"{row['lr_before']:.4g}"),
            ("", f"{row['lr_start']:.4g}"),
            ("", f"{row['lr_last']:.4g}"),
        ]
        for row in plan["stages"]
    ]
    caption = "Dots: where a stage begins; a dashed line from one to another is a jump."
    return figure("rate", "Learning rate over tokens", caption, (), svgs) + table(
        ["stage", "before it", "as it begins", "at its end"], rows, 1
    )


def _boundary(drawing: Drawing, row: Mapping[str, Any]) -> None:
    """Dots before and after a stage's first token, and a line between them where the rate jumps."""
    x = drawing.px(row["start_token"])
    before, after = drawing.py(row["lr_before"]), drawing.py(row["lr_start"])
    if abs(before - after) > 1:
        drawing.add(f'<line class="jump" x1="{x:.1f}" x2="{x:.1f}" y1="{before:.1f}" y2="{after:.1f}"/>')
    title = f"{row['name']} begins: {row['lr_before']:.4g} before, {row['lr_start']:.4g} after"
    for y in (before, after):
        drawing.add(f'<circle class="dot c0" cx="{x:.1f}" cy="{y:.1f}" r="3.4"><title>{escape(title)}</title></circle>')


def _spoken_rates(plan: Mapping[str, Any]) -> str:
    return (
        "; ".join(f"{row['name']}: from {row['lr_start']:.3g} to {row['lr_last']:.3g}" for row in plan["stages"]) + "."
    )


def _repetition(run: ResolvedRun, plan: Mapping[str, Any], ink: Mapping[str, Ink]) -> str:
    """Lifetime epochs over tokens, with lines at 1, 2 and 4 epochs, and the table by stage."""
    sources = {row["source"]: row for row in plan["sources"]}
    curves: dict[str, list[Point]] = {
        name: epoch_curve(run.schedule, name, sources[name]["epoch_tokens"]) for name in ink
    }
    most = max([y for curve in curves.values() for _, y in curve] + [0.1])
    svgs = []
    for size in (WIDE, NARROW):
        drawing = Drawing(size, Axis("tokens", 0.0, plan["tokens"], "count"), Axis("epochs", 0.0, most * 1.1))
        drawing.bands(_bands(plan, drawing))
        drawing.axes()
        right = size.width - size.right
        for mark in (mark for mark in MARKS if mark <= most * 1.1):
            y = drawing.py(mark)
            drawing.add(f'<line class="mark" x1="{size.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            words = f"{mark} epoch" + ("s" if mark > 1 else "")
            drawing.add(f'<text class="tick" x="{size.left + 5}" y="{y - 5:.1f}">{words}</text>')
        for number, name in enumerate(ink):
            drawing.line(curves[name], f"s{number}")
            for mark in sources[name]["passes"]:
                place = f'cx="{drawing.px(mark["token"]):.1f}" cy="{drawing.py(mark["epochs"]):.1f}"'
                title = f"{name} passes {mark['epochs']} at token {format_count(mark['token'])}, step {mark['step']:,}"
                drawing.add(f'<circle class="dot s{number}" {place} r="4"><title>{escape(title)}</title></circle>')
        svgs.append(drawing.svg("epochs", "Epochs of each source over tokens."))
    legend = [(f"s{number}", name) for number, name in enumerate(ink)]
    html = figure("epochs", "Epochs of each source", "Dots: where 1, 2 and 4 epochs are passed.", legend, svgs)
    return html + _epoch_table(plan)


def _epoch_table(plan: Mapping[str, Any]) -> str:
    names = [row["name"] for row in plan["stages"]]
    rows: list[list[Cell]] = []
    for row in plan["sources"]:
        dry = row.get("dry_at")
        passes = "; ".join(
            f"{mark['epochs']} at {format_count(mark['token'])} ({mark['stage']})" for mark in row["passes"]
        )
        dry_words = f"{format_count(dry['token'])}, step {dry['step']:,}: {dry['policy']}" if dry else "–"
        rows.append(
            [
                ("left", row["source"]),
                ("", format_count(row["epoch_tokens"])),
                *(("better" if epochs > 1 else "", f"{epochs:.2f}") for epochs in row["epochs_after"]),
                ("", f"{row['max_epochs']:g}"),
                ("", passes or "–"),
                ("", dry_words),
                ("", format_count(row["never_seen"])),
            ]
        )
    heads = ["source", "one epoch", *(f"by end of {name}" for name in names), "cap", "passes", "dry at", "never seen"]
    return table(heads, rows, 1)


def _tokens(plan: Mapping[str, Any]) -> str:
    names = [row["name"] for row in plan["stages"]]
    totals = [row["tokens"] - row["padding"] for row in plan["stages"]]
    heads = ["source", *names, "in all", "share"]
    rows: list[list[Cell]] = []
    for group in sorted(plan["groups"], key=lambda row: (-row["tokens"], row["group"])):
        members = sorted(
            (row for row in plan["sources"] if row["group"] == group["group"]), key=lambda row: -row["tokens"]
        )
        if [row["source"] for row in members] != [group["group"]]:
            rows.append([("left better", f"{group['group']} (group)"), *_cells(group, totals, plan, "better")])
        rows += [[("left", row["source"]), *_cells(row, totals, plan, "")] for row in members]
    bounds: dict[str, int] = {}
    for stage in plan["stages"]:
        for row in stage["groups"]:
            bounds[row["group"]] = max(bounds.get(row["group"], 0), row["error_below"])
    said = ", ".join(f"{group} {bound}" for group, bound in sorted(bounds.items()) if bound)
    note = "After every sample each source is less than one sample from its target. "
    note += f"Groups, as sums of their sources, are less than so many samples from theirs: {said}." if said else ""
    return table(heads, rows, 1) + f'<p class="note">{escape(note)}</p>'


def _cells(row: Mapping[str, Any], totals: Sequence[int], plan: Mapping[str, Any], css: str) -> list[Cell]:
    parts = [
        f"{format_count(tokens)} · {tokens / total:.1%}" if tokens else "–"
        for tokens, total in zip(row["tokens_by_stage"], totals, strict=True)
    ]
    return [
        (css, words)
        for words in (*parts, format_count(row["tokens"]), f"{row['tokens'] / (plan['tokens'] - plan['padding']):.1%}")
    ]


def _stages(plan: Mapping[str, Any]) -> str:
    rows: list[list[Cell]] = []
    for row in plan["stages"]:
        asked = row.get("asked_tokens")
        rows.append(
            [
                ("left", row["name"]),
                ("", f"{row['start_token']:,}"),
                ("", f"{row['tokens']:,}"),
                ("", f"{asked:,}" if asked is not None else "–"),
                ("", f"{row['steps']:,}"),
                ("", shapes_words(row)),
            ]
        )
    return table(["stage", "from token", "tokens", "asked", "steps", "batch x length"], rows, 1)
