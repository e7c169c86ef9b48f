"""`stagemix study run` in real processes whose commands are stand-ins: what is trained is trained once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from study.run_studies import (
    ARMS,
    StudyProcess,
    all_rows,
    check_trained_once,
    children_of,
    digest,
    make_study,
    nodes_in,
    results_of,
    rows,
    run,
    train_here,
    until,
)

from megatron.config.errors import ConfigError
from megatron.config.load import load_config
from megatron.data.sources import TokenizerIdentity
from megatron.launch.attempts import read_attempts
from megatron.launch.living_run import is_alive, own_names
from megatron.planner.resolve import resolve_run
from megatron.study.identity import hash_of, train_document
from megatron.study.node_config import node_config, node_folder, node_words, write_node
from megatron.study.node_state import study_states
from megatron.study.plan import plan_study
from megatron.study.steps import TrainStep, planned_ledger, trained
from megatron.study.study_lock import StudyLock
from megatron.study.study_status import study_status
from megatron.tokenizers.load import load_tokenizer


def test_every_node_is_trained_once_and_a_second_start_does_nothing(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    code, said = run(tmp_path, "run", str(study), "--at-once", "2")
    assert code == 0, said
    check_trained_once(study)
    planned = plan_study(study)
    assert len(nodes_in(tmp_path / "out")) == len(planned.graph.nodes) == 5
    ratio = f"{planned.graph.trained / planned.graph.naive:.3f}"
    assert f"naive = {ratio} (the plan: {ratio})" in said and "5 of 5 nodes trained" in said
    ends = {arm.path[-1] for arm in planned.graph.arms}
    assert all(node_folder(planned, name).results.exists() == (name in ends) for name in planned.graph.nodes)
    for name, node in planned.graph.nodes.items():  # nobody began before what it goes on from had ended
        for parent in node.parents if node.kind == "train" else ():
            (before,), (after,) = (read_attempts(node_folder(planned, one).path) for one in (parent, name))
            assert before.end is not None and after.launch is not None and before.end.time <= after.launch.time
    there = digest(tmp_path / "out" / "nodes")
    code, said = run(tmp_path, "run", str(study))
    assert (code, "all done: nothing to do" in said) == (0, True)
    assert digest(tmp_path / "out" / "nodes") == there


def test_node_toml_reads_back_to_the_same_node(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    planned = plan_study(study)
    identity = TokenizerIdentity.of(load_tokenizer("bytes"))
    for name, node in planned.graph.nodes.items():
        folder = write_node(planned, name)
        assert json.loads(folder.identity.read_text())["id"] == name
        if not isinstance(node.step, TrainStep):
            continue
        read = load_config(folder.config)
        assert read == node_config(planned, name)
        run_again = resolve_run(read, ledger=planned_ledger(trained(node.step)[:-1]), tokenizer=identity)
        step = replace(node.step, config=read, run=run_again, index=len(read.stages) - 1)
        before = node.parents[0] if node.parents else None
        assert hash_of(train_document(step, node.seed, before, before)) == name


@pytest.mark.parametrize("at_once", [2, pytest.param(1, marks=pytest.mark.soak)])
def test_killed_twice_and_run_again_it_is_as_if_nothing_had_happened(tmp_path: Path, at_once: int) -> None:
    quiet, beaten = tmp_path / "quiet", tmp_path / "beaten"
    # the content of sources decides nodes, not their place
    arms = {"text": ARMS["text"], "code": ARMS["code"]}
    studies = {folder: make_study(folder, arms) for folder in (quiet, beaten)}
    train_here(studies[quiet])
    words = ("run", str(studies[beaten]), "--no-evaluation", "--at-once", str(at_once))
    with StudyProcess(beaten, *words, step=0.02) as process:  # kill -9 of the study alone
        until(lambda: all_rows(beaten / "out") >= 7, "seven steps")
        orphans = children_of(process.process.pid)
        process.kill()
        process.wait()
    until(lambda: not any(is_alive(pid) for pid in orphans), "orphans save and stop")
    with StudyProcess(beaten, *words, step=0.05) as process:  # kill -9 of its children
        until(lambda: all_rows(beaten / "out") >= 15, "fifteen steps")
        until(lambda: children_of(process.process.pid), "a child")
        for pid in children_of(process.process.pid):
            os.kill(pid, signal.SIGKILL)
        assert process.wait() == 137, process.said
    assert "killed by SIGKILL" in process.said
    code, said = run(beaten, *words)
    assert code == 0, said
    check_trained_once(studies[beaten])
    assert results_of(studies[beaten]) == results_of(studies[quiet])
    lost = sum(len(rows(node, "metrics.discarded.jsonl")) for node in nodes_in(beaten / "out"))
    assert (f"trained twice: {lost} steps" in said) == (lost > 0)


def test_a_signal_stops_all_nodes_and_the_next_start_goes_on(tmp_path: Path) -> None:
    study = make_study(tmp_path, {"text": ARMS["text"], "code": ARMS["code"]})
    with StudyProcess(tmp_path, "run", str(study), "--no-evaluation", "--at-once", "2", step=0.05) as process:
        until(lambda: all_rows(tmp_path / "out") >= 14, "fourteen steps")
        process.kill(signal.SIGTERM)
        assert process.wait() == 75
    assert "start the same command again" in process.said and "stopped by SIGTERM" in process.said
    ends = [one for node in nodes_in(tmp_path / "out") for one in read_attempts(node)]
    assert {one.end.code for one in ends if one.end} == {0, 75}  # nothing was killed
    code, said = run(tmp_path, "run", str(study), "--no-evaluation")
    assert code == 0, said
    check_trained_once(study)
    assert not list((tmp_path / "out").rglob("metrics.discarded.jsonl"))


def test_a_failed_node_leaves_the_others_and_blocks_what_goes_on_from_it(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    code, said = run(tmp_path, "run", str(study), "--no-evaluation", fault="on-:8")
    planned = plan_study(study)
    names = {node.label: node.id[:8] for node in planned.graph.nodes.values()}
    assert code == 8, said
    assert f"on {names['on']}: train failed, exit code 8: this node was told to fail" in said
    assert f"soup {names['soup']}: average blocked by on {names['on']}" in said
    assert f"{names['on']}" in said and "-train.log:" in said and "error: this node was told to fail" in said
    done = {name for name in planned.graph.nodes if node_folder(planned, name).path.joinpath("exit.json").exists()}
    trained_labels = sorted(planned.graph.nodes[name].label for name in done)
    assert trained_labels == ["code", "init", "on"]
    status = study_status(planned)
    assert status["counts"] == {"trained": 2, "failed": 1, "blocked": 2}
    assert [arm["name"] for arm in status["arms"] if arm["done"]] == ["code"]
    assert run(tmp_path, "run", str(study), "--no-evaluation")[0] == 0
    check_trained_once(study)


@pytest.mark.soak
def test_no_keep_going_begins_nothing_after_a_failure(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    code, said = run(tmp_path, "run", str(study), "--no-keep-going", "--at-once", "1", fault="on-:8")
    assert code == 8 and "code" not in {
        row["training_stage"] for node in nodes_in(tmp_path / "out") for row in rows(node)
    }
    assert "1 of 5 nodes trained" in said


@pytest.mark.soak
def test_a_failed_evaluation_leaves_its_node_trained(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    code, said = run(tmp_path, "run", str(study), fault="evaluate-soup:7")
    assert code == 7 and "evaluate failed, exit code 7" in said and "5 of 5 nodes trained" in said
    assert "3 of 4 evaluated" in said
    (soup,) = [node for node in plan_study(study).graph.nodes.values() if node.label == "soup"]
    there = digest(tmp_path / "out" / "nodes")
    code, said = run(tmp_path, "run", str(study))
    assert code == 0 and "1 to evaluate" in said
    now = digest(tmp_path / "out" / "nodes")
    of_soup = {f"{soup.id}/{name}" for name in ("evaluated.json", "evaluation.log", "results.json", "export.txt")}
    assert {name for name in now if now[name] != there.get(name)} <= of_soup and set(there) <= set(now)


def test_a_node_that_somebody_trains_is_waited_for_and_not_trained_twice(tmp_path: Path) -> None:
    study = make_study(tmp_path, {"text": ARMS["text"]})
    planned = plan_study(study)
    (first, _) = planned.graph.nodes
    folder = write_node(planned, first)
    script = Path(__file__).with_name("stand_in_commands.py")
    roots = os.pathsep.join([str(script.parents[2]), str(script.parents[1])])
    environment = {**os.environ, "STAND_IN_STEP": "0.4", "PYTHONPATH": roots}
    words = [sys.executable, str(script), *node_words(planned, first)]
    with subprocess.Popen(words, cwd=tmp_path, env=environment) as other:
        until(lambda: rows(folder.path), "a step of the other process")
        code, said = run(tmp_path, "run", str(study), "--no-evaluation")
        assert other.wait(10) == 0
    assert code == 0, said
    assert f"pid {other.pid} on {own_names()[0]} is training it: waiting for that" in said
    assert len(read_attempts(folder.path)) == 1
    check_trained_once(study)


def test_one_at_a_time(tmp_path: Path) -> None:
    study = make_study(tmp_path, {"text": ARMS["text"]})
    with StudyProcess(tmp_path, "run", str(study), "--no-evaluation", step=0.2) as first:
        until(lambda: all_rows(tmp_path / "out"), "a step")
        with pytest.raises(ConfigError, match=f"study run, pid {first.process.pid} on {own_names()[0]}"):
            StudyLock(tmp_path / "out").__enter__()
        planned = plan_study(study)
        (training, waiting) = study_states(planned).values()
        assert (training.state, waiting.state) == ("training", "waiting") and 0 < training.step < 12
        assert training.where == f"pid {children_of(first.process.pid)[0]} on {own_names()[0]}"
        assert training.tokens == training.step * 64 and training.tokens_per_second and training.loss
        first.kill()
    with StudyLock(tmp_path / "out"):  # what a killed one left is no claim
        pass


def test_a_claim_of_another_host_holds_while_it_is_touched(tmp_path: Path) -> None:
    lock = tmp_path / "study.lock"
    lock.write_text(json.dumps({"host": "another", "pid": 1, "time": time.time(), "what": "study run"}))
    with pytest.raises(ConfigError, match="pid 1 on another"):
        StudyLock(tmp_path).__enter__()
    os.utime(lock, (time.time() - 1000, time.time() - 1000))
    with StudyLock(tmp_path):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert lock.read_text() == ""
