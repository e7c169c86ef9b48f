"""The plan of a study as one self-contained page: inline SVG, no script, nothing from outside."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron.config.quantities import format_count
from megatron.metrics.report_page import Cell, table
from megatron.metrics.report_style import STYLE
from megatron.planner.plan_page import write_aside
from megatron.study.drawing import ends_of

_BOX, _GAP, _ROW, _PAD = 190, 40, 60, 8
_OWN_STYLE = """
main{max-width:1200px}
.graph{overflow-x:auto}
.graph svg{width:auto;max-width:none}
svg .node{fill:var(--card);stroke:var(--rule);stroke-width:1.4}
svg .node.shared{stroke:var(--c0);stroke-width:2}
svg .node.average{stroke-dasharray:5 4}
svg .edge{fill:none;stroke:var(--soft);stroke-width:1.2}
svg .arm{fill:var(--c0);font-weight:600}
svg .size{fill:var(--soft)}
.warnings{list-style:none;margin:0;padding:0}
.warnings li{padding:10px 14px;margin:0 0 8px;background:var(--card);border:1px solid var(--rule);border-left-width:5px;
border-radius:8px;font-size:14.5px;overflow-wrap:anywhere}
.warnings .high{border-left-color:#c0392b}.warnings .medium{border-left-color:#d49a1a}
"""


def write_study_page(path: Path, plan: Mapping[str, Any]) -> Path:
    """Writes the page, whole or not at all; folders are made. OSError where the disk refuses."""
    return write_aside(path, study_page(plan).encode())


def study_page(plan: Mapping[str, Any]) -> str:
    """The document. `plan` is `study_plan`'s."""
    sections = [
        ("Graph", graph_figure(plan)),
        ("Tokens", _tokens(plan)),
        ("Arms", _arms(plan)),
        ("Nodes", _nodes(plan)),
        ("Same aggregate, different order", _aggregates(plan)),
        ("Warnings", _warnings(plan)),
    ]
    body = "".join(f"<section><h2>{escape(heading)}</h2>{html}</section>" for heading, html in sections if html)
    arms = len({arm["name"] for arm in plan["arms"]})
    seeds = ", ".join(map(str, plan["seeds"]))
    lead = (
        f"{arms} arms, seeds {seeds}: {len(plan['nodes'])} nodes, {format_count(plan['trained'])} tokens trained of "
        f"{format_count(plan['naive'])} naive, {plan['ratio']:.3f}."
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(plan['study'])} · Stagemix study</title><style>{STYLE}{_OWN_STYLE}</style></head><body><main>"
        f'<header><p class="kind">Stagemix · plan of a study</p><h1>{escape(plan["study"])}</h1>'
        f'<p class="lead">{escape(lead)}</p></header>{body}'
        f"<footer>Made by <code>stagemix study plan</code> from {escape(plan['file'])}.</footer></main></body></html>\n"
    )


# -- the graph ---------------------------------------------------------------------------------------------------------


def graph_figure(plan: Mapping[str, Any], undone: Collection[str] = (), links: Mapping[str, str] | None = None) -> str:
    """One seed's nodes: columns by depth, a row for each that nothing goes on from first.

    undone: nodes that are drawn as not there yet · links: by node, where a click leads.
    """
    seed = plan["seeds"][0]
    nodes = [row for row in plan["nodes"] if row["seed"] == seed]
    ends = ends_of({"arms": [arm for arm in plan["arms"] if arm["seed"] == seed]})
    places = _places(nodes)
    columns = 1 + max(column for column, _ in places.values())
    rows = 1 + max(row for _, row in places.values())
    longest = max((len(", ".join(names)) for names in ends.values()), default=0)
    width, height = columns * (_BOX + _GAP) + min(7 * longest, 460), rows * _ROW + 2 * _PAD
    parts = [f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">']
    for node in nodes:
        for parent in node["parents"]:
            parts.append(_edge(places[parent], places[node["id"]]))
    childless = {row["id"] for row in nodes} - {parent for row in nodes for parent in row["parents"]}
    for node in nodes:
        box = _box(node, places[node["id"]], ends.get(node["id"], []), node["id"] in childless, node["id"] in undone)
        link = (links or {}).get(node["id"])
        parts.append(f'<a href="{escape(link)}">{box}</a>' if link else box)
    return f'<figure class="graph">{"".join(parts)}</svg></figure>'


def _places(nodes: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """(column, row) of each node: below its first parent, siblings in order."""
    children: dict[str | None, list[Mapping[str, Any]]] = {}
    for row in nodes:
        children.setdefault(row["parents"][0] if row["parents"] else None, []).append(row)
    places: dict[str, tuple[int, int]] = {}
    used = 0

    def place(row: Mapping[str, Any], column: int, line: int) -> int:
        places[row["id"]] = (column, line)
        for number, child in enumerate(children.get(row["id"], [])):
            line = place(child, column + 1, line + (number > 0))
        return line

    for root in children.get(None, []):
        used = place(root, 0, used) + 1
    return places


def _corner(place: tuple[int, int]) -> tuple[int, int]:
    return _PAD + place[0] * (_BOX + _GAP), _PAD + place[1] * _ROW


def _edge(parent: tuple[int, int], child: tuple[int, int]) -> str:
    (x, y), (to_x, to_y) = _corner(parent), _corner(child)
    start, middle = x + _BOX, to_x - _GAP // 2
    return f'<path class="edge" d="M{start} {y + 18}H{middle}V{to_y + 18}H{to_x}"/>'


def _box(node: Mapping[str, Any], place: tuple[int, int], arms: Sequence[str], last: bool, undone: bool) -> str:
    x, y = _corner(place)
    kind = " average" if node["kind"] == "average" else " shared" if len(node["arms"]) > 1 else ""
    kind += " undone" if undone else ""
    size = format_count(node["tokens"]) if node["kind"] == "train" else "average"
    label = node["label"] if len(node["label"]) <= 20 else node["label"][:19] + "…"
    title = escape(f"{node['label']}: {node['mixture'] or size}; arms: {', '.join(node['arms'])}")
    words = [
        f'<g><title>{title}</title><rect class="node{kind}" x="{x}" y="{y}" width="{_BOX}" height="36" rx="6"/>',
        f'<text x="{x + 10}" y="{y + 23}">{escape(label)}</text>',
        f'<text class="size end" x="{x + _BOX - 10}" y="{y + 23}">{size}</text></g>',
    ]
    if arms:  # behind a leaf, below what has something behind it
        at = (x + _BOX + 10, y + 23) if last else (x + 4, y + 50)
        words.append(f'<text class="arm" x="{at[0]}" y="{at[1]}">{escape(", ".join(arms))}</text>')
    return "".join(words)


# -- tables ------------------------------------------------------------------------------------------------------------


def _tokens(plan: Mapping[str, Any]) -> str:
    rows: list[list[Cell]] = []
    every = [
        *plan["experiments"],
        {"experiment": "all", "arms": "", **{k: plan[k] for k in ("trained", "naive", "ratio")}},
    ]
    for row in every if len(plan["experiments"]) > 1 else every[-1:]:
        rows.append(
            [
                ("left", row["experiment"] or "others"),
                ("", str(row["arms"])),
                ("", format_count(row["trained"])),
                ("", format_count(row["naive"])),
                ("", f"{row['ratio']:.3f}"),
            ]
        )
    return table(["experiment", "arms", "trained", "naive", "ratio"], rows, 1)


def _arms(plan: Mapping[str, Any]) -> str:
    rows: list[list[Cell]] = []
    seen: set[str] = set()
    for arm in plan["arms"]:
        if arm["name"] in seen:
            continue
        seen.add(arm["name"])
        for number, stage in enumerate(arm["stages"]):
            words = "; ".join([stage["words"], *stage["notes"]])
            name = arm["name"] + (" (baseline)" if arm["name"] == plan["baseline"] else "")
            rows.append(
                [
                    ("left", name if number == 0 else ""),
                    ("left", stage["label"]),
                    ("left", words),
                    ("", format_count(stage["tokens"])),
                ]
            )
    return table(["arm", "stage", "mixture", "tokens"], rows, 3)


def _nodes(plan: Mapping[str, Any]) -> str:
    hours = plan.get("hardware") is not None
    rows: list[list[Cell]] = []
    for node in plan["nodes"]:
        cells: list[Cell] = [("left", node["id"][:8]), ("left", node["label"]), ("left", ", ".join(node["arms"]))]
        cells += [("", str(node["seed"])), ("", format_count(node["tokens"])), ("", f"{node['steps']:,}")]
        if hours:
            cells.append(("", "?" if node["gpu_hours"] is None else f"{node['gpu_hours']:,.0f}"))
        rows.append(cells)
    return table(["node", "stage", "arms", "seed", "tokens", "steps", *(["GPU-hours"] if hours else [])], rows, 3)


def _aggregates(plan: Mapping[str, Any]) -> str:
    items = []
    for row in plan["same_aggregate"]:
        each = ", ".join(f"{name} {count:,}" for name, count in sorted(row["samples"].items()))
        items.append(f"<p><b>{escape(', '.join(row['arms']))}</b>: {escape(each)} samples each.</p>")
    return "".join(items)


def _warnings(plan: Mapping[str, Any]) -> str:
    rows = []
    for row in plan["warnings"]:
        of = f" [{', '.join(row['arms'])}]" if row.get("arms") else ""
        rows.append(f'<li class="{row["gravity"]}">{escape(row["text"] + of)}</li>')
    return f'<ul class="warnings">{"".join(rows)}</ul>' if rows else ""
