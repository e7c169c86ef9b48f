"""A plan on the terminal: the drawing, what each stage and source gets, the layout, and the warnings."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console

from megatron.commands.tables import clipped, in_chunks, new_table
from megatron.config.quantities import format_count
from megatron.planner.plan import shapes_words
from megatron.planner.resolve import ResolvedRun
from megatron.planner.terminal_chart import terminal_chart


def show_plan(
    name: str, run: ResolvedRun, plan: dict[str, Any], console: Console, width: int | None, detail: bool
) -> None:
    """Prints a plan from `plan_of`. width: of the drawing, where the user said one. detail: every weight and target."""
    total = f"{plan['steps']:,} steps, {plan['samples']:,} samples, {format_count(plan['tokens'])} tokens"
    noun = "training stage" if len(plan["stages"]) == 1 else "training stages"
    console.print(f"{name}: {len(plan['stages'])} {noun}, {total}\n", style="bold")
    colour = console.color_system is not None and not console.no_color
    width = width or (min(console.width, 120) if sys.stdout.isatty() else 80)
    ascii_only = console.options.ascii_only
    for line in terminal_chart(run.schedule, run.lr, width, colour=colour, ascii_only=ascii_only):
        console.print(line)
    console.print()
    _show_stages(plan, console)
    _show_tokens(plan, console)
    _show_repetition(plan, console)
    _show_what_is_left(plan, console)
    _show_layout(plan["layout"], console)
    if detail:
        _show_detail(plan, console)
    _show_warnings(plan, console)


def _show_stages(plan: dict[str, Any], console: Console) -> None:
    table = new_table("Training stages", "stage", "from token", "tokens", "asked", "steps", "batch x length")
    for stage in plan["stages"]:
        asked = stage.get("asked_tokens")
        more = stage["tokens"] - asked if asked is not None else 0
        table.add_row(
            stage["name"],
            format_count(stage["start_token"]),
            format_count(stage["tokens"]),
            "" if not more else f"{'−' if more < 0 else '+'}{format_count(abs(more))}",
            f"{stage['steps']:,}",
            shapes_words(stage),
        )
    console.print(table)
    if any(stage.get("asked_tokens") not in (None, stage["tokens"]) for stage in plan["stages"]):
        console.print("  asked: what whole batches add to (+) or leave out of (−) the length asked for\n")
    for stage in plan["stages"]:
        if len(stage["shapes"]) > 1:
            console.print(f"  {stage['name']}: batch x length {_shapes_in_full(stage)}\n", soft_wrap=True)
    for stage in plan["stages"]:
        if stage["padding"]:
            share = stage["padding"] / stage["tokens"]
            console.print(
                f"  {stage['name']}: {stage['packing']}; {format_count(stage['padding'])} of its tokens are padding "
                f"({share:.0%})\n",
                soft_wrap=True,
            )
    table = new_table("Learning rate at each boundary", "stage", "before", "after", "at its end", "jump")
    for stage in plan["stages"]:
        before, after = stage["lr_before"], stage["lr_start"]
        jumps = before is not None and abs(before - after) > 0.01 * max(before, after)
        table.add_row(
            stage["name"],
            "" if before is None else f"{before:.3g}",
            f"{after:.3g}",
            f"{stage['lr_last']:.3g}",
            f"x {after / before:.3g}" if jumps and before else "from 0" if jumps else "",
        )
    console.print(table)


def _shapes_in_full(stage: dict[str, Any]) -> str:
    """Every batch x length of a stage with the token of the run from which it holds; of many the first and last few."""
    words, token = [], stage["start_token"]
    for start, end, length, batch in stage["shapes"]:
        words.append(f"{batch} x {length} from token {format_count(token)}")
        token += (end - start) * length
    shown = words if len(words) <= 7 else [*words[:4], f"… {len(words) - 6} more …", *words[-2:]]
    return ", ".join(shown)


def _in_groups(plan: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Sources by group, groups and sources with the most tokens first."""
    size = {row["group"]: row["tokens"] for row in plan["groups"]}
    rows = sorted(plan["sources"], key=lambda row: (-size[row["group"]], row["group"], -row["tokens"], row["source"]))
    return [(group, list(members)) for group, members in groupby(rows, key=lambda row: str(row["group"]))]


def _show_tokens(plan: dict[str, Any], console: Console) -> None:
    names = [stage["name"] for stage in plan["stages"]]
    totals = [stage["tokens"] - stage["padding"] for stage in plan["stages"]]
    subtotals = {row["group"]: row for row in plan["groups"]}
    for part in in_chunks(names, 10, 40, console.width):
        last = part.stop == len(names)
        title = "Tokens by source and training stage" if part.start == 0 else "Tokens, further stages"
        table = new_table(
            title, "source", *(clipped(names[i], 10) for i in part), *(["in all", "share"] if last else [])
        )
        for group, members in _in_groups(plan):
            if [row["source"] for row in members] != [group]:
                table.add_row(
                    clipped(group, 24), *_token_cells(subtotals[group], part, totals, plan, last), style="bold"
                )
            for row in members:
                name = row["source"] if row["source"] == group and len(members) == 1 else f"  {row['source']}"
                table.add_row(clipped(name, 24), *_token_cells(row, part, totals, plan, last))
        console.print(table)
    bounds: dict[str, int] = {}
    for stage in plan["stages"]:
        for row in stage["groups"]:
            bounds[row["group"]] = max(bounds.get(row["group"], 0), row["error_below"])
    wide = [f"{group} {bound}" for group, bound in sorted(bounds.items()) if bound > 1]
    console.print("  after every sample each source is less than 1 sample from its target (law M1)")
    if wide:
        console.print(f"  groups, as sums of their sources, less than so many samples: {', '.join(wide)}")
    console.print()


def _token_cells(
    row: dict[str, Any], part: range, totals: Sequence[int], plan: dict[str, Any], last: bool
) -> list[str]:
    cells = []
    for number in part:
        tokens = row["tokens_by_stage"][number]
        cells.append(f"{format_count(tokens)} {_percent(tokens / totals[number]):>4}" if tokens else "·")
    return (
        [*cells, format_count(row["tokens"]), _percent(row["tokens"] / (plan["tokens"] - plan["padding"]))]
        if last
        else cells
    )


def _percent(share: float) -> str:
    if 0 < share < 0.005:
        return "<1%" if share >= 0.0005 else "<.1%"
    return f"{share:.0%}"


def _show_repetition(plan: dict[str, Any], console: Console) -> None:
    names = [stage["name"] for stage in plan["stages"]]
    rows = [row for _, members in _in_groups(plan) for row in members if row["tokens"]]
    for part in in_chunks(names, 9, 36, console.width):
        title = "Epochs by the end of each stage" if part.start == 0 else "Epochs, further stages"
        table = new_table(title, "source", "one epoch", *(clipped(names[i], 9) for i in part))
        for row in rows:
            cells = [f"{row['epochs_after'][i]:.2f}{_passed(row, names[i])}" for i in part]
            table.add_row(clipped(row["source"], 22), format_count(row["epoch_tokens"]), *cells)
        console.print(table)
    passes = [(row["source"], mark) for row in rows for mark in row["passes"]]
    if passes:
        table = new_table("Where sources begin to repeat", "source", "passes", "token", "step", "stage")
        for name, mark in sorted(passes, key=lambda item: (item[1]["token"], item[0], item[1]["epochs"])):
            words = f"{mark['epochs']} epoch" + ("s" if mark["epochs"] > 1 else "")
            style = "yellow" if mark["epochs"] > 1 else None
            table.add_row(
                clipped(name, 24),
                words,
                format_count(mark["token"]),
                f"{mark['step']:,}",
                mark["stage"],
                style="bold red" if mark["epochs"] >= 4 else style,
            )
        console.print(table)


def _passed(row: dict[str, Any], stage: str) -> str:
    """What is written behind the epochs of a stage in which a source passes 1, 2 or 4 of them."""
    passed = [mark["epochs"] for mark in row["passes"] if mark["stage"] == stage]
    return f" >{max(passed)}" if passed else "   "


def _show_what_is_left(plan: dict[str, Any], console: Console) -> None:
    table = new_table("What is left", "source", "never seen", "to its cap", "cap", "when dry", "dry at")
    for _, members in _in_groups(plan):
        for row in members:
            dry = row.get("dry_at")
            table.add_row(
                clipped(row["source"], 24),
                format_count(row["never_seen"]) if row["never_seen"] else "",
                format_count(row["left_to_cap"]) if row["left_to_cap"] else "",
                f"{row['max_epochs']:g}",
                row["dry"],
                f"{format_count(dry['token'])}, step {dry['step']:,}" if dry else "",
            )
    console.print(table)


def _show_detail(plan: dict[str, Any], console: Console) -> None:
    table = new_table(
        "Weights, samples and epochs", "stage", "source", "weight", "samples", "target", "share", "epochs", "short by"
    )
    for stage in plan["stages"]:
        for index, row in enumerate(stage["sources"]):
            first, last = row["weight_first"], row["weight_last"]
            table.add_row(
                clipped(stage["name"], 12) if index == 0 else "",
                row["source"],
                f"{first:.4g}" if first == last else f"{first:.4g} → {last:.4g}",
                f"{row['samples']:,}",
                f"{row['target']:,.2f}",
                f"{row['share']:.2%}",
                f"{row['epochs']:.3f}",
                format_count(row["shortfall"]) if row["shortfall"] else "",
            )
        table.add_section()
    console.print(table)


def _show_layout(layout: dict[str, Any] | None, console: Console) -> None:
    """Of several processes; one process has nothing to show."""
    if layout is None or layout["processes"] == 1 or layout["refusals"]:
        return
    console.print(f"Layout over {layout['processes']} processes: {layout['words']}", style="bold", soft_wrap=True)
    if "ranks" in layout:
        parts = [row.get("bytes", {}) for row in layout["ranks"]]
        unit, divisor = ("GB", 1e9) if max((part.get("total", 0) for part in parts), default=0) >= 1e8 else ("MB", 1e6)
        title = f"{unit} of each pipeline rank"
        table = new_table(title, "rank", "layers", "weights", "master", "gradients", "optimizer", "held", "in a step")
        for row, part in zip(layout["ranks"], parts, strict=True):
            held = [stage for stage in layout["stages"] if stage["stage"] in row["stages"]]
            sizes = [part.get(key) for key in ("parameters", "gradients", "optimizer", "total", "step_total")]
            table.add_row(
                str(row["pipeline_rank"]),
                ", ".join(f"{first}-{end - 1}" for first, end in (stage["layers"] for stage in held)),
                format_count(sum(stage["parameters"] for stage in held)),
                *("" if size is None else f"{size / divisor:,.2f}" for size in sizes),
            )
        console.print(table)
        console.print(
            "  weights: how many; in a step: with gathered weights and gradients not yet reduced; activations apart"
        )
    for row in layout["batches"]:
        shape = f"batch {row['global_batch_size']} x {row['seq_length']}"
        words = f", bubble {row['bubble']:.1%} of the step, {_bytes(row['receive_bytes'])} between stages"
        bubble = words if layout["axes"]["pipeline"] > 1 else ""
        console.print(f"  {shape}: {row['microbatches']} microbatches a step on each data rank{bubble}")
    console.print()


def _bytes(number: int) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e8 else f"{number / 1e6:,.2f} MB"


def _show_warnings(plan: dict[str, Any], console: Console) -> None:
    warnings = plan["warnings"]
    if not warnings:
        console.print("No warnings.")
        return
    console.print("Warnings, the gravest first", style="bold")
    for row in warnings:
        mark, style = {"high": ("!!", "bold red"), "medium": ("! ", "yellow"), "low": ("  ", "")}[row["gravity"]]
        console.print(f"{mark} {row['text']}", style=style, soft_wrap=not sys.stdout.isatty())
