"""Whose an error is: the rank and its host, in the first message and in exit.json; hosts that look bad, or none."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from rank_faults import all_of, at, killed, on_nodes, raises, stopped
from rank_jobs import start_ranks
from tiny_run import make_run

from megatron.launch.attempts import read_attempts, read_exit

pytestmark = pytest.mark.timeout(300)
THREE = ("--set", "train.global_batch_size=12")


def test_an_error_is_shown_with_rank_and_host(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    job = start_ranks(2, config, fault=all_of(on_nodes, at(6, 1, raises)))
    assert job.wait() == [1, 1], job.text()
    assert "[rank 1 on node1] ValueError: planted in one rank\n" in job.log(1)
    assert "rank 1 on node1 failed first, with exit code 1: see its own message\n" in job.log(0)
    end = read_exit(tmp_path / "run")
    assert end is not None and (end.code, end.rank, end.host, end.suspects) == (1, 1, "node1", [])
    launch = read_attempts(tmp_path / "run")[0].launch
    assert launch is not None and launch.hosts == ["node0", "node1"]


def test_the_host_of_a_killed_rank_is_suspected(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    job = start_ranks(3, config, *THREE, fault=all_of(on_nodes, at(5, 2, killed)))
    assert job.wait(60) == [10, 10, -signal.SIGKILL], job.text()
    end = read_exit(tmp_path / "run")
    assert end is not None and (end.code, end.rank, end.host, end.suspects) == (10, 2, "node2", ["node2"])


def test_the_host_of_a_rank_that_stands_still_is_suspected(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    job = start_ranks(
        3, config, *THREE, "--set", "health.watchdog_seconds=4", fault=all_of(on_nodes, at(4, 1, stopped))
    )
    for rank in (0, 2):
        job.processes[rank].join(60)
    job.send(1, signal.SIGKILL)
    assert job.wait(30) == [9, -signal.SIGKILL, 9], job.text()
    end = read_exit(tmp_path / "run")
    assert end is not None and (end.code, end.rank, end.host, end.suspects) == (9, 1, "node1", ["node1"])
