"""The whole demo at its tiny scale, as a user runs it: every part is there, and a second run has nothing left to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def run_demo(repository: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "examples" / "demo" / "run.py"), "--scale", "tiny"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=540)


@pytest.mark.timeout(600)
def test_the_whole_path_runs_and_resumes(repository: Path, folder: Path) -> None:
    first = run_demo(repository, folder)
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-4000:]
    demo = folder / "demo-tiny"

    rows = [json.loads(line) for line in (demo / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 31))
    validation = [row["validation"] for row in rows if row.get("validation")]
    assert set(validation[-1]) == {"code", "text"}
    assert all(validation[-1][name] < validation[0][name] for name in ("code", "text"))

    for stage in ("balanced", "text", "cooldown"):
        held = {path.name for path in (demo / "models" / stage).iterdir()}
        assert {"config.json", "generation_config.json"} <= held
        assert any(name.endswith(".safetensors") for name in held)
    report = (demo / "report.html").read_text(encoding="utf-8")
    assert "<html" in report
    for outside in ('src="http', "src='http", '<link rel="stylesheet" href="http'):
        assert outside not in report, "the report is not self-contained"

    again = run_demo(repository, folder)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished before") == 8
