"""A run that is killed and started again until it is complete, as a scheduler would requeue it, and what is checked."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kills.adversary import CONT, KILL, STOP, draw
from kills.attempts import Attempt, Forked, Torchrun
from kills.laws import (
    Truth,
    batch_of,
    bytes_in,
    discarded_in,
    faults_in,
    remains_of,
    rows_in,
    validations_in,
    whole_steps,
)
from kills.tally import Recovery, Tally
from kills.watch import START_SECONDS, WATCHDOG, Progress, Watch

STEPS, STAGE_ENDS, KEEP = 45, {15, 27, 45}, 2
RUN = {
    "stages.balanced.steps": 15,
    "stages.text.steps": 12,
    "stages.cooldown.steps": 18,
    "train.micro_batch_size": 2,
    "checkpoint.every": 3,
    "checkpoint.keep": KEEP,
    "validation.every": 5,
    "health.watchdog_seconds": WATCHDOG,
    "health.start_seconds": START_SECONDS,
}
"""Three training stages of the tiny run, held-out samples, a save every three steps and at each stage's end."""
MOST_CHECKPOINTS = 1.3 * (len(STAGE_ENDS) + KEEP + 3)
"""Those that stay; one more before an old one goes, one that is written, one that is deleted; rows and small files."""
_GOES_ON = re.compile(r"^run tiny (?:goes on from \S+/step-0*(\d+) |begins at step (0)$)", re.MULTILINE)


@dataclass(frozen=True)
class Layout:
    """So many ranks, and their [parallel] keys."""

    name: str
    ranks: int
    keys: tuple[tuple[str, str], ...] = ()

    def words(self) -> list[str]:
        """For the command line."""
        return words_of({f"parallel.{key}": value for key, value in self.keys})


def words_of(changes: dict[str, object]) -> list[str]:
    """`--set` for each key."""
    return [word for key, value in changes.items() for word in ("--set", f"{key}={_toml(value)}")]


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Script:
    """What a life is made of. layouts: each attempt has one of these. torchrun: share of attempts started by it.
    alone: share of attempts whose launcher leaves the rest to themselves when a process has failed."""

    name: str
    layouts: tuple[Layout, ...]
    torchrun: float = 0.0
    alone: float = 0.4


class Life:
    """One run from its first start to its completion. All chance comes from the seed."""

    def __init__(self, config: Path, output: Path, script: Script, seed: int, kills: int, truth: Truth) -> None:
        self.output = output
        self.tally = Tally()
        self._config, self._script, self._truth, self._kills = config, script, truth, kills
        self._chance = random.Random(seed)
        self._progress = Progress(output)
        self._whole = 0
        self._highest = 0
        self._startup = 4.0
        self._open: list[Recovery] = []
        self._number = 0
        self._rival: Attempt | None = None
        self.story: list[str] = []

    def live(self, attempts: int = 200) -> None:
        """Starts the run again and again until it is complete. Raises AssertionError where it does not come to that."""
        for _ in range(attempts):
            if self._attempt() and (self.tally.kills >= self._kills or self._chance.random() < 0.5):
                self._check_the_whole()
                return  # else somebody starts the complete run once more
        raise AssertionError(f"not complete after {attempts} starts:\n" + "\n".join(self.story))

    def _attempt(self) -> bool:
        """One start and its end; whether the run is complete."""
        rival, self._rival = self._rival, None
        attempt = rival or self._start()
        event = None
        if self.tally.kills < self._kills:
            event = draw(self._chance, attempt.ranks, 1.1 * self._startup + 1.5, WATCHDOG)
        watch = Watch(attempt, event, self.output, self._progress, self._chance.random() >= self._script.alone)
        watch.on_step = self._see
        watch.on_fire = lambda: self._note_a_kill(watch)
        if event and event.ends and self._chance.random() < 0.12:
            watch.on_struck = lambda: self._overlap(watch)
        watch.run()
        return self._judge(watch, rival is not None)

    def _start(self) -> Attempt:
        chance, self._number = self._chance, self._number + 1
        layout = chance.choice(self._script.layouts)
        beside = chance.random() < 0.5
        words = words_of({**RUN, "checkpoint.asynchronous": beside}) + layout.words()
        by_torchrun = layout.ranks > 1 and chance.random() < self._script.torchrun
        self.tally.attempts[f"{layout.name}{' by torchrun' if by_torchrun else ''}"] += 1
        self.story.append(f"start {self._number}: {layout.name}, saves {'beside training' if beside else 'in turn'}")
        if by_torchrun:
            return Torchrun(layout.ranks, self._config, words)
        folder = self._config.parent / f"noted-{self.output.name}-{self._number}"
        return Forked(layout.ranks, self._config, words, folder, chance.choice([0.0, 0.0, 0.05]))

    def _note_a_kill(self, watch: Watch) -> None:
        for recovery in self._open:
            recovery.again = True
        ended = watch.event is not None and not watch.event.ends
        self._open.append(Recovery(time.monotonic(), min(watch.progress.step + 1, STEPS), ended))

    def _overlap(self, watch: Watch) -> None:
        """Somebody starts the run again while the first is still dying; a launcher sees to it that it does die."""
        if watch.attempt.alive:
            watch.helps = True
            self._rival = self._start()

    def _see(self, step: int) -> None:
        if step <= self._highest:
            return
        self._highest = step
        self._close(lambda recovery: recovery.ended and recovery.goal <= step)

    def _close(self, done: Callable[[Recovery], bool]) -> None:
        for recovery in self._open:
            if done(recovery):
                recovery.seconds = time.monotonic() - recovery.began
                self.tally.recoveries.append(recovery)
        self._open = [recovery for recovery in self._open if recovery.seconds is None]

    def _judge(self, watch: Watch, overlapped: bool) -> bool:
        """Checks an attempt that has ended; whether the run is complete."""
        attempt, event, tally = watch.attempt, watch.event, self.tally
        text, codes, faults = attempt.text(), attempt.codes, []
        self.story.append(f"  {event if watch.fired else 'undisturbed'}; hit {watch.hit}; codes {codes}")
        if event and watch.hit:
            tally.kinds[event.name] += 1
            tally.phases.update(noted.phase for noted in watch.hit if noted)
            tally.beside += sum(noted.beside for noted in watch.hit if noted)
        tally.codes.update(map(str, codes))
        tally.largest = max(tally.largest, float(watch.largest))
        if watch.ended_after is not None:
            tally.ends.append(watch.ended_after)
        if watch.hang:
            tally.hangs.append(watch.hang)
        for recovery in self._open:
            if not recovery.ended and self._rival is None:
                recovery.ended, recovery.goal = True, min(watch.progress.step + 1, STEPS)
        if watch.first_row is not None:
            self._startup = 0.5 * (self._startup + watch.first_row)
        refused = overlapped and "another process is training there" in text
        tally.refused += refused
        faults += [] if refused else self._faults_of_codes(watch)
        if leftovers := attempt.leftovers():
            faults.append(f"processes {leftovers} live on")
        if self._rival is None:
            faults += faults_in(self.output, self._truth, self._whole, STEPS)
            faults += [] if refused else self._faults_of_start(text, overlapped)
            self._whole = max(whole_steps(self.output), default=0)
            rows = [row["step"] for row in rows_in(self.output / "metrics.jsonl") if "loss" in row]
            tally.redone += max(rows, default=0) - self._whole if self._whole < STEPS else 0
        if faults or watch.hang:
            faults = [f"start {self._number}: {fault}" for fault in faults]
            tally.faults += faults
            self.story += [*faults, text]
        complete = all(code == 0 for code in codes)
        if complete:
            self._close(lambda recovery: True)
        return complete and self._rival is None

    def _faults_of_codes(self, watch: Watch) -> list[str]:
        """Exit codes that docs/exit-codes.md does not give for what happened."""
        attempt, record_path = watch.attempt, self.output / "exit.json"
        signals = attempt.signals
        asked = {
            rank: [number for number in sent if number not in (KILL, STOP, CONT)] for rank, sent in signals.items()
        }
        allowed = {0}
        if watch.hit:
            allowed |= {75, 9, 10}
            allowed |= {128 + number for sent in asked.values() if len(sent) > 1 for number in sent}
        faults = []
        if isinstance(attempt, Forked):
            for rank, code in enumerate(attempt.codes):
                if code is None or (code not in allowed and -code not in signals[rank]):
                    faults.append(f"rank {rank} ended with {code}, after {watch.event} and signals {signals}")
        if record_path.exists() and self._rival is None:
            record = json.loads(record_path.read_text())
            if record["code"] not in allowed:
                faults.append(f"exit.json: {record}")
            if all(code == 0 for code in attempt.codes) and record["code"] != 0:
                faults.append(f"all ended with 0, exit.json: {record}")
        elif all(code == 0 for code in attempt.codes) and self._rival is None:
            faults.append("all ended with 0 and there is no exit.json")
        return faults

    def _faults_of_start(self, text: str, overlapped: bool) -> list[str]:
        """Where it went on from: the newest whole checkpoint that there was."""
        found = _GOES_ON.search(text)
        if found is None:
            return []
        step = int(found.group(1) or 0)
        later = overlapped and step > self._whole  # the first attempt may have published one meanwhile
        return [] if step == self._whole or later else [f"went on from step {step}, whole was that of {self._whole}"]

    def _check_the_whole(self) -> None:
        tally, output = self.tally, self.output
        _, wrong = discarded_in(output, self._truth)
        rows = {row["step"]: row for row in rows_in(output / "metrics.jsonl") if "loss" in row}
        if sorted(rows) != list(range(1, STEPS + 1)):
            tally.faults.append(f"steps of the finished run: {sorted(rows)}")
        wrong += [f"step {step}" for step, row in rows.items() if batch_of(row) != self._truth.batches[step]]
        tally.wrong_samples += len(wrong)
        tally.faults += wrong + remains_of(output, STAGE_ENDS, KEEP)
        if sorted(validations_in(output)) != sorted(self._truth.validations):
            tally.faults.append(f"held-out samples after steps {sorted(validations_in(output))}")
        size = bytes_in(max((output / "checkpoints").glob("step-*")))
        tally.largest /= size
        if tally.largest > MOST_CHECKPOINTS:
            tally.faults.append(f"{tally.largest:.1f} times the room of a checkpoint was taken")
        tally.worst_error = max((self._error(rows[step], self._truth.rows[step]) for step in rows), default=0.0)

    @staticmethod
    def _error(mine: dict[str, float], theirs: dict[str, float]) -> float:
        return max(abs(mine[key] - theirs[key]) / abs(theirs[key]) for key in ("loss", "grad_norm"))
