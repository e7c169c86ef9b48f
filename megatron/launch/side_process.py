"""A command of ours as a process of its own beside a run: how it is started, and how it ends with who started it."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_OF_A_LAUNCHER = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK"),
    *("ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NPROCS"),
)
_FAMILIES_OF_A_LAUNCHER = ("TORCHELASTIC_", "SLURM_STEP_", "PMI_", "PMIX_", "OMPI_COMM_", "MV2_COMM_")


def stagemix(command: str) -> list[str]:
    """The beginning of a command line that runs `stagemix COMMAND` by this interpreter, from any working directory."""
    return [sys.executable, "-P", "-m", "megatron.commands.cli", command]


def side_environment(scratch: Path, threads: int = 0) -> dict[str, str]:
    """The environment of a process that is nobody's rank: libraries would join, or wait for, the ranks of a launcher
    that they find there.

    scratch: where its temporary files go, so that whoever started it can clear them after a kill. threads: for its
    arithmetic; 0: what this process was given.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_A_LAUNCHER and not name.startswith(_FAMILIES_OF_A_LAUNCHER)
    }
    kept["TMPDIR"] = str(scratch)
    if threads:
        kept["OMP_NUM_THREADS"] = str(threads)
    if (_ROOT / "pyproject.toml").is_file():  # a source tree, which need not be installed
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), kept.get("PYTHONPATH")]))
    return kept


def end_with_starter() -> None:
    """From now on this process ends when its standard input does: that is the other end of a pipe that the process
    which started it holds, and so it closes even where that one is killed."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="end-with-starter", daemon=True).start()
