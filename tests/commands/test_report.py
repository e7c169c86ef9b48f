"""`stagemix report` from outside; what it shows is tested in tests/metrics/test_report.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from metrics.made_metrics import make_run

from megatron.commands.frame import run_command
from megatron.commands.report import main


def test_report_of_a_real_folder_without_torch(tmp_path: Path, stagemix_command: list[str]) -> None:
    run = make_run(tmp_path / "run", 0.1)
    out = tmp_path / "report.html"
    code = (
        "import sys; from megatron.commands.report import main; "
        f"main(['--run', {str(run)!r}, '--output', {str(out)!r}]); assert 'torch' not in sys.modules"
    )
    subprocess.run([stagemix_command[0], "-c", code], check=True, timeout=120)
    assert out.stat().st_size > 20_000


def test_B1_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["--run", str(tmp_path), "--output", str(tmp_path / "r.html")]) == 3
    assert "metrics.jsonl" in capsys.readouterr().err
    assert run_command(main, ["--help"]) == 0
    assert "examples:" in capsys.readouterr().out
