"""Studies that are edited, shortened, moved on after nodes ran: what is refused, what is kept, what is never redone."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from study.run_studies import ARMS, LR, STAGES, changed, check_trained_once, digest, make_study, train_here
from study.stand_in_commands import save

from megatron.commands import study as command
from megatron.commands.frame import run_command
from megatron.config.errors import ChangedPastError, DataError
from megatron.study import due_tasks
from megatron.study.due_tasks import Task, urgency
from megatron.study.node_config import node_folder, study_folder
from megatron.study.node_state import study_states
from megatron.study.plan import plan_study
from megatron.study.study_record import edits_of, read_record, refuse_edits, write_record
from megatron.study.study_status import study_status
from megatron.study.verification import disk_bytes, verify

TWO = {"text": ARMS["text"], "code": ARMS["code"]}


def study_run(study: Path, *words: str) -> int:
    """`stagemix study run` in this process: for where no process is to be started."""
    return run_command(command.main, ["run", str(study), "--no-evaluation", *words])


def test_a_changed_stage_that_ran_is_refused_with_its_key_and_both_values(tmp_path: Path) -> None:
    study = make_study(tmp_path, TWO)
    before = train_here(study)
    old = {node.label: node.id for node in before.graph.nodes.values()}
    make_study(tmp_path, TWO, changed(on={"mixture": {"web": 1, "python": 3}}))
    planned = plan_study(study)
    edits = edits_of(planned, read_record(planned))
    assert [(edit.arm, edit.seed, edit.stage, edit.key, edit.then) for edit in edits] == [
        ("text", 7, "on", "stage.mixture", old["on"])
    ]
    assert edits[0].tokens == 9 * 4 * 16 == planned.graph.nodes[edits[0].now].tokens
    with pytest.raises(ChangedPastError) as caught:
        refuse_edits(edits, study)
    for words in (f"{study}: was edited", "arm 'text' (seed 7), stage 'on'", "75 %", "25 %", "--edited", "add-arm"):
        assert words in str(caught.value)
    assert study_run(study) == 5
    assert study_status(planned)["edits"] == [edits[0].words()]


def test_an_accepted_edit_leaves_the_old_node_and_lists_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study(tmp_path, TWO)
    before = train_here(study)
    on = next(node.id for node in before.graph.nodes.values() if node.label == "on")
    there = digest(node_folder(before, on).path)
    make_study(tmp_path, TWO, changed(on={"mixture": {"web": 1, "python": 3}}))
    train_here(study)  # which records it, as --edited does
    assert study_run(study) == 0
    assert f"no arm needs it any more: on {on[:8]} (seed 7): {node_folder(before, on).path}" in capsys.readouterr().out
    assert digest(node_folder(before, on).path) == there
    check_trained_once(study)
    make_study(tmp_path, TWO)  # and back: nothing to train, and again an edit
    assert study_run(study) == 5 and study_run(study, "--edited") == 0
    assert "all done: nothing to do" in capsys.readouterr().out


def test_a_trunk_that_changes_is_told_once_for_each_arm_at_the_trunk(tmp_path: Path) -> None:
    study = make_study(tmp_path, TWO)
    train_here(study)
    make_study(tmp_path, TWO, changed(init={"steps": 16}))
    planned = plan_study(study)
    edits = edits_of(planned, read_record(planned))
    assert [(edit.arm, edit.stage, edit.key) for edit in edits] == [
        ("text", "init", "stage.samples"),
        ("code", "init", "stage.samples"),
    ]
    assert [edit.tokens for edit in edits] == [(16 + 9) * 64, (16 + 8) * 64]


@pytest.mark.parametrize(
    ("arms", "stages"),
    [
        ({**TWO, "more": {"from": "text", "stages": ["code"]}}, STAGES),  # another arm
        ({"text": {"stages": ["init", "on", "code"]}, "code": ARMS["code"]}, STAGES),  # a later stage
        ({"text": {"stages": ["init"]}, "code": ARMS["code"]}, STAGES),  # the last left out
        ({"text": ARMS["text"]}, STAGES),  # an arm less
        ({"text": {"stages": ["init", "code"]}, "code": ARMS["code"]}, STAGES),  # one that has not begun
        ({"code": ARMS["code"], "text": ARMS["text"]}, {name: STAGES[name] for name in ("code", "on", "init")}),
    ],
)
def test_what_has_not_begun_may_change(tmp_path: Path, arms: dict[str, Any], stages: dict[str, Any]) -> None:
    study = make_study(tmp_path, TWO)
    planned = train_here(study, ["code"])
    write_record(plan_study(study), read_record(planned))  # text was recorded, and its own stage has not begun
    make_study(tmp_path, arms, stages)
    planned = plan_study(study)
    assert edits_of(planned, read_record(planned)) == []
    train_here(study)
    check_trained_once(study)


def test_names_may_change_between_starts(tmp_path: Path) -> None:
    """A name is no part of a node, and a resume compares names: a trunk keeps those that it was trained with."""
    arms = {"text": ARMS["text"], "back": {"stages": ["init", "on", "code"]}}
    stages = changed(code={"mixture": None, "like": "init"})
    del stages["code"]["mixture"]
    study = make_study(tmp_path, arms, stages)
    train_here(study, ["text"])
    renamed = {"begin": stages["init"], "then": stages["on"], "init": {**stages["code"], "like": "begin"}}
    make_study(
        tmp_path, {"text": {"stages": ["begin", "then"]}, "back": {"stages": ["begin", "then", "init"]}}, renamed
    )
    planned = plan_study(study)
    assert edits_of(planned, read_record(planned)) == []
    assert sum(task.kind == "train" for task in due_tasks.due_tasks(planned, False)) == 1
    train_here(study)
    end = next(node.id for node in planned.graph.nodes.values() if node.label == "init")
    stage = json.loads((node_folder(planned, end).checkpoint(29) / "state.json").read_text())["data"]["stages"]
    assert [one["name"] for one in stage] == ["init", "on", "init+"]


def test_a_folder_that_nothing_needs_may_be_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study(tmp_path, TWO)
    planned = train_here(study)
    trunk = next(node.id for node in planned.graph.nodes.values() if node.label == "init")
    shutil.rmtree(node_folder(planned, trunk).path)
    status = study_status(planned)
    assert status["counts"] == {"gone": 1, "trained": 2}
    assert status["tokens"]["left"] == 0 and all(arm["done"] for arm in status["arms"])
    found = verify(planned, study_states(planned))
    # what it was trained on stands in the ledgers of what went on from it
    assert (found.trained, found.naive, found.faults) == (planned.graph.trained, planned.graph.naive, ())
    assert study_run(study) == 0 and "all done: nothing to do" in capsys.readouterr().out
    make_study(
        tmp_path, {**TWO, "third": {"stages": ["init", "end"]}}, changed(end={"steps": 2, "mixture": {"web": 1}})
    )
    due = due_tasks.due_tasks(plan_study(study), False)
    assert [task.node == trunk for task in due] == [True, False]
    train_here(study)
    check_trained_once(study)


def test_a_damaged_checkpoint_is_no_end(tmp_path: Path) -> None:
    study = make_study(tmp_path, TWO)
    planned = train_here(study)
    on = next(node.id for node in planned.graph.nodes.values() if node.label == "on")
    end = node_folder(planned, on).checkpoint(21)
    (end / "state.json").write_bytes(b"{")
    assert [task.node for task in due_tasks.due_tasks(planned, False)] == [on]
    assert study_status(planned)["counts"] == {"trained": 2, "stopped": 1}


def test_a_ledger_that_is_not_as_planned_is_told(tmp_path: Path) -> None:
    study = make_study(tmp_path, TWO)
    planned = train_here(study)
    on = next(node.id for node in planned.graph.nodes.values() if node.label == "on")
    end = node_folder(planned, on).checkpoint(21)
    data = json.loads((end / "state.json").read_text())["data"]
    data["stages"][1]["use"]["web"]["samples"] += 1
    save(end, 21, data, "w", True)
    (fault,) = verify(planned, study_states(planned)).faults
    assert f"on {on[:8]}: its ledger has" in fault and "samples of web" in fault


def test_an_average_keeps_what_it_is_of(tmp_path: Path) -> None:
    arms = {"text": ARMS["text"], "mean": {"from": "text/on", "stages": ["mean", "code"]}}
    stages = changed(mean={"last": 3}, code={"take": {"optimizer": "fresh"}})
    study = make_study(tmp_path, arms, stages)
    planned = train_here(study)
    check_trained_once(study)
    assert study_status(planned)["counts"] == {"trained": 4}


def test_what_holds_up_most_comes_first(tmp_path: Path) -> None:
    study = make_study(
        tmp_path, {**ARMS, "lone": {"stages": ["last"]}}, changed(last={"steps": 99, "mixture": {"web": 1}, "lr": LR})
    )
    planned = plan_study(study)
    tasks = due_tasks.due_tasks(planned, True)
    rank = urgency(planned, tasks)
    labels = {name: node.label for name, node in planned.graph.nodes.items()}
    order = [f"{task.kind} {labels[task.node]}" for task in sorted(tasks, key=lambda task: rank[task], reverse=True)]
    assert order[0] == "train init" and order[1] in ("train on", "train code")
    assert [words for words in order if words.startswith("evaluate")] == order[-5:]
    for task, before in tasks.items():
        assert all(list(tasks).index(one) < list(tasks).index(task) for one in before)
    assert Task("evaluate", planned.graph.arms[0].path[0]) not in tasks  # not the end of an arm


def test_a_study_that_can_only_be_planned_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study(tmp_path, TWO)
    text = study.read_text().replace(json.dumps([str(tmp_path / "data" / "web")]), "[]")
    study.write_text(text.replace('"data" = []', '"tokens" = 100000'))
    assert study_run(study) == 2
    assert "sources.web has no data, only a size" in capsys.readouterr().err
    assert not (tmp_path / "out" / "nodes").exists()


def test_a_broken_record_is_told(tmp_path: Path) -> None:
    study = make_study(tmp_path, TWO)
    planned = train_here(study)
    for content in (b"{", b'{"format": 9}', b"[]", b'{"format": 1, "arms": [{}], "nodes": {}}'):
        study_folder(planned).record.write_bytes(content)
        with pytest.raises(DataError, match=r"study\.json"):
            read_record(planned)


def test_bytes_on_disk_are_those_of_du(tmp_path: Path) -> None:
    planned = train_here(make_study(tmp_path, TWO))
    folder = study_folder(planned).path
    (folder / "link").hardlink_to(next(folder.rglob("state.json")))
    (folder / "away").symlink_to("/usr")
    said = int(subprocess.run(["du", "-sk", str(folder)], capture_output=True, text=True, check=True).stdout.split()[0])
    folders = sum(
        path.stat().st_blocks * 512 for path in [folder, *folder.rglob("*")] if path.is_dir() and not path.is_symlink()
    )
    assert disk_bytes([folder]) == said * 1024 - folders


def test_seeds_beside_the_files_are_kept_in_the_record(tmp_path: Path) -> None:
    study = make_study(tmp_path, TWO)
    train_here(study, ["text"], [7, 8])
    planned = plan_study(study)
    status = study_status(planned)
    assert status["counts"] == {"trained": 2, "waiting": 1}
    assert status["notes"] == ["also run with seeds 8: --seeds shows them"] and status["unneeded"] == []
    train_here(study)
    assert {(arm.name, arm.seed) for arm in read_record(planned).arms} == {("text", 7), ("text", 8), ("code", 7)}
    assert study_status(plan_study(study, ["text"], [7, 8]))["counts"] == {"trained": 4}
    assert run_command(command.main, ["plan", str(study), "--seeds", "7,7"]) == 2


def test_a_second_arm_over_the_same_sources_builds_no_index(tmp_path: Path) -> None:
    study = make_study(tmp_path, {"text": ARMS["text"]})
    train_here(study)
    cache = tmp_path / "out" / "nodes" / "index-cache"
    there = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.iterdir()}
    log = cache.with_name("index-cache.jsonl")
    assert there and sorted(json.loads(line)["file"] for line in log.read_text().splitlines()) == sorted(there)
    indexes = study_status(plan_study(study))["indexes"]
    assert indexes["files"] == len(there) and indexes["seconds"] > 0
    make_study(tmp_path, {"text": ARMS["text"], "other": {"stages": ["code", "on"]}}, changed(code={"lr": LR}))
    train_here(study)
    check_trained_once(study)
    assert {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.iterdir()} == there
    assert study_status(plan_study(study))["indexes"] == indexes
