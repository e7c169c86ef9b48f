"""`stagemix study …` whose processes are stand-ins (`stand_in_commands.py`)."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron.commands.frame import run_command
from megatron.commands.study import main
from megatron.launch import child_process
from megatron.study import due_tasks


def stand_in(command: str) -> list[str]:
    """The beginning of a command line of ours."""
    return [sys.executable, str(Path(__file__).with_name("stand_in_commands.py")), command]


def install() -> None:
    """In this process."""
    child_process.stagemix = stand_in
    due_tasks.evaluation_is_current = lambda *_: True


if __name__ == "__main__":
    install()
    sys.exit(run_command(main, sys.argv[1:]))
