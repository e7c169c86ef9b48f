"""A run's status in words: what `stagemix status` prints."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from megatron.commands.tables import clipped, new_table
from megatron.config.quantities import format_count
from megatron.data.ledger_events import event_words
from megatron.launch.attempts import reason_words

_BAR = 30
_SHOWN_ATTEMPTS = 12
_WORDS = {"waiting": "waiting for its job to start again", "unknown": "not known to run"}
_ASIDE = {"checkpoint": "saves", "validation": "validation", "evaluation": "evaluation"}


def show_status(status: Mapping[str, Any], console: Console) -> None:
    """One run, in full."""
    console.print(f"{status['name']}  {state_words(status)}", style="bold", soft_wrap=True)
    for label, words in (
        ("progress", _progress(status)),
        ("speed", _speed(status)),
        ("loss", _loss(status)),
        ("left", _left(status)),
        ("saved", _saved(status)),
        ("time", time_words(status)),
        ("steps", _odd_steps(status)),
        ("nodes", _nodes(status)),
    ):
        if words:
            console.print(f"  {label:<9}{words}", soft_wrap=True)
    for event in status["events"][-3:]:
        console.print(f"  {'event':<9}{event_words(event)}", soft_wrap=True)
    for note in status["notes"]:
        console.print(f"  {'note':<9}{note}", soft_wrap=True)
    _show_sources(status["sources"], console)
    _show_attempts(status, console)


def status_line(status: Mapping[str, Any]) -> list[str]:
    """One run, as a row: name, state, stage, step, done, tokens/s, loss, left, restarts, goodput."""
    progress, speed, wall = status["progress"], status["speed"], status["wall_time"]
    left = progress["seconds_left"]
    return [
        clipped(status["name"], 24),
        status["state"] + (f" {status['code']}" if status["code"] else ""),
        progress["training_stage"] or "–",
        f"{progress['step']:,}" + (f" of {progress['steps']:,}" if progress["steps"] else ""),
        _percent(progress["consumed_tokens"], progress["tokens"]),
        format_count(round(speed["tokens_per_second"])) if speed["tokens_per_second"] else "–",
        f"{speed['loss']:.4f}" if speed["loss"] is not None else "–",
        span(left) if left is not None and status["state"] != "complete" else "–",
        f"{max(0, len(status['attempts']) - 1)}",
        f"{wall['goodput']:.1%}" if wall else "–",
    ]


LINE_COLUMNS = ("run", "state", "stage", "step", "done", "tokens/s", "loss", "left", "restarts", "goodput")


def state_words(status: Mapping[str, Any]) -> str:
    """What it does, since when, where; or how it ended."""
    state, now = status["state"], status["now"]
    if state == "submitted":
        at = f"{clock(status['since'])} ({span(now - status['since'])} ago)"
        return f"submitted: job {status['job']['id']} was submitted at {at} and has not begun" + (
            f"; {status['reason']}" if status["reason"] else ""
        )
    words = f"{_WORDS.get(state, state)} since {clock(status['since'])} ({span(now - status['since'])})"
    if status["live"]:
        words += _place(status)
        if status["phase"] and status["phase_since"]:
            words += f"; {status['phase']} for {span(now - status['phase_since'])}"
        return words + _job_end(status)
    if state == "silent":
        heard = f"not heard of for {span(now - status['last_sign'])}"
        return f"silent: {heard}{_place(status)}: {status['reason']}: killed, or its machine hangs"
    code = f", exit code {status['code']}" if status["code"] else ""
    reason = reason_words(status["reason"], 400)
    return f"{words}{code}" + (f": {reason}" if reason and state != "complete" else "") + _job_end(status)


def _job_end(status: Mapping[str, Any]) -> str:
    ends = status["job_ends"]
    return f"; the job's time is over in {span(ends - status['now'])}, at {clock(ends)}" if ends else ""


def span(seconds: float) -> str:
    """A duration for people: "2 d 3 h", "4 h 5 min", "6 min", "7 s"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, hours, days = whole // 60 % 60, whole // 3600 % 24, whole // 86400
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def clock(when: float) -> str:
    """Local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def _place(status: Mapping[str, Any]) -> str:
    hosts = status["hosts"]
    words = f", attempt {status['attempt']}" if status["attempt"] else ""
    if hosts:
        several = f"{len(hosts)} hosts ({hosts[0]} … {hosts[-1]})" if len(hosts) > 3 else ", ".join(hosts)
        words += f" on {several}"
    if status["processes"] > 1:
        words += f", {status['processes']} processes"
    job = status["job"]
    if "id" in job:
        words += f", job {job['array_job']}_{job['array_task']}" if "array_task" in job else f", job {job['id']}"
    return words


def _progress(status: Mapping[str, Any]) -> str:
    progress = status["progress"]
    done, of, stage = progress["consumed_tokens"], progress["tokens"], progress["stage"]
    if not of:
        return f"step {progress['step']:,}, {format_count(done)} tokens; the schedule is known after the first save"
    filled = min(_BAR, _BAR * done // of)
    words = f"[{'#' * filled}{'.' * (_BAR - filled)}] {_percent(done, of)}: step {progress['step']:,} of "
    words += f"{progress['steps']:,}, {format_count(done)} of {format_count(of)} tokens"
    if stage:
        number = progress["stages"].index(progress["training_stage"]) + 1
        words += f"; stage {progress['training_stage']} ({number} of {len(progress['stages'])}): step "
        words += f"{stage['step']:,} of {stage['steps']:,}"
    elif progress["training_stage"]:
        words += f"; stage {progress['training_stage']}"
    return words


def _speed(status: Mapping[str, Any]) -> str:
    speed = status["speed"]
    if not speed["tokens_per_second"]:
        return ""
    words = f"{format_count(round(speed['tokens_per_second']))} tokens/s"
    if speed["aside_seconds"]:
        words += f" ({format_count(round(speed['tokens_per_second_with_all']))} with "
        words += ", ".join(_ASIDE.get(name, name) for name in speed["aside_seconds"]) + ")"
    if padding := speed.get("padding_share"):
        words += f" and {padding:.0%} padding"
    words += f", {speed['step_seconds']:.3g} s a step"
    return words + (f", MFU {speed['mfu']:.1%}" if speed["mfu"] is not None else "")


def _loss(status: Mapping[str, Any]) -> str:
    speed, validation = status["speed"], status["validation"]
    words = ""
    if speed["loss"] is not None:
        words = f"{speed['loss']:.4f} over {speed['over_steps']} steps ({_by_source(speed['loss_by_source'])})"
    if validation:
        words += f"{'; ' if words else ''}validation at step {validation['step']:,}: "
        words += _by_source(validation["validation"])
    return words


def _by_source(losses: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None) or "none"


def _left(status: Mapping[str, Any]) -> str:
    progress = status["progress"]
    run, stage = progress["seconds_left"], progress["stage"]
    if run is None or status["state"] == "complete":
        return ""
    words = f"{span(run)} to the end of the run"
    if stage and len(progress["stages"]) > 1:
        words = f"{span(stage['seconds_left'])} to the end of the stage, {words}"
    return words + (f", about {clock(status['now'] + run)}" if status["live"] else " once it goes on")


def _saved(status: Mapping[str, Any]) -> str:
    saved = status["checkpoint"]
    if saved["step"] is None:
        words = "no whole checkpoint yet"
    else:
        words = (
            f"step {saved['step']:,}, {span(saved['age'])} ago, {format_count(saved['bytes'])}B, all files there in "
        )
        words += f"their sizes; {saved['count']} checkpoint{'s' if saved['count'] != 1 else ''}"
    if saved["damaged"]:
        words += f"; {len(saved['damaged'])} damaged"
    if saved["next_step"] is not None:
        words += f"; next at step {saved['next_step']:,}"
        if saved["next_seconds"] is not None:
            words += f" in {span(saved['next_seconds'])}"
    return words


def time_words(status: Mapping[str, Any]) -> str:
    """Goodput, and where the rest of the time went."""
    wall = status["wall_time"]
    if wall is None:
        return "goodput is not known: no start is on record"
    parts = {
        "starting": wall["start"],
        **{_ASIDE.get(name, name): seconds for name, seconds in wall["aside"].items()},
        "steps redone": wall["redone"],
        "between attempts": wall["between"],
        "other": wall["other"],
    }
    total = wall["total"] or 1.0
    rest = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in parts.items() if seconds / total >= 0.0005)
    words = f"goodput {wall['goodput']:.1%} of {span(wall['total'])} since the first start"
    return f"{words}{'' if wall['exact'] else ' (partly reckoned)'}" + (f"; {rest}" if rest else "")


def _odd_steps(status: Mapping[str, Any]) -> str:
    words = []
    if status["skipped_steps"]:
        words.append(f"{status['skipped_steps']:,} without an update")
    if status["redone_steps"]:
        words.append(f"{status['redone_steps']:,} lost and done again, or to be done")
    kinds = [event.get("event") for event in status["events"]]
    for kind, name in (("spike", "loss spikes skipped"), ("rolled-back", "roll-backs"), ("passed-over", "passed over")):
        if kind in kinds:
            words.append(f"{name} {kinds.count(kind)}")
    if status["not_trained"]:
        words.append(f"{format_count(sum(status['not_trained'].values()))} tokens consumed and not trained on")
    return ", ".join(words)


def _nodes(status: Mapping[str, Any]) -> str:
    return f"left out: {', '.join(status['excluded_nodes'])} (bad_nodes.json)" if status["excluded_nodes"] else ""


def _show_sources(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    if not rows:
        return
    table = new_table("", "stage", "source", "samples", "target", "tokens", "share")
    before = None
    for row in rows:
        stage = row["training_stage"]
        if before is not None and stage != before:
            table.add_section()
        target = "" if row["target"] is None else f"{row['target']:,.1f}"
        cells = (f"{row['samples']:,}", target, format_count(row["tokens"]), f"{row['share']:.2%}")
        table.add_row("" if stage == before else stage, row["source"], *cells)
        before = stage
    console.print(table)


def _show_attempts(status: Mapping[str, Any], console: Console) -> None:
    attempts = status["attempts"]
    if not attempts:
        return
    hidden = len(attempts) - _SHOWN_ATTEMPTS
    if hidden > 0:
        console.print(f"  {hidden} earlier attempts are not shown; --json has them all")
    table = new_table("", "attempt", "started", "steps", "lost", "took", "ended")
    table.columns[-1].justify = "left"
    for row in attempts[-_SHOWN_ATTEMPTS:]:
        steps = "" if row["from_step"] is None else f"{row['from_step']:,} – {_or(row['to_step'], '?')}"
        took = span(row["end_time"] - row["time"]) if row["end_time"] else ""
        code = "" if row["code"] is None else f"{row['code']}: "
        ended = code + reason_words(row["reason"], 50 - len(code))
        table.add_row(f"{row['attempt']}", clock(row["time"]), steps, _or(row["lost_steps"], ""), took, ended)
    console.print(table)


def _or(number: int | None, words: str) -> str:
    return words if number is None else f"{number:,}"


def _percent(part: int, whole: int | None) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def watch_seconds(words: str) -> float:
    """The argument of --watch, from a tenth of a second to a day."""
    try:
        seconds = float(words)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{words!r} is not a number of seconds from 0.1 on")
    return seconds
