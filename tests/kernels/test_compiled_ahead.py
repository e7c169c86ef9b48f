"""Every kernel compiles for an H100/H200, with the blocks and warps that it would be launched with, and none spills."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "megatron" / "kernels"


@pytest.fixture(scope="module")
def printed() -> str:
    """What the script prints, from a process in which Triton is not interpreted."""
    script = [sys.executable, str(HERE / "compiled_ahead.py")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_no_launch_spills(printed: str) -> None:
    cases, spilling = re.findall(r"(\d+) cases, (\d+) launches spill", printed)[0]
    assert int(cases) > 50 and int(spilling) == 0


def test_every_kernel_that_is_launched_was_compiled(printed: str) -> None:
    compiled = set(re.findall(r": (\w+): \d+ warps", printed))
    launched = {
        name
        for path in KERNELS.glob("*_triton.py")
        for name in re.findall(r"^ *(?:\w+\.)?(\w+)\[", path.read_text(), re.MULTILINE)
        if re.search(rf"^def {name}\(", path.read_text(), re.MULTILINE)
    }
    assert launched and not launched - compiled, f"never compiled ahead: {sorted(launched - compiled)}"
