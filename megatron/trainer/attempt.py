"""One start of a run on record: attempts.jsonl, exit.json, heartbeat.json, and the switch files that it looks for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron.checkpoint.storage import io_errors
from megatron.launch.allocation import job_of
from megatron.launch.attempts import (
    ATTEMPTS,
    End,
    Heartbeat,
    Launch,
    Start,
    append_event,
    exit_words,
    read_attempts,
    read_heartbeat,
)
from megatron.parallel.health_signs import Blame
from megatron.parallel.mesh import host_name
from megatron.trainer.heartbeat import Heart, Pulse
from megatron.trainer.pace import Pace
from megatron.trainer.run_folder import RunFolder
from megatron.trainer.state import TrainerState
from megatron.trainer.switches import Switches


class Attempt:
    """The record of the process that writes the run's folder. Of any other process it is never opened, and records
    nothing."""

    def __init__(
        self, folder: RunFolder, state: TrainerState, pulse: Pulse, heartbeat_seconds: int, say: Callable[[str], None]
    ) -> None:
        self.pace = Pace()
        self.switches = Switches(folder.path, say)
        self.number = 0
        self._folder, self._state, self._pulse = folder, state, pulse
        self._job = job_of()
        self._hosts: list[str] = []
        self._processes = 1
        self._steps, self._tokens = 0, 0
        self._heart = Heart(folder.path, heartbeat_seconds, self._beat, self.switches.look, say)

    def open(self, hosts: Sequence[str], processes: int) -> None:
        """Claims the folder and notes the launch; beats from now on. Raises ConfigError, StorageError."""
        self._folder.open()
        self._hosts, self._processes = sorted(set(hosts)), processes
        output = self._folder.path
        self.number = max((one.number for one in read_attempts(output)), default=0) + 1
        if (before := read_heartbeat(output)) is not None:
            self.pace.measured_before(before.step_seconds, before.save_seconds)
        self._append(Launch(self.number, time.time(), **self._who()))
        self.switches.at_start()
        self._heart.begin()

    def begins(self, description: Mapping[str, str], steps: int, tokens: int) -> None:
        """The first step is about to begin. description: the engine's words. steps, tokens: of the whole schedule."""
        self._steps, self._tokens = steps, tokens
        if not self._folder.is_open:
            return
        state = self._state
        start = Start(
            self.number,
            time.time(),
            layout=description.get("layout", ""),
            engine=description.get("engine", ""),
            step=state.step,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            **self._who(),
        )
        self._append(start)

    def ends(self, code: int, reason: str, blame: Blame | None = None) -> None:
        """Writes exit.json and the end of the attempt; nothing where this process has not the folder. StorageError."""
        if not self._folder.is_open:
            return
        state, blame = self._state, blame or Blame()
        end = End(
            self.number,
            time.time(),
            code,
            reason,
            state.step,
            state.consumed_samples,
            state.consumed_tokens,
            state.training_stage,
            blame.rank,
            blame.host,
            list(blame.suspects),
            os.getpid(),
            self._job,
        )
        self._folder.write(self._folder.exit_record.name, exit_words(end))
        self._append(end)
        self._pulse.at("ended")
        self._heart.end()

    def close(self) -> None:
        """Gives the folder back."""
        if self._folder.is_open:
            self._pulse.at("ended")
            self._heart.end()
        self._folder.close()

    def _who(self) -> dict[str, Any]:
        where = {"host": host_name(), "hosts": self._hosts, "pid": os.getpid(), "processes": self._processes}
        return {**where, "job": self._job}

    def _append(self, told: Launch | Start | End) -> None:
        with io_errors(self._folder.path / ATTEMPTS, "write"):
            append_event(self._folder.path, told)

    def _beat(self) -> Heartbeat:
        state, pace = self._state, self.pace
        phase, since = self._pulse.now
        return Heartbeat(
            time.time(),
            self.number,
            state.step,
            self._steps,
            state.training_stage,
            phase,
            since,
            host_name(),
            os.getpid(),
            self._job,
            pace.median_step,
            pace.measured_save,
            state.consumed_tokens,
            self._tokens,
        )
