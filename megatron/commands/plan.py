"""`stagemix plan`: what a run will train on, before it does. Runs in under a second and never imports torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron.commands.frame import config_arguments, load_from
from megatron.commands.tables import console_for_tables, new_table
from megatron.config.load import json_schema
from megatron.config.quantities import format_count
from megatron.planner.ledger_files import read_ledger
from megatron.planner.plan import plan_of
from megatron.planner.resolve import resolve_run

EPILOG = """\
example:
  stagemix plan examples/minimal.toml
  stagemix plan CONFIG --set stages.cooldown.tokens=5M --json > plan.json
  stagemix plan CONFIG --ledger runs/mine    # would this edited config resume that run?

Sources whose files are not there yet can be planned with: sources.NAME.tokens = "503B" and no data.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    parser.add_argument(
        "--allow-lr-change", action="store_true", help="with --ledger: permit another learning rate in a begun stage"
    )
    parser.add_argument(
        "--ledger",
        type=Path,
        metavar="RUN",
        help="plan on from this run or checkpoint, and check its past is unchanged",
    )


def main(argv: list[str] | None = None) -> int:
    """Prints the plan. Returns an exit code; raises StagemixError."""
    if argv is not None and argv[:1] == ["--schema"]:
        print(json.dumps(json_schema(), indent=2))
        return 0
    parser = argparse.ArgumentParser(
        prog="stagemix plan",
        description="Shows, for each training stage and source, tokens, epochs and shortfall, and the learning rate at "
        "each boundary. `stagemix plan --schema` prints the JSON Schema of config files.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    config = load_from(args)
    ledger = read_ledger(args.ledger) if args.ledger else None
    plan = plan_of(resolve_run(config, ledger=ledger, allow_lr_change=args.allow_lr_change))
    if args.json:
        print(json.dumps(plan, indent=2))
        return 0
    _show(config.run.name, plan, console_for_tables())
    return 0


def _show(name: str, plan: dict[str, Any], console: Console) -> None:
    total = f"{plan['steps']:,} steps, {plan['samples']:,} samples, {format_count(plan['tokens'])} tokens"
    console.print(f"[bold]{name}[/bold]: {len(plan['stages'])} training stages, {total}\n")
    table = new_table(
        "Training stages", "stage", "source", "weight", "samples", "tokens", "share", "epochs", "after it", "short by"
    )
    for stage in plan["stages"]:
        for index, row in enumerate(stage["sources"]):
            table.add_row(
                stage["name"] if index == 0 else "",
                row["source"] if row["source"] == row["group"] else f"{row['source']} ({row['group']})",
                _weight(row),
                f"{row['samples']:,}",
                format_count(row["tokens"]),
                f"{row['share']:.2%}",
                f"{row['epochs']:.3f}",
                f"{row['epochs_after']:.3f}",
                format_count(row["shortfall"]) if row["shortfall"] else "",
            )
        table.add_section()
    console.print(table)
    _show_stages(plan, console)
    _show_sources(plan, console)


def _weight(row: dict[str, Any]) -> str:
    first, last = row["weight_first"], row["weight_last"]
    return f"{first:.4g}" if first == last else f"{first:.4g} → {last:.4g}"


def _show_stages(plan: dict[str, Any], console: Console) -> None:
    table = new_table(
        "Learning rate and length", "stage", "from token", "steps", "batch x length", "first rate", "last rate"
    )
    for stage in plan["stages"]:
        table.add_row(
            stage["name"],
            format_count(stage["start_token"]),
            f"{stage['steps']:,}",
            f"{stage['global_batch_size']} x {stage['seq_length']}",
            f"{stage['lr_first']:.3g}",
            f"{stage['lr_last']:.3g}",
        )
    console.print(table)
    for stage in plan["stages"]:
        for note in [
            *stage["notes"],
            *(["every source starts from its beginning"] if stage["cursor"] == "restart" else []),
        ]:
            console.print(f"  {stage['name']}: {note}")


def _show_sources(plan: dict[str, Any], console: Console) -> None:
    table = new_table(
        "Sources over the whole run", "source", "one epoch", "trained on", "epochs", "cap", "when dry", "unused"
    )
    for row in plan["sources"]:
        table.add_row(
            row["source"] + (" (planned by size)" if row["planned_only"] else ""),
            format_count(row["epoch_tokens"]),
            format_count(row["tokens"]),
            f"{row['epochs']:.3f}",
            f"{row['max_epochs']:g}",
            row["dry"],
            format_count(row["unused"]) if row["unused"] else "",
        )
    console.print(table)
