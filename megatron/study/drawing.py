"""The graph as a tree of lines for the terminal, as Graphviz dot, and as Mermaid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.config.quantities import format_count

FORMATS = ("tree", "dot", "mermaid")
_ASCII = str.maketrans({"├": "+", "└": "+", "│": "|", "─": "-", "→": ">"})


def tree_lines(
    nodes: Sequence[Mapping[str, Any]], ends: Mapping[str, Sequence[str]], ascii_only: bool = False
) -> list[str]:
    """One line a node, each below the first of what it goes on from.

    nodes: rows of `study_plan`, parents first · ends: by node, the arms that end there.
    """
    children: dict[str | None, list[Mapping[str, Any]]] = {}
    for row in nodes:
        children.setdefault(row["parents"][0] if row["parents"] else None, []).append(row)
    lines: list[str] = []

    def draw(row: Mapping[str, Any], head: str, tail: str) -> None:
        lines.append(head + _words(row, ends))
        below = children.get(row["id"], [])
        for number, child in enumerate(below):
            last = number == len(below) - 1
            draw(child, tail + ("└─ " if last else "├─ "), tail + ("   " if last else "│  "))

    for row in children.get(None, []):
        draw(row, "", "")
    return [line.translate(_ASCII) for line in lines] if ascii_only else lines


def _words(row: Mapping[str, Any], ends: Mapping[str, Sequence[str]]) -> str:
    size = f"[{format_count(row['tokens'])}]" if row["kind"] == "train" else f"(average of {_members(row)})"
    arms = ends.get(row["id"], ())
    end = f"  → {', '.join(arms)}" if arms else ""
    return f"{row['label']} {size}{end}"


def _members(row: Mapping[str, Any]) -> str:
    count = len(row["parents"])
    return f"{count} nodes" if count > 1 else "its last checkpoints"


def dot(plan: Mapping[str, Any]) -> str:
    """The graph for Graphviz: `stagemix study graph FILE --format dot | dot -Tsvg > graph.svg`."""
    ends = ends_of(plan)
    lines = [f"digraph {_quoted(plan['study'])} {{", "  rankdir=LR;", '  node [shape=box, fontname="sans-serif"];']
    for row in plan["nodes"]:
        style = ', style="rounded,dashed"' if row["kind"] == "average" else ""
        lines.append(f"  n{row['id']} [label={_quoted(_label(row, ends))}{style}];")
        lines += [f"  n{parent} -> n{row['id']};" for parent in row["parents"]]
    return "\n".join([*lines, "}"])


def mermaid(plan: Mapping[str, Any]) -> str:
    """The graph for Mermaid, which Markdown on GitHub and GitLab shows."""
    ends = ends_of(plan)
    lines = ["graph LR"]
    for row in plan["nodes"]:
        words = _label(row, ends).replace('"', "'").replace("\n", "<br>")
        lines.append(f'  n{row["id"]}["{words}"]')
        lines += [f"  n{parent} --> n{row['id']}" for parent in row["parents"]]
    return "\n".join(lines)


def ends_of(plan: Mapping[str, Any]) -> dict[str, list[str]]:
    """By node, the arms that end there."""
    ends: dict[str, list[str]] = {}
    for arm in plan["arms"]:
        ends.setdefault(arm["path"][-1], []).append(arm["name"])
    return ends


def _label(row: Mapping[str, Any], ends: Mapping[str, Sequence[str]]) -> str:
    size = format_count(row["tokens"]) if row["kind"] == "train" else "average"
    arms = [f"-> {name}" for name in ends.get(row["id"], ())]
    return "\n".join([f"{row['label']}: {size}", *arms])


def _quoted(words: str) -> str:
    escaped = words.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
