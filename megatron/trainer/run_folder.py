"""The run's folder: who may write there, what it holds, and the record of how the process ended."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from megatron.checkpoint.storage import io_errors
from megatron.config.durable_files import sync_path
from megatron.config.errors import ConfigError
from megatron.launch.attempts import EXIT


class RunFolder:
    """OUTPUT and the paths in it.

    checkpoints/      step-000001000, …; discarded/ has those that a resume from an older one set aside
    metrics.jsonl     a row a step, and rows with "validation" or "evaluation"; the first row of steps after each start
                      has "start": engine, layout, device, … that ran from there on; a resume cuts it to the
                      checkpoint's step
    evaluations/      results of [evaluation] by step, and what is still asked for; see evaluation/requests.py
    config.toml       the resolved config of the last start; each checkpoint has that of its own
    exit.json         how the last process ended
    attempts.jsonl    every start and end; heartbeat.json, save-now, stop-now: see launch/attempts.py
    """

    def __init__(self, output: str | Path) -> None:
        self.path = Path(output)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.exit_record = self.path / EXIT
        self._lock: int | None = None

    def open(self) -> None:
        """Makes the folder, claims it for this process until it ends, and removes the last exit record.

        Raises ConfigError where another process trains there, StorageError where it cannot be written.
        """
        with io_errors(self.path, "create the folder"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()  # whoever has not the lock writes nothing there, not even how it ended
            raise ConfigError(
                f"{self.path}: another process is training there: wait for it, stop it, or set run.output elsewhere"
            ) from None
        except OSError as error:
            # Some network file systems have no locks; then nothing but the user keeps two runs apart.
            print(f"note: {self.path}: cannot be locked ({error.strerror}): start no second run there", flush=True)
        self.exit_record.unlink(missing_ok=True)

    @property
    def is_open(self) -> bool:
        """Whether this process has claimed the folder."""
        return self._lock is not None

    def close(self) -> None:
        """Gives the folder back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def refuse_occupied(self) -> None:
        """Raises ConfigError where a run has already written here; `--fresh` asks for this."""
        for path in (self.metrics, self.checkpoints):
            if path.exists() and (path.stat().st_size if path.is_file() else any(path.iterdir())):
                raise ConfigError(
                    f"--fresh: {self.path} already holds a run ({path.name}): set run.output to another folder, "
                    "remove it yourself, or leave out --fresh to resume"
                )

    def write(self, name: str, text: str) -> None:
        """Replaces one file in one rename. Raises StorageError."""
        path = self.path / name
        aside = path.with_name(f".{name}.tmp")
        with io_errors(path, "write"):
            aside.write_text(text, encoding="utf-8")
            sync_path(aside)
            os.replace(aside, path)
            sync_path(self.path)
