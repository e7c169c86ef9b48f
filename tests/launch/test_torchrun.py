"""What torchrun reads of a process's end, by torchrun's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron.commands.frame import run_command
from megatron.config.errors import DataError
from megatron.launch.torchrun import RANK_VARIABLES, may_be_one_of_several, tell_torchrun
from megatron.parallel.mesh import LAUNCHERS


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    return path


def summary(**files: Path) -> str:
    failures = {n: ProcessFailure(n, 100 + n, 3, str(path)) for n, path in enumerate(files.values())}
    return ChildFailedError("train.py", failures).format_msg().split("Root Cause")[1]


def test_the_earliest_is_the_root_cause(error_file: Path, tmp_path: Path) -> None:
    tell_torchrun("rank 1 failed first", 1_000_001)
    later = error_file.rename(tmp_path / "later.json")
    tell_torchrun("planted.bin: cannot be read:\nlook at the disk", 1_000_000)
    assert "planted.bin: cannot be read:\n  look at the disk" in summary(later=later, first=error_file)
    assert "rank      : 1" in summary(later=later, first=error_file)


def test_a_bug_comes_with_its_traceback(error_file: Path) -> None:
    tell_torchrun("ZeroDivisionError: of ours", 5, "Traceback (most recent call last): …\nZeroDivisionError: of ours")
    assert "traceback : Traceback (most recent call last): …\n  ZeroDivisionError: of ours" in summary(only=error_file)


def test_every_commands_error_is_told(error_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str] | None = None) -> int:
        raise DataError("corpus/a.jsonl:3: no field 'text'")

    assert run_command(main) == 3
    assert capsys.readouterr().err == "error: corpus/a.jsonl:3: no field 'text'\n"
    assert "traceback : corpus/a.jsonl:3: no field 'text'" in summary(only=error_file)


def test_nothing_is_written_without_torchrun_or_where_it_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    tell_torchrun("words")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no" / "folder" / "error.json"))
    tell_torchrun("words")
    assert list(tmp_path.iterdir()) == []


def test_every_launcher_that_the_mesh_knows_is_a_reason_to_ask_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {names[0] for _, names in LAUNCHERS} == set(RANK_VARIABLES)
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not may_be_one_of_several()
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert may_be_one_of_several()
