"""All that `stagemix status` shows of a run, as plain JSON values, read from its folder in a moment, however long the
run is: state.json of the newest checkpoint sums up what came before it, the end of metrics.jsonl tells what came since.

Nothing is written, locked or asked of the processes.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.config.errors import EXIT_DONE, EXIT_REQUEUE, ConfigError
from megatron.data.ledger import Ledger, SourceUse
from megatron.data.ledger_events import not_trained
from megatron.data.weight_function import WeightFunction
from megatron.launch.attempts import (
    ATTEMPTS,
    EXIT,
    HEARTBEAT,
    Attempt,
    Heartbeat,
    read_attempts,
    read_exit,
    read_heartbeat,
)
from megatron.launch.bad_nodes import BAD_NODES, excluded_hosts
from megatron.launch.requeue_facts import REQUEUE, read_requeue
from megatron.launch.run_checkpoints import SeenCheckpoint, newest_checkpoints
from megatron.launch.run_queue import Queue, with_queue
from megatron.launch.run_state import RunState, state_of
from megatron.launch.slurm_submit import JOBS, submissions
from megatron.launch.wall_time import StepTime, wall_time
from megatron.metrics.row_tail import ASIDE, Pace, RowTail, pace_of, read_tail, seconds_in, without_repeats

_METRICS, _DISCARDED, _CONFIG = "metrics.jsonl", "metrics.discarded.jsonl", "config.toml"
_MARKS = (ATTEMPTS, HEARTBEAT, EXIT, _METRICS, "checkpoints", REQUEUE, f"slurm/{JOBS}")


class NoRun(ConfigError):
    """A folder that holds nothing of a run."""


@dataclass(frozen=True)
class _Seen:
    """What was read. checkpoint: the newest that is whole."""

    output: Path
    now: float
    config: dict[str, Any]
    attempts: list[Attempt]
    beat: Heartbeat | None
    state: RunState
    checkpoints: list[SeenCheckpoint]
    count: int
    tail: RowTail
    discarded: RowTail
    notes: list[str]

    @property
    def checkpoint(self) -> SeenCheckpoint | None:
        return next((one for one in self.checkpoints if not one.fault), None)

    @property
    def step(self) -> int:
        """Steps done."""
        at = self.checkpoint.step if self.checkpoint else 0
        beat = self.beat.step if self.beat is not None and self.state.live else 0
        return max(at, int(self.tail.last.get("step", 0)), beat)

    @property
    def every(self) -> int | None:
        return _number(self.config, "checkpoint", "every") or 1000


def run_status(output: Path, now: float | None = None, queue: Queue | None = None) -> dict[str, Any]:
    """The status of the run in a folder. queue: to ask about its job; None: nobody is asked.

    Raises NoRun for a folder that holds none, ConfigError for what is no run's folder.
    """
    seen = _read(output, time.time() if now is None else now, queue)
    save_seconds = seen.beat.save_seconds if seen.beat else None
    pace = pace_of(seen.tail.steps, seen.every, save_seconds)
    progress = _progress(seen, pace)
    wall = _wall_time(seen)
    ledger = seen.checkpoint.ledger if seen.checkpoint else None
    return {
        "run": str(output),
        "name": seen.config.get("run", {}).get("name") or output.name,
        "now": seen.now,
        **asdict(seen.state),
        "progress": progress,
        "speed": _speed(pace),
        "sources": _sources(seen, ledger),
        "checkpoint": _checkpoint(seen, progress, pace),
        "attempts": _attempts(seen),
        "redone_steps": len(without_repeats(seen.discarded.steps)),
        "wall_time": None if wall is None else {**asdict(wall), "goodput": wall.goodput},
        "skipped_steps": _skipped(seen),
        "events": ledger.events if ledger else [],
        "not_trained": not_trained(ledger.events) if ledger else {},
        "validation": dict(seen.tail.validation) if seen.tail.validation else None,
        "excluded_nodes": _excluded(seen),
        "notes": seen.notes,
    }


def _read(output: Path, now: float, queue: Queue | None) -> _Seen:
    _check_folder(output)
    notes: list[str] = []
    config = _config(output / _CONFIG, notes)
    attempts, beat = read_attempts(output), read_heartbeat(output)
    checkpoints, count = newest_checkpoints(output)
    notes += [f"checkpoint {one.path.name} is damaged: {one.fault}" for one in checkpoints if one.fault]
    whole = next((one for one in checkpoints if not one.fault), None)
    since = whole.step if whole else None
    tail = _tail(output / _METRICS, since, notes)
    if since is not None and not tail.reaches(since):
        notes.append(
            f"{_METRICS}: its first {tail.unread} bytes were not read, some rows since step {since} among them"
        )
    discarded = _tail(output / _DISCARDED, None, notes)
    if discarded.unread:
        notes.append(
            f"{_DISCARDED}: its first {discarded.unread} bytes were not read: steps redone are counted without"
        )
    interval = _number(config, "health", "heartbeat_seconds") or 10
    sent = (submissions(output / "slurm") or [{}])[-1]
    decision = read_requeue(output)
    state = state_of(attempts, read_exit(output), beat, decision, tail.modified, now, interval, sent)
    if queue is not None:
        state = with_queue(state, queue, decision.get("attempt") == state.attempt)
    return _Seen(output, now, config, attempts, beat, state, checkpoints, count, tail, discarded, notes)


def _check_folder(output: Path) -> None:
    if output.is_file():
        named = ""
        if output.suffix == ".toml":
            named = f", which its run.output says: {_config(output, []).get('run', {}).get('output', 'nothing')}"
        raise ConfigError(f"{output}: is a file: name the run's folder{named}")
    if not output.is_dir():
        raise ConfigError(f"{output}: no such folder: name the one that run.output says; a run makes it when it starts")
    if any((output / name).exists() for name in _MARKS):
        return
    if (output / "manifest.json").exists() and output.parent.name == "checkpoints":
        raise ConfigError(f"{output}: is a checkpoint: name the run's folder, {output.parent.parent}")
    raise NoRun(f"{output}: holds no run: none of {', '.join(_MARKS)} is there: name the folder that run.output says")


def _config(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.name} is not there: the run's name, and how often it saves, are not known")
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} could not be read: {error}")
    return {}


def _number(config: Mapping[str, Any], table: str, key: str) -> int | None:
    section = config.get(table)
    value = section.get(key) if isinstance(section, dict) else None
    return value if isinstance(value, int) and value > 0 else None


def _tail(path: Path, since: int | None, notes: list[str]) -> RowTail:
    try:
        return read_tail(path, since)
    except OSError as error:
        notes.append(f"{path.name} could not be read: {error.strerror}")
        return RowTail()


def _progress(seen: _Seen, pace: Pace) -> dict[str, Any]:
    """Where it is: steps and tokens of the run and of its training stage, and seconds left at the recent pace."""
    last, state = seen.tail.last, seen.checkpoint.state if seen.checkpoint else {}
    beat = seen.beat if seen.beat and seen.beat.tokens else None
    at = seen.checkpoint.step if seen.checkpoint else -1
    newer = last if last.get("step", -1) >= at else state
    tokens = max(int(newer.get("consumed_tokens", 0)), beat.consumed_tokens if beat and seen.state.live else 0)
    stages = [stage for stage in state.get("schedule", []) if isinstance(stage, dict)]
    found: dict[str, Any] = {
        "step": seen.step,
        "steps": beat.steps if beat else sum(stage["steps"] for stage in stages) or None,
        "consumed_tokens": tokens,
        "tokens": beat.tokens if beat else sum(stage["tokens"] for stage in stages) or None,
        "consumed_samples": newer.get("consumed_samples", 0),
        "training_stage": newer.get("training_stage") or (beat.training_stage if beat else ""),
        "stage": None,
        "stages": [stage["name"] for stage in stages],
        "seconds_left": _left(
            found_tokens := (beat.tokens if beat else sum(s["tokens"] for s in stages)), tokens, pace
        ),
    }
    if stages and found_tokens and sum(stage["tokens"] for stage in stages) != found_tokens:
        seen.notes.append("the schedule was changed since the newest checkpoint: stages are shown as they were then")
    start_step = start_token = 0
    for stage in stages:
        if stage["name"] == found["training_stage"]:
            done, of = tokens - start_token, stage["tokens"]
            found["stage"] = {
                "step": seen.step - start_step,
                "steps": stage["steps"],
                "consumed_tokens": done,
                "tokens": of,
                "seconds_left": _left(of, done, pace),
            }
        start_step, start_token = start_step + stage["steps"], start_token + stage["tokens"]
    return found


def _left(tokens: int, done: int, pace: Pace) -> float | None:
    seconds = pace.seconds_per_token
    return max(0, tokens - done) * seconds if tokens and seconds is not None else None


def _speed(pace: Pace) -> dict[str, Any]:
    return {
        "tokens_per_second": pace.tokens_per_second,
        "tokens_per_second_with_all": (1 - pace.padding_share) / pace.seconds_per_token
        if pace.seconds_per_token
        else None,
        "padding_share": pace.padding_share,
        "step_seconds": pace.seconds or None,
        "aside_seconds": dict(pace.aside),
        "mfu": pace.mfu,
        "loss": pace.loss,
        "loss_by_source": dict(pace.loss_by_source),
        "over_steps": pace.steps,
    }


def _sources(seen: _Seen, ledger: Ledger | None) -> list[dict[str, Any]]:
    """Samples and tokens by training stage and source: of the ledger of the newest whole checkpoint, and of rows since.
    target: samples that the stage's weights ask for by now; None for a stage that began since."""
    since = seen.tail.beyond(seen.checkpoint.step if seen.checkpoint else 0)
    use: dict[str, dict[str, list[int]]] = {}
    for row in since:
        counts = row.get("samples_by_source") or {}
        samples = sum(counts.values())
        for name, count in counts.items():
            sums = use.setdefault(row["training_stage"], {}).setdefault(name, [0, 0])
            sums[0] += count
            sums[1] += row.get("tokens", 0) * count // max(1, samples)
    weights = {stage.name: WeightFunction.from_json(stage.weights) for stage in ledger.stages} if ledger else {}
    before = {stage.name: stage for stage in ledger.stages} if ledger else {}
    rows = []
    for stage in [*before, *(name for name in use if name not in before)]:
        then = before[stage].use if stage in before else {}
        taken = use.get(stage, {})
        told = weights[stage].sources if stage in weights else ()
        total = sum(one.samples for one in then.values()) + sum(sums[0] for sums in taken.values())
        for name in sorted({*then, *taken, *told}):
            had, new = then.get(name, SourceUse()), taken.get(name, [0, 0])
            samples = had.samples + new[0]
            known = ledger.sources.get(name) if ledger else None
            rows.append(
                {
                    "training_stage": stage,
                    "source": name,
                    "group": known.group if known else name,
                    "samples": samples,
                    "target": float(weights[stage].target(name, total)) if stage in weights else None,
                    "tokens": had.tokens + new[1],
                    "share": samples / total if total else 0.0,
                }
            )
    return rows


def _checkpoint(seen: _Seen, progress: Mapping[str, Any], pace: Pace) -> dict[str, Any]:
    newest, every, step = seen.checkpoint, seen.every or 1000, seen.step
    due = (step // every + 1) * every
    if progress["stage"]:
        due = min(due, step - progress["stage"]["step"] + progress["stage"]["steps"])
    if progress["steps"]:
        due = min(due, progress["steps"])
    ended = bool(progress["steps"]) and step >= progress["steps"]
    seconds = pace.seconds_per_token
    wait = (due - step) * pace.tokens * seconds if seconds is not None and not ended else None
    return {
        "step": newest.step if newest else None,
        "path": str(newest.path) if newest else None,
        "time": newest.time if newest else None,
        "age": max(0.0, seen.now - newest.time) if newest else None,
        "bytes": newest.bytes if newest else None,
        "damaged": [str(one.path) for one in seen.checkpoints if one.fault],
        "count": seen.count,
        "next_step": None if ended else due,
        "next_seconds": wait if seen.state.live else None,
    }


def _attempts(seen: _Seen) -> list[dict[str, Any]]:
    """Each start: when, where, from which step to which, how it ended, and how many of its steps were lost then."""
    rows, lost = [], _stretches(without_repeats(seen.discarded.steps))
    for place, attempt in enumerate(seen.attempts):
        following = next((one.start.step for one in seen.attempts[place + 1 :] if one.start), None)
        last = place + 1 == len(seen.attempts)
        began = attempt.start or attempt.launch
        reached = attempt.end.step if attempt.end else seen.step if last else None
        if following is not None and lost and lost[0][0] == following + 1:
            set_aside = lost.pop(0)[1]
            reached = set_aside if reached is None else reached
        rows.append(
            {
                "attempt": attempt.number,
                "time": attempt.began,
                "first_step_time": attempt.start.time if attempt.start else None,
                "end_time": attempt.end.time if attempt.end else None,
                "hosts": began.hosts if began else [],
                "processes": began.processes if began else None,
                "layout": attempt.start.layout if attempt.start else "",
                "engine": attempt.start.engine if attempt.start else "",
                "job": attempt.job,
                "from_step": attempt.start.step if attempt.start else None,
                "to_step": reached if attempt.start else None,
                "lost_steps": max(0, reached - following) if reached is not None and following is not None else None,
                "code": attempt.end.code if attempt.end else None,
                "reason": attempt.end.reason
                if attempt.end
                else ""
                if last and seen.state.live
                else "no record: killed",
            }
        )
    return rows


def _stretches(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """First and last step of the rows that each resume set aside, in the order in which it was done."""
    found: list[tuple[int, int]] = []
    for row in rows:
        if found and row["step"] == found[-1][1] + 1:
            found[-1] = (found[-1][0], row["step"])
        else:
            found.append((row["step"], row["step"]))
    return found


def _wall_time(seen: _Seen) -> Any:
    """Goodput. Seconds in steps up to the newest checkpoint stand in its state.json."""
    newest, state = seen.checkpoint, seen.checkpoint.state if seen.checkpoint else {}
    if not seen.attempts:
        return None
    beyond = seen.tail.beyond(newest.step if newest else 0)
    survives = seen.state.live or seen.state.code in (EXIT_DONE, EXIT_REQUEUE)
    kept = float(state.get("seconds", 0.0)) + (seconds_in(beyond) if survives else 0.0)
    # a branch of another run, or a run of an older version, has steps from before the first start on record
    first = next((one.start.step for one in seen.attempts if one.start), 0)
    at = seen.step if survives else newest.step if newest else 0
    if first and at > first:
        kept *= (at - first) / at
    redone = without_repeats(seen.discarded.steps)
    lost = seconds_in(redone) + (0.0 if survives else seconds_in(beyond))
    read = len(seen.tail.steps)
    more = 1.0 if not seen.tail.unread or not read else max(1.0, (at - first) / read)
    aside = {
        name: seconds_in(seen.tail.steps, f"{name}_seconds") * more + seconds_in(redone, f"{name}_seconds")
        for name in ASIDE
    }
    exact = not seen.tail.unread and not seen.discarded.unread and not first
    sign = seen.state.last_sign
    if seen.state.live and (start := seen.attempts[-1].start):
        # what goes on since the newest row is of no kind yet, and would make goodput swing with heartbeats
        sign = min(seen.now, max(start.time, seen.tail.modified or 0.0))
    elif seen.state.live:
        sign = seen.now  # all of it is start-up so far
    until = seen.now if seen.state.state == "waiting" else sign
    return wall_time(seen.attempts, until, sign, StepTime(kept, lost, aside, exact))


def _skipped(seen: _Seen) -> int:
    state = seen.checkpoint.state if seen.checkpoint else {}
    return int(seen.tail.last.get("skipped_total", state.get("skipped", 0)))


def _excluded(seen: _Seen) -> Sequence[str]:
    try:
        return excluded_hosts(seen.output, seen.now)
    except ConfigError as error:
        seen.notes.append(f"{BAD_NODES}: {error}")
        return []
