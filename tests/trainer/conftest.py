"""Runs with a planted spike that the tests of [spikes] share. They only read them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import Done
from trainer.planted_spikes import make_spiky_run, planted, ran


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("spikes")
    make_spiky_run(made)
    return made


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    """A run without a policy and without a spike."""
    assert ran(make_spiky_run(folder, "undisturbed")).returncode == 0
    return folder / "undisturbed"


@pytest.fixture(scope="module")
def skipping(folder: Path) -> tuple[Path, Done]:
    done = ran(make_spiky_run(folder, "skipping", "skip"), planted)
    assert done.returncode == 0, done.stderr
    return folder / "skipping", done


@pytest.fixture(scope="module")
def rolled_back(folder: Path) -> tuple[Path, Done]:
    done = ran(make_spiky_run(folder, "rolled", "roll-back"), planted)
    assert done.returncode == 0, done.stderr
    return folder / "rolled", done
