"""A run that changes its layout at a resume says so: each start is on record, and the report shows who trained what."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rank_jobs import start_ranks
from tiny_run import make_run, rows_of, train

from megatron.commands.report import gather

pytestmark = pytest.mark.timeout(300)


def _at_step(number: int, act: Callable[[], None], mine: int) -> None:
    """In the rank that writes the rows, when it has written that of a step."""
    if mine != 0:
        return
    from megatron.trainer.hooks import Log

    log = Log.__call__

    def logged(self: Log, step: Any) -> None:
        log(self, step)
        if step.state.step == number:
            act()

    Log.__call__ = logged  # type: ignore[method-assign]


def _signalled(number: int) -> None:
    os.kill(os.getpid(), number)


def test_every_layout_of_a_run_is_reported_with_its_steps(tmp_path: Path) -> None:
    config, output = make_run(tmp_path), tmp_path / "run"
    stopped = start_ranks(2, config, fault=partial(_at_step, 4, partial(_signalled, signal.SIGUSR1)))
    assert stopped.wait() == [75, 75], stopped.text()
    stopped_at = rows_of(output)[-1]["step"]
    tensor = ("--set", "parallel.tensor=2")
    killed = start_ranks(2, config, *tensor, fault=partial(_at_step, 11, partial(_signalled, signal.SIGKILL)))
    assert killed.wait() == [-signal.SIGKILL, 10] and rows_of(output)[-1]["step"] == 11, killed.text()
    done = train(config)
    assert done.returncode == 0, done.stderr
    starts = {row["step"]: row["start"] for row in rows_of(output) if "start" in row}
    assert [*starts] == [1, stopped_at + 1, 10], "the last whole checkpoint was that of step 9"
    assert all({"engine", "device", "precision", "torch"} <= start.keys() for start in starts.values())
    assert gather(output, []).facts["layout"] == (
        f"steps 1–{stopped_at}: 2 processes: data 2, torch; {stopped_at + 1}–9: 2 processes: tensor 2, torch; "
        "10–24: one process, torch"
    )
