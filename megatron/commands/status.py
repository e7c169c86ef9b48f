"""`stagemix status`: where runs are, without disturbing them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.commands.status_words import LINE_COLUMNS, show_status, status_line, watch_seconds
from megatron.commands.tables import console_for_tables, new_table
from megatron.config.errors import EXIT_DONE, EXIT_USAGE, ConfigError
from megatron.launch.run_queue import Queue
from megatron.launch.run_status import NoRun, run_status

EPILOG = """\
RUN is the folder that run.output names. Read are the records of starts and ends, the heartbeat, the newest checkpoint's
manifest and state.json (no tensor), and the end of metrics.jsonl: a moment, however long the run is. Nothing is written
and no process is asked, so that it can be used on any machine that sees the folder. Where there is squeue, SLURM is
asked for a moment whether the run's job waits or runs, and until when.

states
  running, starting   heard of within the last minute (or six heartbeats)
  silent              started, without a record of its end, and not heard of: killed, or its machine hangs
  submitted           its job was submitted (stagemix launch), and has not begun
  waiting             ended, and its job is back in the queue (stagemix requeue)
  stopped, failed, complete

Time left counts saves, validation and evaluation. Goodput is the share of wall time since the first start that became
steps which the weights still hold.

examples:
  stagemix status runs/mine
  stagemix status runs/*                          # a line each
  stagemix status runs/mine --watch 30
  stagemix status runs/mine --json | jq .progress.seconds_left

Of several folders those that hold no run (runs/index-cache in runs/*) are passed over with a note.

exit codes: 0 shown, whatever the runs' states; 2 no run was shown, or a path that is no folder was named"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    built = argparse.ArgumentParser(
        prog="stagemix status",
        description="Shows state, progress, time left, tokens by source, checkpoints, restarts and goodput of runs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    built.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run's folder; several: a line each")
    built.add_argument("--json", action="store_true", help="print an object a run; a line each of several, or to watch")
    built.add_argument("--watch", type=watch_seconds, metavar="SECONDS", help="show it again and again, until Ctrl-C")
    return built


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    args = parser().parse_args(argv)
    if args.watch is None:
        return _show(args.runs, args.json, not args.json or len(args.runs) == 1)
    console = console_for_tables()
    try:
        while True:
            if console.is_terminal and not args.json:
                console.clear()
            code = _show(args.runs, args.json, False)
            sys.stdout.flush()
            if code and len(args.runs) == 1:
                return code
            time.sleep(args.watch)
    except KeyboardInterrupt:
        return EXIT_DONE


def _show(runs: Sequence[Path], as_json: bool, indented: bool) -> int:
    """Shows the runs once. Of several, folders that hold none are passed over with a note, as a shell's * names them
    too; what is no folder is named in its line, and the exit code tells."""
    found: list[tuple[Path, dict[str, Any] | None, str]] = []
    passed: list[tuple[Path, str]] = []
    queue = Queue()
    for run in runs:
        try:
            found.append((run, run_status(run, queue=queue), ""))
        except ConfigError as error:
            if len(runs) == 1:
                raise
            if isinstance(error, NoRun):
                passed.append((run, f"{error}"))
            else:
                found.append((run, None, f"{error}"))
    wrong = any(status is None for _, status, _ in found) or not found
    code = EXIT_USAGE if wrong else EXIT_DONE
    if as_json:
        for run, status, fault in [*found, *((run, None, fault) for run, fault in passed)]:
            print(json.dumps(status or {"run": str(run), "error": fault}, indent=1 if indented else None))
        return code
    console = console_for_tables()
    if len(runs) == 1 and found[0][1] is not None:
        show_status(found[0][1], console)
        return code
    if found:
        table = new_table("", "folder", *LINE_COLUMNS)
        for column in table.columns[:3]:
            column.justify = "left"
        tails = _shortest_tails([run for run, _, _ in found])
        for (_, status, _), tail in zip(found, tails, strict=True):
            table.add_row(tail, *(status_line(status) if status else ["–", "no run", *["–"] * 8]))
        console.print(table)
    for fault in [fault for _, _, fault in found if fault]:
        print(f"note: {fault}", file=sys.stderr)
    for _, fault in passed:
        print(f"note: passed over: {fault}", file=sys.stderr)
    return code


def _shortest_tails(runs: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell it from the others."""
    whole = [run.absolute().parts for run in runs]
    tails = []
    for parts in whole:
        others = [other for other in whole if other != parts]
        counts = range(1, len(parts))
        count = next((n for n in counts if all(other[-n:] != parts[-n:] for other in others)), len(parts))
        tails.append(str(Path(*parts[-count:])))
    return tails
