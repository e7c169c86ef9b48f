"""`stagemix ledger`: what a run has been trained on, and how two runs or checkpoints differ in it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron.commands.tables import console_for_tables, new_table
from megatron.config.errors import EXIT_CHANGED_PAST, EXIT_DONE, CheckpointError
from megatron.config.quantities import format_count
from megatron.data.ledger import Ledger, ledger_rows
from megatron.data.ledger_events import event_words, not_trained
from megatron.data.stage_objective import StageObjective
from megatron.planner.ledger_comparison import Difference, Parting, differences, parting, same_samples
from megatron.planner.ledger_files import checkpoint_folders, read_ledger
from megatron.planner.ledger_sides import (
    aggregate_words,
    beyond_order,
    repeated_tokens,
    repeated_words,
    side_by_side,
    stage_position,
    totals_by_source,
)

EPILOG = """\
example:
  stagemix ledger show runs/mine                       # the newest checkpoint of a run
  stagemix ledger show runs/mine/checkpoints/step-000001000 --json
  stagemix ledger diff runs/mine runs/other            # what differs in words, where they part, counts side by side
  stagemix ledger diff runs/mine                       # its two newest checkpoints: what was trained on in between

`diff` exits with 0 when both have consumed the same samples in the same order, and with 5 when they have not. With
--json it prints "same"; "same_aggregate" (as many samples and tokens of each source over the whole run); "a" and "b",
each with "repeated", its tokens by source that were trained on before; "beyond_order" (what differs besides order and
amounts); "differences" (each with "what", "words", "a", "b"); "parting" (with "sample", "reason", "known"); and "rows".
"""
_EXTRAS = ("padding", "unused", "skipped", "skipped_documents", "truncated", "displaced")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="show|diff")
    show = actions.add_parser("show", help="one ledger as a table")
    show.add_argument("run", type=Path, metavar="RUN", help="a run folder or a checkpoint folder")
    show.add_argument("--json", action="store_true", help="print it as JSON")
    diff = actions.add_parser("diff", help="two ledgers side by side")
    diff.add_argument("a", type=Path, metavar="A", help="a run folder or a checkpoint folder")
    diff.add_argument("b", type=Path, nargs="?", metavar="B", help="default: the run's two newest checkpoints")
    diff.add_argument("--json", action="store_true", help="print it as JSON")


def main(argv: list[str] | None = None) -> int:
    """Shows or compares ledgers. Returns an exit code; raises CheckpointError."""
    parser = argparse.ArgumentParser(
        prog="stagemix ledger",
        description="Shows the ledger of a run: samples, tokens and epochs of each source in each training stage.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    console = console_for_tables()
    if args.action == "diff":
        return _diff(args.a, args.b, args.json, console)
    ledger = read_ledger(args.run)
    if args.json:
        rows = _rows(ledger)
        print(json.dumps(ledger.to_json() | {"rows": rows, "groups": _groups(rows)}, indent=2))
        return 0
    _show(ledger, console)
    return 0


def _rows(ledger: Ledger) -> list[dict[str, Any]]:
    """The ledger's rows with what was padding, unused, skipped, cut and displaced."""
    use = {(stage.name, name): taken for stage in ledger.stages for name, taken in stage.use.items()}
    rows = []
    for row in ledger_rows(ledger):
        taken = use.get((row["training_stage"], row["source"]))
        rows.append(row | {key: getattr(taken, key) if taken else 0 for key in _EXTRAS})
    return rows


def _groups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sums of each group of more than one source, by stage."""
    sums: dict[tuple[str, str], dict[str, Any]] = {}
    summed = ("samples", "target", "error", "tokens", "share", *_EXTRAS)
    for row in rows:
        key = row["training_stage"], row["group"]
        group = sums.setdefault(
            key, {"training_stage": key[0], "group": key[1], "sources": []} | dict.fromkeys(summed, 0)
        )
        group["sources"].append(row["source"])
        for what in summed:
            group[what] += row[what]
    return [group for group in sums.values() if len(group["sources"]) > 1]


def _show(ledger: Ledger, console: Console) -> None:
    console.print(
        f"{ledger.consumed_steps:,} steps, {ledger.consumed_samples:,} samples, "
        f"{format_count(ledger.consumed_tokens)} tokens; order {ledger.order_hash}"
    )
    rows = _rows(ledger)
    if padding := sum(row["padding"] for row in rows):
        share = padding / ledger.consumed_tokens
        console.print(f"of these tokens {format_count(padding)} are padding ({share:.1%}); the table counts the others")
    groups = {(group["training_stage"], group["group"]): group for group in _groups(rows)}
    extras = [key for key in _EXTRAS if any(row[key] for row in rows)]
    heads = [key.replace("_", " ") for key in extras]
    table = new_table("", "stage", "source", "samples", "target", "error", "tokens", "share", "epochs", *heads)
    previous = ""
    for row in sorted(
        rows, key=lambda row: (stage_position(row["training_stage"], ledger), row["group"], row["source"])
    ):
        name = row["training_stage"]
        if previous and name != previous:
            table.add_section()
        if (group := groups.pop((name, row["group"]), None)) is not None:
            cells = _cells(group, extras, "")
            table.add_row(name if name != previous else "", f"{row['group']} (group)", *cells, style="bold")
            previous = name
        table.add_row(name if name != previous else "", row["source"], *_cells(row, extras, f"{row['epochs']:.4f}"))
        previous = name
    console.print(table)
    for name, source in sorted(ledger.sources.items()):
        console.print(f"{name}: {float(source.epochs):.4f} epochs of {format_count(source.epoch_tokens)} tokens so far")
    for stage in ledger.stages:
        if words := StageObjective.from_json(stage.objective).words():
            console.print(f"{stage.name}: the loss is on {words}", soft_wrap=True)
    for event in ledger.events:
        console.print(f"event: {event_words(event)}", soft_wrap=True)
    if lost := not_trained(ledger.events):
        by_source = ", ".join(f"{name} {format_count(tokens)}" for name, tokens in lost.items())
        console.print(f"of these tokens, consumed and not trained on: {by_source}", soft_wrap=True)


def _cells(row: dict[str, Any], extras: list[str], epochs: str) -> list[str]:
    return [
        f"{row['samples']:,}",
        f"{row['target']:,.3f}",
        f"{row['error']:+.3f}",
        format_count(row["tokens"]),
        f"{row['share']:.2%}",
        epochs,
        *(format_count(row[key]) if row[key] else "" for key in extras),
    ]


def _diff(a: Path, b: Path | None, as_json: bool, console: Console) -> int:
    if b is None:
        folders = checkpoint_folders(a)
        if len(folders) < 2:
            raise CheckpointError(f"{a}: has {len(folders)} checkpoints; diff needs two, or a second path")
        a, b = folders[-2], folders[-1]
    one, other = read_ledger(a), read_ledger(b)
    same, found, parted = same_samples(one, other), differences(one, other), parting(one, other)
    rows = side_by_side(one, other)
    totals, beyond = (totals_by_source(one), totals_by_source(other)), beyond_order(one, other)
    if as_json:
        sides = {
            key: {
                "path": str(path),
                "consumed_samples": ledger.consumed_samples,
                "order": ledger.order_hash,
                "repeated": repeated_tokens(ledger),
            }
            for key, path, ledger in (("a", a, one), ("b", b, other))
        }
        record = {"same": same, "same_aggregate": totals[0] == totals[1], **sides, "beyond_order": beyond}
        record["differences"] = [difference.to_json() for difference in found]
        print(json.dumps(record | {"parting": parted.to_json(), "rows": rows}, indent=2))
    else:
        console.print(f"A {a}: {one.consumed_samples:,} samples, order {one.order_hash}", soft_wrap=True)
        console.print(f"B {b}: {other.consumed_samples:,} samples, order {other.order_hash}", soft_wrap=True)
        _show_difference(rows, found, parted, same, console)
        words = [aggregate_words(*totals)]
        words += [f"besides order and amounts: {', '.join(beyond) or 'nothing'} differs"]
        words += [f"{name}: {repeated_words(repeated_tokens(ledger))}" for name, ledger in (("A", one), ("B", other))]
        console.print("\n".join(words), soft_wrap=True)
    return EXIT_DONE if same else EXIT_CHANGED_PAST


def _show_difference(
    rows: list[dict[str, Any]], found: list[Difference], parted: Parting, same: bool, console: Console
) -> None:
    if found:
        console.print("\nwhat differs, A and B", style="bold")
    for difference in found:
        console.print(f"  {difference.words}", soft_wrap=True)
    table = new_table("", "stage", "source", "samples A", "samples B", "B − A", "tokens B − A", "epochs A", "epochs B")
    for row in rows:
        table.add_row(
            row["training_stage"],
            row["source"],
            f"{row['samples_a']:,}",
            f"{row['samples_b']:,}",
            f"{row['samples_b'] - row['samples_a']:+,}",
            f"{row['tokens_b'] - row['tokens_a']:+,}",
            f"{row['epochs_a']:.4f}",
            f"{row['epochs_b']:.4f}",
        )
    console.print(table)
    where = f"they part at sample {parted.sample:,}: {parted.reason}" if parted.sample is not None else parted.reason
    console.print(where, soft_wrap=True)
    console.print("the same samples in the same order" if same else "not the same samples in the same order")
