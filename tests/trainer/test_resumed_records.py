"""After a kill, and over other numbers of processes, records go on as if nothing had happened: the same run, each step
once, the samples in their order."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rank_faults import all_of, asked_to_stop, at, killed
from rank_jobs import start_ranks, train_ranks
from tiny_run import STEPS, make_run, rows_of, steps_in

pytestmark = pytest.mark.timeout(300)


def _stand_in_wandb(notes: Path, rank: int) -> None:
    """A module that notes what it is told, as the real one is called."""
    module: Any = ModuleType("wandb")

    def note(*words: Any) -> None:
        with open(notes, "a") as file:
            file.write(json.dumps([rank, *words]) + "\n")

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            note("log", step, sorted(numbers))

        def finish(self) -> None:
            note("finish")

    def init(project: str, name: str, id: str, resume: str, config: dict[str, Any]) -> Run:
        note("init", project, name, id, resume, config["run"]["name"])
        return Run()

    module.init = init
    sys.modules["wandb"] = module


def test_one_run_on_the_dashboards_whatever_happened(tmp_path: Path) -> None:
    config, output, notes = make_run(tmp_path), tmp_path / "run", tmp_path / "notes"
    wandb = partial(_stand_in_wandb, notes)
    words = ["--set", "log.wandb_project=p"]
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        words += ["--set", "log.tensorboard=true"]
    except ImportError:
        EventAccumulator = None
    job = start_ranks(2, config, *words, fault=all_of(wandb, at(5, 0, killed)))
    assert 10 in job.wait(60), job.text()
    job = start_ranks(2, config, *words, fault=all_of(wandb, at(6, 1, asked_to_stop)))
    assert job.wait() == [75, 75], job.text()
    train_ranks(1, config, *words, fault=wandb)

    heard = [json.loads(line) for line in notes.read_text().splitlines()]
    assert {words[0] for words in heard} == {0}, "rank 0 alone speaks"
    begun = [words[2:] for words in heard if words[1] == "init"]
    run_id = json.loads((output / "checkpoints" / f"step-{STEPS:09d}" / "state.json").read_text())["run_id"]
    assert begun == [["p", "tiny", run_id, "allow", "tiny"]] * 3
    steps = [words[2] for words in heard if words[1] == "log" and "loss" in words[3]]
    assert steps == [*range(1, 5), *range(4, 10), *range(10, STEPS + 1)]

    assert [row["step"] for row in rows_of(output)] == list(range(1, STEPS + 1))
    if EventAccumulator is not None:
        events = EventAccumulator(str(output / "tensorboard"))
        events.Reload()
        shown = events.Scalars("loss")
        assert [event.step for event in shown] == list(range(1, STEPS + 1)), "each step once, in order"
        losses = [row["loss"] for row in rows_of(output)]
        assert [event.value for event in shown] == pytest.approx(losses, rel=1e-6)
        assert [event.step for event in events.Scalars("validation/python")] == [5, 8, 10, 14, 15, 20, 24]


def test_over_other_layouts_the_samples_come_in_one_order(tmp_path: Path) -> None:
    straight, broken = make_run(tmp_path, "straight"), make_run(tmp_path, "broken")
    train_ranks(1, straight)
    tensor = ("--set", "parallel.tensor=2")
    job = start_ranks(2, broken, fault=at(7, 0, asked_to_stop))
    assert job.wait() == [75, 75], job.text()
    job = start_ranks(2, broken, *tensor, fault=at(8, 1, killed))
    assert 10 in job.wait(60), job.text()
    train_ranks(4, broken, *tensor, "--set", "train.micro_batch_size=2")
    ledgers = []
    for output in (tmp_path / "straight", tmp_path / "broken"):
        newest = output / "checkpoints" / f"step-{steps_in(output)[-1]:09d}"
        ledgers.append(json.loads((newest / "state.json").read_text())["data"])
    assert ledgers[0]["order"] == ledgers[1]["order"] and len(ledgers[0]["order"]) >= 16
    digests = [[row["batch_digest"] for row in rows_of(tmp_path / name)] for name in ("straight", "broken")]
    assert digests[0] == digests[1]
