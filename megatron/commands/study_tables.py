"""A study's plan on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from megatron.commands.tables import new_table
from megatron.config.quantities import format_count
from megatron.study.drawing import ends_of, tree_lines

_SIGNS = {"high": "!!", "medium": "! ", "low": "- "}
_MOST_ARMS = 6


def show_study(plan: Mapping[str, Any], console: Console) -> None:
    """Prints a plan from `study_plan`."""
    seeds, arms = plan["seeds"], {arm["name"] for arm in plan["arms"]}
    count = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    console.print(f"{plan['study']}: {len(arms)} arms, {count}, {len(plan['nodes'])} nodes\n", style="bold")
    _show_graph(plan, console)
    _show_totals(plan, console)
    _show_nodes(plan, console)
    _show_arms(plan, console)
    _show_aggregates(plan, console)
    _show_warnings(plan, console)


def _show_graph(plan: Mapping[str, Any], console: Console) -> None:
    """One seed's; the others' are the same."""
    seed = plan["seeds"][0]
    nodes = [row for row in plan["nodes"] if row["seed"] == seed]
    for line in tree_lines(nodes, _ends(plan, seed), console.options.ascii_only):
        console.print(line, soft_wrap=True)
    if len(plan["seeds"]) > 1:
        console.print(f"\nthe same for each of the seeds {', '.join(map(str, plan['seeds']))}")
    console.print()


def _ends(plan: Mapping[str, Any], seed: int) -> dict[str, list[str]]:
    return ends_of({"arms": [arm for arm in plan["arms"] if arm["seed"] == seed]})


def _show_totals(plan: Mapping[str, Any], console: Console) -> None:
    console.print("Tokens", style="bold")
    experiments = plan["experiments"]
    if len(experiments) > 1:
        for row in experiments:
            console.print(f"  {row['experiment'] or 'others'}: {_ratio(row)} ({row['arms']} arms)", soft_wrap=True)
        console.print(f"  all: {_ratio(plan)}", soft_wrap=True)
    else:
        console.print(f"  {_ratio(plan)}", soft_wrap=True)
    if plan.get("hardware") is not None:
        hardware = plan["hardware"]
        hours = "not known" if plan["gpu_hours"] is None else f"{plan['gpu_hours']:,.0f}"
        over = f", {hardware['processes']} processes a run" if hardware["processes"] else ", as [parallel] says"
        console.print(f"  GPU-hours on {hardware['name']}{over}: {hours} (training alone, predicted)")
        for note in hardware["notes"]:
            console.print(f"  {note}", soft_wrap=True)
    disk = plan["disk_bytes"]
    words = "not known without model.vocab_size" if disk is None else as_bytes(disk)
    console.print(f"  disk when all is done, checkpoints and one export a node: {words}\n")


def as_bytes(number: int) -> str:
    """Bytes for people, in powers of a thousand."""
    scale, unit = (10**12, "TB") if number >= 10**12 else (10**9, "GB") if number >= 10**9 else (10**6, "MB")
    return f"{number / scale:.3g} {unit}"


def _ratio(row: Mapping[str, Any]) -> str:
    return f"{format_count(row['trained'])} trained of {format_count(row['naive'])} naive = {row['ratio']:.3f}"


def _show_nodes(plan: Mapping[str, Any], console: Console) -> None:
    hours = plan.get("hardware") is not None
    columns = ["node", "stage", "tokens", "steps", *(["GPU-hours"] if hours else []), "disk", "arms"]
    table = new_table("Nodes", *columns)
    for column in (0, -1):
        table.columns[column].justify = "left"
    table.columns[-1].no_wrap = False
    for row in plan["nodes"]:
        if row["seed"] != plan["seeds"][0]:
            continue
        cells = [row["id"][:8], row["label"], format_count(row["tokens"]), f"{row['steps']:,}"]
        if hours:
            cells.append("?" if row["gpu_hours"] is None else f"{row['gpu_hours']:,.0f}")
        cells.append("" if row["disk_bytes"] is None else as_bytes(row["disk_bytes"]))
        table.add_row(*cells, _some(row["arms"]))
    console.print(table)


def _show_arms(plan: Mapping[str, Any], console: Console) -> None:
    console.print("Arms", style="bold")
    shown: set[str] = set()
    for arm in plan["arms"]:
        if arm["name"] in shown:
            continue
        shown.add(arm["name"])
        mark = "  (baseline)" if arm["name"] == plan["baseline"] else ""
        console.print(f"  {arm['name']}: {format_count(arm['tokens'])} tokens{mark}", soft_wrap=True)
        for stage in arm["stages"]:
            size = f"{format_count(stage['tokens'])}: " if stage["tokens"] else ""
            console.print(f"    {stage['label']}  {size}{stage['words']}", soft_wrap=True)
            for note in stage["notes"]:
                console.print(f"      {note}", soft_wrap=True)
            absent = stage.get("weights_from", {}).get("absent")
            if absent:
                console.print(f"      not in that file, so without a share: {', '.join(absent)}", soft_wrap=True)
    console.print()


def _show_aggregates(plan: Mapping[str, Any], console: Console) -> None:
    for row in plan["same_aggregate"]:
        each = ", ".join(f"{name} {count:,}" for name, count in sorted(row["samples"].items()))
        console.print(
            f"Same aggregate to the sample, different order: {', '.join(row['arms'])} ({each} samples)\n",
            soft_wrap=True,
        )


def _show_warnings(plan: Mapping[str, Any], console: Console) -> None:
    if not plan["warnings"]:
        return
    console.print("Warnings", style="bold")
    for row in plan["warnings"]:
        of = f" [{_some(row['arms'])}]" if row.get("arms") else ""
        console.print(f"  {_SIGNS[row['gravity']]} {row['text']}{of}", soft_wrap=True)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_ARMS} more" if len(names) > _MOST_ARMS else ""
    return ", ".join(names[:_MOST_ARMS]) + more
