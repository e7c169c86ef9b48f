"""Part f: the tests that need a GPU, in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from gpu_job import Context, Job
from gpu_results import Row
from gpu_setting import ROOT

TITLE = "tests that need a GPU"
NOTES = "`pytest -m gpu` over the files that have such tests; the whole output is in the log beside this file."
_PROCESSES = 6


def jobs(context: Context) -> Iterator[Job]:
    """One job."""
    yield Job("pytest -m gpu", lambda: [_tested(context)])


def files_with_gpu_tests() -> list[str]:
    """Those that may have tests marked gpu: named in the file, or by the fixture `device` of tests/kernels."""
    found = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r"\bmark\.gpu\b", text := path.read_text(encoding="utf-8"))
        or (path.parent.name == "kernels" and re.search(r"\bdevice: torch\.device\b", text))
    ]
    return [str(path.relative_to(ROOT)) for path in found if path.parent.name != "benchmarks"]


def _tested(context: Context) -> Row:
    """The counts of pytest's last line; in a dry run of what it collects."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files_with_gpu_tests()]
    if context.dry:
        command += ["--collect-only"]
    elif importlib.util.find_spec("xdist"):
        command += ["-n", str(_PROCESSES)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_INTERPRET")}
    begin, limit = time.perf_counter(), max(30.0, context.clock.left)
    log = context.results.path.with_name(context.results.path.stem + "-tests.log")
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            code = None
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    print("\n".join(lines[-25:]), flush=True)
    row: Row = {"command": "pytest -m gpu", "seconds": time.perf_counter() - begin, "said": lines[-1] if lines else ""}
    return row | _verdict(code, lines, limit)


def _verdict(code: int | None, lines: Sequence[str], limit: float) -> Row:
    if code is None:
        return {"failed": f"not done after {limit:.0f} seconds"}
    if code == 5:  # pytest's word for no tests, which is wrong on a tree with kernels
        return {"failed": "no test is marked gpu"}
    if code == 0 and lines and "skipped" in lines[-1] and "passed" not in lines[-1]:
        return {"failed": f"every test was skipped: {lines[-1]}"}
    failed = [line.split(" ")[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return {"failed": f"pytest ended with {code}: {' '.join(failed[:10])}"} if code else {}
