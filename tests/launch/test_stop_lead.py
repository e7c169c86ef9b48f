"""The lead is the sum that its page states, of the longest figures that the run's files hold."""

from __future__ import annotations

import json
from pathlib import Path

from megatron.launch.attempts import Heartbeat, write_heartbeat
from megatron.launch.stop_lead import stop_lead


def rows(folder: Path, *told: dict[str, object]) -> None:
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in told))


def test_a_first_start_says_what_it_assumes(tmp_path: Path) -> None:
    lead = stop_lead(tmp_path, nodes=2, checkpoint_bytes=int(840e9))
    # 2 x 30 s + 2 x 840 GB / (2 nodes x 0.5 GB/s) + 60 s
    assert lead.seconds == 2 * 30 + 2 * 840 + 60
    assert "nothing is measured yet" in lead.why and "840.0 GB" in lead.why and "30 s" in lead.why
    assert stop_lead(tmp_path / "absent").seconds == 300


def test_the_longest_step_and_save_count_twice(tmp_path: Path) -> None:
    rows(
        tmp_path,
        {"step": 1, "step_seconds": 11.0},
        {"step": 2, "step_seconds": 41.5, "checkpoint_seconds": 130.0, "validation_seconds": 70.0},
        {"step": 3, "step_seconds": 10.0, "checkpoint_seconds": 90.0, "validation_seconds": 20.0},
    )
    lead = stop_lead(tmp_path)
    exact = 2 * 41.5 + 70 + 2 * 130 + 60
    assert exact <= lead.seconds < exact + 10 and lead.seconds % 10 == 0
    assert "41.5 s" in lead.why and "2 min 10 s" in lead.why and "measured" in lead.why


def test_the_heartbeat_counts_too(tmp_path: Path) -> None:
    rows(tmp_path, {"step": 1, "step_seconds": 1.0})
    write_heartbeat(tmp_path, Heartbeat(1.0, 1, 5, step_seconds=50.0, save_seconds=200.0))
    assert stop_lead(tmp_path).seconds == 2 * 50 + 2 * 200 + 60


def test_what_another_process_evaluated_was_not_waited_for(tmp_path: Path) -> None:
    rows(tmp_path, {"step": 1, "step_seconds": 20.0, "checkpoint_seconds": 20.0})
    before = stop_lead(tmp_path).seconds
    rows(
        tmp_path,
        {"step": 1, "step_seconds": 20.0, "checkpoint_seconds": 20.0},
        {"step": 1, "evaluation": {}, "evaluation_seconds": 5000.0},
    )
    assert stop_lead(tmp_path).seconds == before


def test_torn_and_foreign_rows_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(
        b'p": 1}\n[1, 2]\n{"step_seconds": null}\n{"step_seconds": "9"}\n{"step_seconds": true}\n\xff\n'
        b'{"step_seconds": 40.0, "checkpoint_seconds": 40.0}\n{"step_sec'
    )
    assert stop_lead(tmp_path).seconds == 2 * 40 + 2 * 40 + 60


def test_the_lead_keeps_within_what_slurm_takes(tmp_path: Path) -> None:
    rows(tmp_path, {"step_seconds": 0.001, "checkpoint_seconds": 0.01})
    assert stop_lead(tmp_path).seconds == 120
    rows(tmp_path, {"step_seconds": 50_000.0})
    assert stop_lead(tmp_path).seconds == 65_535
