"""A Python that starts ranks fast."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import ROOT

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def python_of_jobs() -> Iterator[dict[str, str]]:
    """Environment of jobs: their `python` and `stagemix`, the first in PATH, are started anew, as users' are."""
    with tempfile.TemporaryDirectory(prefix="python-", dir="/tmp") as name:
        folder = Path(name)
        python = f'"{sys.executable}" -IS "{HERE / "warm_client.py"}"'
        _program(folder / "python", f'exec {python} "$@"')
        _program(folder / "stagemix", f'exec {python} -m megatron.commands.cli "$@"')
        yield {
            "PATH": os.pathsep.join([name, os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": os.pathsep.join([str(HERE / "paced"), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            "TEST_COLD_PYTHON": sys.executable,
        }


@pytest.fixture(scope="session")
def warm(python_of_jobs: dict[str, str]) -> Iterator[dict[str, str]]:
    """The same, but forked from a process that has loaded torch: four ranks start in two seconds, not in twenty."""
    with tempfile.TemporaryDirectory(prefix="warm-", dir="/tmp") as name, Path(name, "log").open("wb") as log:
        path = Path(name, "socket")
        server = subprocess.Popen(
            [sys.executable, str(HERE / "warm_server.py"), str(path)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        try:
            end = time.monotonic() + 240
            while not path.exists():
                assert server.poll() is None and time.monotonic() < end, Path(name, "log").read_text()
                time.sleep(0.1)
            yield python_of_jobs | {"TEST_WARM_SOCKET": str(path)}
        finally:
            assert server.stdin is not None
            server.stdin.close()
            server.wait(30)


def _program(path: Path, command: str) -> None:
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)
