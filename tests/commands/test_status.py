"""`stagemix status` of real folders: a run that was killed and went on, against all its rows; half a folder; no run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from metrics.made_metrics import make_run

from megatron.commands.frame import run_command
from megatron.commands.status import main
from megatron.commands.status_words import span
from megatron.launch.bad_nodes import BadNodes, NodeFailure, write_bad_nodes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed by the system in its ninth step or later, and then trained to its end."""
    folder = tmp_path_factory.mktemp("status")
    config = tiny_run.make_run(folder)
    process = tiny_run.start(config)
    metrics = folder / "run" / "metrics.jsonl"
    try:
        end = time.monotonic() + 200
        while not (metrics.exists() and '"step": 8,' in metrics.read_text()) and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    finally:
        tiny_run.stop(process)
    assert tiny_run.train(config).returncode == 0
    return folder / "run"


def status_of(run: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run_command(main, [str(run), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def rows_in(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if "loss" in row]


def test_a_real_run_against_all_its_rows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = status_of(run, capsys)
    rows, discarded = rows_in(run / "metrics.jsonl"), rows_in(run / "metrics.discarded.jsonl")
    assert (status["state"], status["code"], status["name"]) == ("complete", 0, "tiny")
    progress = status["progress"]
    assert (progress["step"], progress["steps"], progress["consumed_tokens"], progress["tokens"]) == (
        24,
        24,
        3072,
        3072,
    )
    assert progress["stages"] == ["balanced", "text", "cooldown"]
    assert (progress["stage"]["step"], progress["stage"]["steps"]) == (10, 10)
    taken: dict[tuple[str, str], int] = {}
    for row in rows:
        for source, count in row["samples_by_source"].items():
            taken[row["training_stage"], source] = taken.get((row["training_stage"], source), 0) + count
    assert {(row["training_stage"], row["source"]): row["samples"] for row in status["sources"]} == taken
    assert all(row["tokens"] == 16 * row["samples"] for row in status["sources"])
    assert all(abs(row["samples"] - row["target"]) < 1 for row in status["sources"])
    wall = status["wall_time"]
    told = sum(row["step_seconds"] for row in rows)
    inside = wall["kept"] + wall["redone"] + sum(wall["aside"].values())
    assert wall["kept"] / inside == pytest.approx(
        told / sum(row.get(key, 0) for row in [*rows, *discarded] for key in
                   ("step_seconds", "checkpoint_seconds", "validation_seconds")),
        rel=1e-4,  # rows are rounded to microseconds
    )  # fmt: skip
    assert status["redone_steps"] == len(discarded)
    first, second = status["attempts"]
    assert (first["code"], first["from_step"], second["from_step"]) == (None, 0, rows_from(rows))
    assert (second["code"], second["to_step"]) == (0, 24)
    if discarded:  # but where the kill came just after a save
        assert (first["to_step"], first["lost_steps"]) == (discarded[-1]["step"], len(discarded))
    assert status["checkpoint"]["step"] == 24 and not status["checkpoint"]["damaged"]
    files = [path for path in Path(status["checkpoint"]["path"]).rglob("*") if path.is_file()]
    assert status["checkpoint"]["bytes"] == sum(p.stat().st_size for p in files if p.name != "manifest.json")


def rows_from(rows: list[dict[str, Any]]) -> int:
    """The step that the second attempt went on from: its first row says what runs."""
    second: int = [row["step"] for row in rows if "start" in row][-1] - 1
    return second


def test_it_is_said_in_words(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bad_nodes(run, BadNodes({"n7": [NodeFailure(time.time(), 1, 1, "ECC", True)]}))
    assert run_command(main, [str(run)]) == 0
    out = capsys.readouterr().out
    for words in ("tiny  complete since", "step 24 of 24", "goodput ", "no record: killed", "left out: n7", "cooldown"):
        assert words in out, out


def test_rows_since_a_checkpoint_and_before_the_first(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same folder as it was in the middle: without newer checkpoints, and then without any."""
    for kept, expected in ((14, 14), (None, 0)):
        copy = tmp_path / f"upto-{kept}"
        subprocess.run(["cp", "-r", run, copy], check=True)
        for folder in (copy / "checkpoints").iterdir():
            if kept is None or folder.name != f"step-{kept:09d}":
                subprocess.run(["rm", "-r", folder], check=True)
        lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
        upto = next(place for place, line in enumerate(lines) if '"step": 20,' in line)
        (copy / "metrics.jsonl").write_text("".join(lines[:upto]) + '{"step": 20, "lo')
        (copy / "exit.json").unlink()
        (copy / "heartbeat.json").unlink()
        status = status_of(copy, capsys)
        assert status["progress"]["step"] == 19
        assert status["progress"]["consumed_tokens"] == 19 * 128
        assert status["checkpoint"]["step"] == (expected or None)
        samples = {(row["training_stage"], row["source"]): row["samples"] for row in status["sources"]}
        assert sum(samples.values()) == 19 * 8
        assert run_command(main, [str(copy)]) == 0
        assert "step 19" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named_and_passed_over(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", run, copy], check=True)
    steps = tiny_run.steps_in(copy)
    newest = copy / "checkpoints" / f"step-{steps[-1]:09d}"
    next((newest / "model").iterdir()).write_bytes(b"")
    status = status_of(copy, capsys)
    assert status["checkpoint"]["step"] == steps[-2]
    assert status["checkpoint"]["damaged"] == [str(newest)]
    assert any("is damaged" in note for note in status["notes"])


def test_what_runs_at_the_moment(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", run, copy], check=True)
    (copy / "exit.json").unlink()
    lines = [json.loads(line) for line in (copy / "attempts.jsonl").read_text().splitlines()]
    kept = [line | {"time": line["time"] - 1000} for line in lines if line["event"] != "end"]
    (copy / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    beat = json.loads((copy / "heartbeat.json").read_text())
    for ago, state in ((3.0, "running"), (500.0, "silent")):
        now = {"time": time.time() - ago, "phase": "engine", "phase_since": time.time() - 5}
        (copy / "heartbeat.json").write_text(json.dumps({**beat, **now}))
        assert status_of(copy, capsys)["state"] == state
        assert run_command(main, [str(copy)]) == 0
        assert state in capsys.readouterr().out


def test_an_old_folder_without_records_of_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = make_run(tmp_path / "run", 0.4)
    os.utime(old / "metrics.jsonl", (1000.0, 1000.0))
    status = status_of(old, capsys)
    assert (status["state"], status["wall_time"], status["attempts"]) == ("unknown", None, [])
    assert status["progress"]["step"] == status["checkpoint"]["step"]
    assert run_command(main, [str(old)]) == 0
    assert "goodput is not known" in capsys.readouterr().out


def test_several_runs_have_a_line_each_and_one_that_is_none_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, [str(run), str(run)]) == 0
    assert capsys.readouterr().out.count("tiny") == 2
    assert run_command(main, [str(run), str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "tiny" in shown.out and "passed over" in shown.err and "holds no run" in shown.err
    assert run_command(main, [str(run), str(tmp_path / "nowhere")]) == 2
    shown = capsys.readouterr()
    assert "no run" in shown.out and "no such folder" in shown.err
    assert run_command(main, [str(tmp_path), str(tmp_path)]) == 2
    capsys.readouterr()
    assert run_command(main, [str(run), str(tmp_path), "--json"]) == 0
    one, other = map(json.loads, capsys.readouterr().out.splitlines())
    assert one["state"] == "complete" and "holds no run" in other["error"]


def test_goodput_of_what_runs_does_not_swing_with_heartbeats(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One attempt, in a long step since its newest row: the time of no row is of no kind, least of all between two."""
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", run, copy], check=True)
    (copy / "exit.json").unlink()
    now = time.time()
    told = {"attempt": 1, "host": "n1"}
    events = [{"event": "launch", "time": now - 100, **told}, {"event": "start", "time": now - 80, "step": 0, **told}]
    (copy / "attempts.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    os.utime(copy / "metrics.jsonl", (now - 50, now - 50))
    beat = json.loads((copy / "heartbeat.json").read_text())
    seen = []
    for ago in (1.0, 20.0, 40.0):
        words = {**beat, "attempt": 1, "time": now - ago, "phase": "engine", "phase_since": now - 50}
        (copy / "heartbeat.json").write_text(json.dumps(words))
        status = status_of(copy, capsys)
        assert status["state"] == "running"
        seen.append(status["wall_time"])
    assert seen[0] == seen[1] == seen[2]
    assert (seen[0]["total"], seen[0]["start"], seen[0]["between"]) == (pytest.approx(50), pytest.approx(20), 0.0)


def test_a_job_that_has_not_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "new"
    note = {"time": time.time() - 90, "file": "0001-train.sbatch", "job": "41"}
    (run / "slurm").mkdir(parents=True)
    (run / "slurm" / "jobs.jsonl").write_text(json.dumps(note) + '\n{"ti')
    status = status_of(run, capsys)
    assert (status["state"], status["job"], status["attempts"]) == ("submitted", {"id": "41"}, [])
    assert run_command(main, [str(run)]) == 0
    assert "job 41 was submitted at" in (out := capsys.readouterr().out) and "has not begun" in out
    decision = {"time": time.time() - 5, "attempt": 0, "requeue": False, "why": "no such module", "code": 127}
    (run / "requeue.json").write_text(json.dumps(decision))
    status = status_of(run, capsys)
    assert (status["state"], status["code"], status["reason"]) == ("failed", 127, "no such module")
    assert run_command(main, [str(run)]) == 0
    assert "exit code 127: no such module" in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart_by_their_folders(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("a/one", "b/one", "b/two"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", run, tmp_path / place], check=True)
    assert run_command(main, [str(tmp_path / place) for place in ("a/one", "b/one", "b/two")]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "tiny" in line]
    assert [row.split()[0] for row in rows] == ["a/one", "b/one", "two"]


def test_B1_what_is_no_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run.parent / "run.toml"
    for words, said in (
        ([str(tmp_path / "nowhere")], "no such folder"),
        ([str(tmp_path)], "holds no run: none of attempts.jsonl"),
        ([str(config)], f"is a file: name the run's folder, which its run.output says: {run}"),
        ([str(run / "checkpoints" / "step-000000024")], "is a checkpoint: name the run's folder"),
        ([], "RUN"),
        ([str(run), "--watch", "0"], "is not a number of seconds"),
    ):
        assert run_command(main, words) == 2
        assert said in capsys.readouterr().err


def test_it_watches_in_a_pipe_without_torch(run: Path, stagemix_command: list[str]) -> None:
    code = (
        "import sys; from megatron.commands.status import main; "
        f"main([{str(run)!r}]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, stdout=subprocess.DEVNULL)
    words = [*stagemix_command, "status", str(run), "--watch", "0.1", "--json"]
    # A shell's background jobs are started deaf to SIGINT, and so would be what they start.
    listens = [
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    ]
    words = [sys.executable, "-c", *listens, *words]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline() for _ in range(3)]
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert all(json.loads(line)["state"] == "complete" for line in lines)


def test_durations_for_people() -> None:
    words = {0: "0 s", 59.6: "1 min", 60: "1 min", 3599: "59 min", 7260: "2 h 1 min", 90000: "1 d 1 h", -5: "0 s"}
    assert {seconds: span(seconds) for seconds in words} == words
