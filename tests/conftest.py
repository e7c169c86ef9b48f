"""What holds for every test: one thread for each process's math, Triton interpreted where there is no GPU, and no
network for libraries that would ask it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# before any test imports numpy or torch; processes that tests start inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not Path("/dev/nvidiactl").exists():
    # Triton's own functions are interpreted or not from its first import on, and libraries import it unasked.
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]
# so that `python -m megatron.commands.cli` runs the tree under test from any working directory
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return ROOT


@pytest.fixture(scope="session")
def stagemix_command() -> list[str]:
    """The start of a command line: add a command's name and arguments, and give the process a time limit."""
    return [sys.executable, "-m", "megatron.commands.cli"]
