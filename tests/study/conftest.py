"""Studies with made results and their reports, which several files of tests look at and none changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from study.made_results import make_study

from megatron.commands.study import main
from megatron.study.plan import PlannedStudy


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[PlannedStudy, Path]:
    """One seed, everything there: the study, and the folder of its report."""
    folder = tmp_path_factory.mktemp("whole")
    study = make_study(folder, [1])
    assert main(["report", str(folder / "study.toml")]) == 0
    return study, folder / "runs" / "report"


@pytest.fixture(scope="session")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> tuple[PlannedStudy, Path]:
    """Three seeds; a node that is not trained, and one that is not evaluated."""
    folder = tmp_path_factory.mktemp("seeds")
    study = make_study(folder, [1, 2, 3], untrained=["cooldown"], unevaluated=["on-half"])
    assert main(["report", str(folder / "study.toml"), "--no-run-reports"]) == 0
    return study, folder / "runs" / "report"
