"""`stagemix study status`: where a study is, without disturbing it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from megatron.commands.status_words import span, watch_seconds
from megatron.commands.study_action import Action, planned_study
from megatron.commands.study_tables import as_bytes
from megatron.commands.study_verified import verified_words
from megatron.commands.tables import clipped, console_for_tables, new_table
from megatron.config.errors import EXIT_DONE
from megatron.config.quantities import format_count
from megatron.launch.attempts import reason_words
from megatron.launch.run_queue import Queue
from megatron.study.node_state import IN_PART, STATES
from megatron.study.study_status import study_status
from megatron.study.verification import IndexBuilding, Verification

EPILOG = f"""\
Read are the records that each node's run leaves in its folder (as `stagemix status` does), manifests of checkpoints and
the ledgers in them; no tensor. Nothing is written and no process is asked, but SLURM's queue where there is one.

states of a node
{chr(10).join(f"  {word:<10} {words}" for word, words in STATES.items())}

"verified" compares the tokens in the ledgers of finished nodes' checkpoints with the plan.

examples:
  stagemix study status STUDY
  stagemix study status STUDY --watch               # again and again, every 10 seconds, until Ctrl-C
  stagemix study status STUDY --arm text --seeds 1,2
  stagemix study status STUDY --json | jq .tokens

exit codes: 0 shown, whatever the nodes' states · 2 the study cannot be planned · 3 data or study.json is broken
"""


def _arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("--json", action="store_true", help="print it as one JSON object; a line each time to watch")
    one.add_argument(
        "--watch",
        type=watch_seconds,
        nargs="?",
        const=10.0,
        metavar="SECONDS",
        help="show it again and again; default 10",
    )


def _run(args: argparse.Namespace) -> int:
    console, queue = console_for_tables(), Queue()
    if args.watch is None:
        status = study_status(planned_study(args), queue=queue)
        _print(status, console, args.json, indented=True)
        return EXIT_DONE
    try:
        while True:
            status = study_status(planned_study(args), queue=queue)
            if console.is_terminal and not args.json:
                console.clear()
            _print(status, console, args.json, indented=False)
            sys.stdout.flush()
            time.sleep(args.watch)
    except KeyboardInterrupt:
        return EXIT_DONE


def _print(status: Mapping[str, Any], console: Console, as_json: bool, indented: bool) -> None:
    if as_json:
        print(json.dumps(status, indent=2 if indented else None, default=str))
    else:
        show_status(status, console)


def show_status(status: Mapping[str, Any], console: Console) -> None:
    """Prints what `study_status` gives."""
    counts = ", ".join(f"{count} {word}" for word, count in status["counts"].items())
    console.print(f"{status['study']}  {len(status['nodes'])} nodes: {counts}", style="bold", soft_wrap=True)
    _show_nodes(status, console)
    for row in status["nodes"]:
        if row["reason"] and row["state"] in ("failed", "stopped", "queued", "blocked", "trained"):
            code = f", exit code {row['code']}" if row["code"] else ""
            words = reason_words(row["reason"], 300)
            console.print(f"  {row['label']} {row['id'][:8]} {row['state']}{code}: {words}", soft_wrap=True)
    _show_arms(status, console)
    tokens = status["tokens"]
    left = f", {span(status['seconds_left'])} at the pace of what trains now" if status["seconds_left"] else ""
    console.print(
        f"tokens: {format_count(tokens['trained'])} of {format_count(tokens['planned'])} trained, "
        f"{format_count(tokens['left'])} left{left}",
        soft_wrap=True,
    )
    known = {name: value for name, value in status["verification"].items() if name not in ("ratio", "planned_ratio")}
    for line in verified_words(Verification(**known), IndexBuilding(**status["indexes"])):
        console.print(line, soft_wrap=True)
    console.print(f"disk: {as_bytes(status['disk_bytes'])} in {status['output']}", soft_wrap=True)
    for line in status["unneeded"]:
        console.print(f"no arm needs it any more: {line}", soft_wrap=True)
    for line in status["edits"]:
        console.print(f"edited, and `study run` would refuse it: {line}", soft_wrap=True)
    for line in status["notes"]:
        console.print(f"note: {line}", soft_wrap=True)


def _show_nodes(status: Mapping[str, Any], console: Console) -> None:
    several = len({row["seed"] for row in status["nodes"]}) > 1
    columns = ["node", "stage", *(["seed"] if several else []), "state", "step", "tokens", "loss", "tokens/s", "left"]
    table = new_table("", *columns, "starts", "arms")
    for column in (0, 2 + several, -1):
        table.columns[column].justify = "left"
    for row in status["nodes"]:
        speed, left = row["tokens_per_second"], row["seconds_left"]
        state = row["state"]
        if row["evaluation"] == "due" and state == "trained":
            state += ", evaluated in part" if row["reason"].startswith(IN_PART) else ", not evaluated"
        table.add_row(
            row["id"][:8],
            clipped(row["label"], 24),
            *([str(row["seed"])] if several else []),
            state,
            f"{row['step']:,} of {row['steps']:,}" if row["kind"] == "train" else "average",
            format_count(row["tokens_planned"]),
            "–" if row["loss"] is None else f"{row['loss']:.4f}",
            "–" if speed is None else format_count(round(speed)),
            "–" if left is None else span(left),
            str(row["attempts"]) if row["attempts"] else "–",
            clipped(", ".join(row["arms"]), 40),
        )
    console.print(table)


def _show_arms(status: Mapping[str, Any], console: Console) -> None:
    arms = status["arms"]
    several = len({arm["seed"] for arm in arms}) > 1
    done = [_arm(arm, several) for arm in arms if arm["done"]]
    known = f"arms: {len(done)} of {len(arms)} trained, {sum(arm['evaluated'] for arm in arms)} evaluated"
    console.print(known + (f"; trained: {', '.join(done)}" if done else ""), soft_wrap=True)
    for state in dict.fromkeys(arm["state"] for arm in arms if not arm["done"]):
        words = [f"{_arm(arm, several)} (at {arm['at']})" for arm in arms if not arm["done"] and arm["state"] == state]
        console.print(f"  {state}: {', '.join(words)}", soft_wrap=True)


def _arm(arm: Mapping[str, Any], several: bool) -> str:
    return f"{arm['name']} seed {arm['seed']}" if several else str(arm["name"])


ACTION = Action(
    "Shows each node's state, arms that are done, tokens, and what ledgers verify.", EPILOG, _arguments, _run
)
