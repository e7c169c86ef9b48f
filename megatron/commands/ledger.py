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
from megatron.planner.ledger_files import checkpoint_folders, read_ledger

EPILOG = """\
example:
  stagemix ledger show runs/mine                       # the newest checkpoint of a run
  stagemix ledger show runs/mine/checkpoints/step-000001000 --json
  stagemix ledger diff runs/mine runs/other            # order hashes, samples and epochs side by side
  stagemix ledger diff runs/mine                       # its two newest checkpoints: what was trained on in between

`diff` exits with 0 when both have consumed the same samples in the same order, and with 5 when they have not.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="show|diff")
    show = actions.add_parser("show", help="one ledger as a table")
    show.add_argument("run", type=Path, metavar="RUN", help="a run folder or a checkpoint folder")
    show.add_argument("--json", action="store_true", help="print it as JSON")
    diff = actions.add_parser("diff", help="two ledgers side by side")
    diff.add_argument("a", type=Path, metavar="A", help="a run folder or a checkpoint folder")
    diff.add_argument("b", type=Path, nargs="?", metavar="B", help="default: the run's two newest checkpoints")


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
        return _diff(args.a, args.b, console)
    ledger = read_ledger(args.run)
    if args.json:
        print(json.dumps(ledger.to_json() | {"rows": ledger_rows(ledger)}, indent=2))
        return 0
    _show(ledger, console)
    return 0


def _show(ledger: Ledger, console: Console) -> None:
    console.print(
        f"{ledger.consumed_steps:,} steps, {ledger.consumed_samples:,} samples, "
        f"{format_count(ledger.consumed_tokens)} tokens; order {ledger.order_hash}"
    )
    table = new_table("", "stage", "source", "samples", "target", "error", "tokens", "share", "epochs")
    previous = ""
    for row in ledger_rows(ledger):
        name = row["training_stage"]
        if previous and name != previous:
            table.add_section()
        table.add_row(
            name if name != previous else "",
            row["source"],
            f"{row['samples']:,}",
            f"{row['target']:,.3f}",
            f"{row['error']:+.3f}",
            format_count(row["tokens"]),
            f"{row['share']:.2%}",
            f"{row['epochs']:.4f}",
        )
        previous = name
    console.print(table)
    for name, source in sorted(ledger.sources.items()):
        console.print(f"{name}: {float(source.epochs):.4f} epochs of {format_count(source.epoch_tokens)} tokens so far")
    for event in ledger.events:
        console.print(f"event: {json.dumps(event)}")


def _diff(a: Path, b: Path | None, console: Console) -> int:
    if b is None:
        folders = checkpoint_folders(a)
        if len(folders) < 2:
            raise CheckpointError(f"{a}: has {len(folders)} checkpoints; diff needs two, or a second path")
        a, b = folders[-2], folders[-1]
    one, other = read_ledger(a), read_ledger(b)
    console.print(f"A {a}: {one.consumed_samples:,} samples, order {one.order_hash}")
    console.print(f"B {b}: {other.consumed_samples:,} samples, order {other.order_hash}")
    rows_a, rows_b = _by_key(one), _by_key(other)
    table = new_table("", "stage", "source", "samples A", "samples B", "B − A", "tokens B − A", "epochs A", "epochs B")
    for key in sorted({*rows_a, *rows_b}, key=lambda key: (_position(key[0], one, other), key[1])):
        row_a, row_b = rows_a.get(key, _NONE), rows_b.get(key, _NONE)
        table.add_row(
            *key,
            f"{row_a['samples']:,}",
            f"{row_b['samples']:,}",
            f"{row_b['samples'] - row_a['samples']:+,}",
            f"{row_b['tokens'] - row_a['tokens']:+,}",
            f"{row_a['epochs']:.4f}",
            f"{row_b['epochs']:.4f}",
        )
    console.print(table)
    same = one.consumed_samples == other.consumed_samples and one.order == other.order
    console.print("the same samples in the same order" if same else "not the same samples in the same order")
    return EXIT_DONE if same else EXIT_CHANGED_PAST


_NONE: dict[str, Any] = {"samples": 0, "tokens": 0, "epochs": 0.0}


def _by_key(ledger: Ledger) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["training_stage"], row["source"]): row for row in ledger_rows(ledger)}


def _position(name: str, one: Ledger, other: Ledger) -> int:
    names = [stage.name for stage in one.stages] + [stage.name for stage in other.stages]
    return names.index(name)
