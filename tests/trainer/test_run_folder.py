"""One run, one folder, one process at a time; how it ended is always on record."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config.errors import ConfigError, StorageError
from megatron.trainer.run_folder import RunFolder


def test_B1_two_processes_never_share_a_folder(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    first.open()
    first.write("exit.json", "{}")
    second = RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError, match="another process is training there"):
        second.open()
    assert first.is_open and not second.is_open, "a rank records its end only where it has the folder"
    assert (tmp_path / "run" / "exit.json").exists(), "the other's record is not ours to remove"
    first.close()
    second = RunFolder(tmp_path / "run")
    second.open()
    assert not second.exit_record.exists(), "a record of the last process must not speak for this one"
    second.close()


def test_B1_fresh_refuses_what_a_run_left(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.refuse_occupied()
    folder.metrics.write_text("")
    folder.checkpoints.mkdir()
    folder.refuse_occupied()
    (folder.checkpoints / "step-000000001").mkdir()
    with pytest.raises(ConfigError, match="already holds a run"):
        folder.refuse_occupied()
    (folder.checkpoints / "step-000000001").rmdir()
    folder.metrics.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        folder.refuse_occupied()


def test_B1_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/run") as error:
        RunFolder(tmp_path / "file" / "run").open()
    assert error.value.exit_code == 74
