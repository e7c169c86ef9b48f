"""A stand-in for the harness: a program that is started as `stagemix evaluate` is, and answers at once, or goes wrong.

It takes the options of an evaluation, ends with who started it, notes each start in a file, and looks at the checkpoint
before and after it worked, as one that was deleted meanwhile must not pass.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, sys, time
from pathlib import Path
from megatron.launch.side_process import end_with_starter

words = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[2:])
assert "ends-with-stdin" in words
end_with_starter()
name, _, checkpoint = words["model"].partition("=")
manifest = Path(checkpoint, "manifest.json")
before = manifest.read_bytes()
step = json.loads(before)["step"]
with open({notes!r}, "a") as notes:
    notes.write(f"{{step}}\\n")
Path(words["output"]).with_name("left-behind").write_text("scratch")
{body}
if not manifest.exists() or manifest.read_bytes() != before:
    sys.exit("error: the checkpoint vanished")
metrics = {{"acc": {{"value": step / 100, "stderr": 0.01}}, "ppl": {{"value": float("nan"), "stderr": None}}}}
results = {{"quiz": {{"metrics": metrics, "items": 7}}}}
record = {{"format": 2, "suite": "tasks", "tasks": {{"quiz": {{"chance": 0.1}}}}}}
record["models"] = [{{"name": name, "path": checkpoint, "seconds": 1.0, "results": results}}]
Path(words["output"]).write_text(json.dumps(record))
"""


class StandIn:
    """The program in a file, and the steps that it was started for."""

    def __init__(self, folder: Path, body: str = "") -> None:
        self.folder, self.notes = folder, folder / "stand-in-notes.txt"
        self.becomes(body)

    def becomes(self, body: str) -> None:
        """From now on it does this before it answers."""
        (self.folder / "stand_in.py").write_text(PROGRAM.format(notes=str(self.notes), body=body))

    @property
    def steps(self) -> list[int]:
        """In the order of its starts."""
        return [int(line) for line in self.notes.read_text().split()] if self.notes.exists() else []

    def use(self, monkeypatch: pytest.MonkeyPatch) -> StandIn:
        """In this process instead of the real command."""
        import megatron.evaluation.side_run as module
        import megatron.trainer.evaluating as hook

        monkeypatch.setattr(module, "stagemix", self.command)
        monkeypatch.setattr(hook, "LOOK_SECONDS", 0.0)
        return self

    def command(self, command: str) -> list[str]:
        """The beginning of its command line."""
        return [sys.executable, str(self.folder / "stand_in.py"), command]

    def __call__(self, rank: int) -> None:
        """In another process: a fault for `start_ranks`."""
        import megatron.evaluation.side_run as module
        import megatron.trainer.evaluating as hook

        replaced: Any = self.command
        module.stagemix, hook.LOOK_SECONDS = replaced, 0.0
