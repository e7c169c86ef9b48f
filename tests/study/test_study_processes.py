"""How many processes a study runs, what each is given, and how they end with who started them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from study.run_studies import ARMS, changed, make_study, train_here, until

from megatron.config.errors import CheckpointError, ConfigError
from megatron.launch import child_process
from megatron.launch.attempts import End, Launch, append_event, exit_words
from megatron.launch.child_process import ChildProcess, accelerators
from megatron.launch.living_run import is_alive, is_claimed, living_process, own_names
from megatron.study import run_options as options_module
from megatron.study.node_config import node_folder, node_words
from megatron.study.plan import plan_study
from megatron.study.run_options import run_options

SLEEPER = [sys.executable, "-c", "import sys, time; print('begun', flush=True); time.sleep(60)"]


def options_on(
    monkeypatch: pytest.MonkeyPatch, study: Path, cores: int, devices: list[str], *asked: int | None
) -> tuple[int, int, int, list[str | None]]:
    """(at once, threads, processes, what each slot sees) on such a machine."""
    monkeypatch.setattr(options_module, "available_processors", lambda: cores)
    monkeypatch.setattr(options_module, "accelerators", lambda: devices)
    found = run_options(plan_study(study), *(asked or (None, None, None)))  # type: ignore[arg-type]
    return found.at_once, found.threads, found.processes, [found.device(slot) for slot in range(found.at_once)]


def test_a_machine_is_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(tmp_path)  # four ends
    of = [(1, [], (1, 1, 1)), (2, [], (2, 1, 1)), (8, [], (4, 2, 1)), (64, [], (4, 16, 1)), (3, [], (3, 1, 1))]
    for cores, devices, expected in of:
        assert options_on(monkeypatch, study, cores, devices)[:3] == expected, cores
    assert options_on(monkeypatch, study, 16, [], None, 8, None)[:2] == (2, 8)
    assert options_on(monkeypatch, study, 16, [], 3, None, None)[0] == 3
    assert options_on(monkeypatch, study, 16, [], None, None, 4)[:3] == (4, 1, 4)
    assert options_on(monkeypatch, study, 16, ["0"]) == (1, 16, 1, [None])
    assert options_on(monkeypatch, study, 32, ["2", "3"]) == (2, 16, 1, ["2", "3"])
    eight = [str(number) for number in range(8)]
    assert options_on(monkeypatch, study, 32, eight, None, None, 4) == (2, 4, 4, ["0,1,2,3", "4,5,6,7"])
    for asked in ((0, None, None), (None, -1, None), (None, None, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            options_on(monkeypatch, study, 4, [], *asked)


def test_a_layout_decides_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(tmp_path, {"text": {**ARMS["text"], "set": {"parallel.tensor": 2}}})
    assert options_on(monkeypatch, study, 4, [])[2] == 2
    with pytest.raises(ConfigError, match="axes of 2 processes"):
        options_on(monkeypatch, study, 4, [], None, None, 3)


def test_accelerators_are_those_that_may_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, found in (("0,1", ["0", "1"]), ("", []), ("-1", []), (" GPU-5, GPU-7", ["GPU-5", "GPU-7"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
        assert accelerators() == found


def test_a_child_ends_when_its_starter_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from megatron.launch import child_process as c; "
        f"c.stagemix = lambda word: {SLEEPER!r}; "
        "print(c.ChildProcess(['x'], Path(sys.argv[1]), 1).pid, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    words = [sys.executable, "-c", code, str(tmp_path / "log")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as starter:
        assert starter.stdout is not None
        child = int(starter.stdout.readline())
        until(lambda: "begun" in (tmp_path / "log").read_text(), "the child")
        assert is_alive(child)
        starter.kill()
    until(lambda: not is_alive(child), "the child's end", 10)


def test_what_a_child_says_and_how_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "import os, sys; print('a\\rb 50%\\rb 100%'); print(os.environ['OMP_NUM_THREADS'], sys.argv[1:]); sys.exit(8)"
    )
    monkeypatch.setattr(child_process, "stagemix", lambda command: [sys.executable, "-c", words, command])
    for _ in range(2):
        child = ChildProcess(["train", "x y"], tmp_path / "logs" / "log", 3)
        assert child.wait(30) == 8
        assert child.last_lines() == ["b 100%", "3 ['train', 'x y']"]
    assert (tmp_path / "logs" / "log").read_text().count("stagemix train x y") == 2  # the first is still there
    monkeypatch.setattr(child_process, "stagemix", lambda command: SLEEPER)
    child = ChildProcess(["train"], tmp_path / "logs" / "log", 1)
    until(lambda: child.last_lines() == ["begun"], "its first word")
    assert child.poll() is None
    child.send(signal.SIGTERM)
    assert child.wait(30) == 143
    child.send(signal.SIGTERM)  # nobody is there any more
    child.kill()


def test_who_trains_in_a_folder(tmp_path: Path) -> None:
    now = time.time()
    assert living_process(tmp_path, now) == "" and not is_claimed(tmp_path)
    append_event(tmp_path, Launch(1, now, own_names()[0], pid=os.getpid()))
    assert living_process(tmp_path, now) == f"pid {os.getpid()} on {own_names()[0]}"
    append_event(tmp_path, End(1, now, 0))
    assert living_process(tmp_path, now) == ""
    append_event(tmp_path, Launch(2, now - 10**6, own_names()[0], pid=os.getpid()))
    assert living_process(tmp_path, now) == ""  # that number is another process's now
    append_event(tmp_path, Launch(3, now, own_names()[0], pid=2**22 - 1))
    assert living_process(tmp_path, now) == ""
    append_event(tmp_path, Launch(4, now, "another", pid=1))
    assert living_process(tmp_path, now + 30) == "pid 1 on another"  # as long as it is heard of
    assert living_process(tmp_path, now + 300) == ""
    (tmp_path / "exit.json").write_text(exit_words(End(4, now, 75)))
    assert living_process(tmp_path, now) == ""


def test_an_average_whose_members_were_not_kept_is_refused_by_name(tmp_path: Path) -> None:
    arms = {"text": ARMS["text"]}
    study = make_study(tmp_path, arms)
    train_here(study)
    make_study(tmp_path, {**arms, "mean": {"from": "text/on", "stages": ["mean"]}}, changed(mean={"last": 3}))
    planned = plan_study(study)
    mean = next(node for node in planned.graph.nodes.values() if node.kind == "average")
    shutil.rmtree(node_folder(planned, mean.parents[0]).checkpoint(20))
    with pytest.raises(CheckpointError, match="has no step-000000020, which mean averages"):
        node_words(planned, mean.id)
