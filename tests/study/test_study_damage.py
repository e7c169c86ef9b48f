"""What a study says of checkpoints that went bad, of steps that changed nothing, and of what failed beside the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from study.run_studies import ARMS, digest, make_study, run, train_here

from megatron.commands.study import main
from megatron.launch.attempts import End, exit_words
from megatron.study.damaged_checkpoints import damaged_words
from megatron.study.due_tasks import Task, due_tasks
from megatron.study.node_config import end_checkpoint, node_folder
from megatron.study.node_parts import Evaluated, Part
from megatron.study.node_results import NodeResults, write_results
from megatron.study.node_state import node_state
from megatron.study.plan import PlannedStudy, plan_study
from megatron.study.run_nodes import NodeRunner, Running
from megatron.study.run_options import RunOptions
from megatron.study.study_status import study_status

TWO = {"text": ARMS["text"], "code": ARMS["code"]}


def flip(planned: PlannedStudy, label: str) -> Path:
    """Changes a byte of a node's last checkpoint, whose files keep their sizes. Gives its folder."""
    node = next(one.id for one in planned.graph.nodes.values() if one.label == label)
    path = end_checkpoint(planned, node)
    words = (path / "state.json").read_text()
    (path / "state.json").write_text(json.dumps({**json.loads(words), "weights": "0" * 64}))
    assert (path / "state.json").stat().st_size == len(words)
    return path


def test_a_child_of_a_damaged_trunk_is_told_which_folder_to_remove_and_what_that_costs(tmp_path: Path) -> None:
    study = make_study(tmp_path, TWO)
    planned = train_here(study, ["text"])
    on = next(node_folder(planned, one.id).path for one in planned.graph.nodes.values() if one.label == "on")
    path = flip(planned, "init")
    there = digest(on)
    code, said = run(tmp_path, "run", str(study), "--no-evaluation")
    assert code == 4, said
    (line,) = [line for line in said.splitlines() if "its checkpoint is damaged" in line]
    assert line.startswith("init ") and "state.json: expected sha256" in line
    assert f"Remove the folder {path} and" in line
    assert "init is trained from step 8 on, 256 tokens of 768" in line  # checkpoint.every = 4, of 12 steps of 64 tokens
    shutil.rmtree(path)
    code, said = run(tmp_path, "run", str(study), "--no-evaluation")
    assert code == 0 and "init" in said and digest(on) == there, said


def test_one_nodes_failure_is_told_by_its_own_record_and_the_others_are_evaluated(tmp_path: Path) -> None:
    study = make_study(tmp_path, TWO)
    planned = train_here(study)
    path = flip(planned, "on")
    code, said = run(tmp_path, "run", str(study), "--at-once", "1")
    assert code == 4, said
    names = {node.label: f"{node.label} {node.id[:8]}" for node in planned.graph.nodes.values()}
    assert f"{names['on']}: evaluate failed, exit code 4: export: {path}/state.json: expected sha256" in said
    assert f"{names['on']}: its checkpoint is damaged" in said and f"Remove the folder {path}" in said
    assert "the log of on" in said and "the log of code" not in said
    assert f"{names['code']}: evaluated in 3020 s" in said  # what its own parts took, by its record
    assert "3 of 3 nodes trained, 1 of 2 evaluated, 1 tasks failed" in said


def test_nothing_older_or_an_average(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    planned = train_here(study)
    names = {node.label: node.id for node in planned.graph.nodes.values()}
    path = flip(planned, "init")
    for other in path.parent.glob("step-*"):
        if other != path:
            shutil.rmtree(other)
    flip(planned, "soup")
    assert damaged_words(planned, [Task("train", names["on"])]) == []  # with checkpoints of its own it reads these
    shutil.rmtree(node_folder(planned, names["on"]).path)
    (line,) = damaged_words(planned, [Task("train", names["on"])] * 2)
    assert "init is trained from its beginning, 768 tokens of 768" in line
    (line,) = damaged_words(planned, [Task("evaluate", names["soup"])])
    assert "soup is averaged again, and nothing is trained" in line
    assert damaged_words(planned, [Task("evaluate", names["code"])]) == []


def test_a_node_that_was_stopped_as_it_ended_is_trained(tmp_path: Path) -> None:
    study = make_study(tmp_path, {"text": ARMS["text"]})
    tasks = due_tasks(plan_study(study), False)
    planned = train_here(study)
    said: list[str] = []
    watcher: Any = SimpleNamespace(say=said.append, show=lambda *_: None)
    runner = NodeRunner(planned, tasks, RunOptions(1, 1, 1, ()), watcher, None)  # type: ignore[arg-type]
    runner._asked = 1
    child: Any = SimpleNamespace(started=0.0, pid=1, log=tmp_path / "log", last_lines=lambda count: [])
    for task, code in zip(tasks, (143, 75), strict=True):
        folder = node_folder(planned, task.node).path
        (folder / "exit.json").write_text(exit_words(End(1, 9e9, 0, "complete")))
        runner._ended(Running((task,), 0, None, "", 0.0), child, code)
    assert runner._outcome.done == list(tasks) and not runner._outcome.stopped and not runner._outcome.failed
    assert len(said) == 2 and all("trained in" in line for line in said)


def test_steps_without_an_update_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study(tmp_path, {"text": ARMS["text"]})
    planned = train_here(study)
    init = next(iter(planned.graph.nodes))
    path = node_folder(planned, init).path / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "skipped": row["step"] > 1}) + "\n" for row in rows))
    status = study_status(planned)
    assert [row["skipped"] for row in status["nodes"]] == [11, 0]
    assert main(["status", str(study)]) == 0
    assert f"init {init[:8]}: 11 of 12 steps; arms text" in capsys.readouterr().out
    assert main(["run", str(study), "--no-evaluation"]) == 0
    assert f"init {init[:8]}: 11 of 12 steps; arms text" in capsys.readouterr().out


def test_a_torn_or_partial_results_file_is_no_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study(tmp_path, {"text": ARMS["text"]})
    planned = train_here(study)
    end = planned.graph.arms[0].path[-1]
    path = node_folder(planned, end).results
    whole = NodeResults(end, "on", 7, ("text",), 9, "c", "w", None, (), {}, {}, None, asked={})
    write_results(path, whole)
    assert node_state(planned, end, 0.0).state == "evaluated"
    path.write_bytes(path.read_bytes()[:90])
    state = node_state(planned, end, 0.0)
    assert (state.state, state.done) == ("trained", True) and str(path) in state.reason
    assert main(["status", str(study)]) == 0
    said = capsys.readouterr().out
    assert "arms: 1 of 1 trained, 0 evaluated" in said and "its results cannot be read" in said
    write_results(path, NodeResults(**{**vars(whole), "failed": {"bench": "no room"}}))
    assert node_state(planned, end, 0.0).reason == "evaluated in part: bench: no room"
    assert study_status(planned)["nodes"][-1]["evaluation"] == "due"


def test_what_failed_before_is_no_failure_now(tmp_path: Path) -> None:
    folder = node_folder(train_here(make_study(tmp_path, {"text": ARMS["text"]})), "a" * 16)
    folder.path.mkdir()
    Evaluated(folder).failed(Part("loss", "loss", "k", "f"), 7, "why")
    assert Evaluated(folder).failures_since(0.0) == {"loss": (7, "why")}
    assert Evaluated(folder).failures_since(9e12) == {}
