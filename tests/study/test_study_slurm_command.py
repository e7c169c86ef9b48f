"""`stagemix study run STUDY --slurm` with stand-ins for SLURM's programs: what sbatch is told, once, and in order."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from batch_stand_ins import Batch, directives, submissions, submitting_stand_ins
from study.made_studies import BASE, stage, tables, write
from tiny_run import write_corpus

from megatron.checkpoint.manifest import build_manifest, manifest_bytes
from megatron.commands.frame import run_command
from megatron.commands.study import main as study
from megatron.config.errors import EXIT_CHANGED_PAST, EXIT_DONE, EXIT_UNAVAILABLE, EXIT_USAGE
from megatron.study.node_config import end_checkpoint, node_config
from megatron.study.plan import plan_study
from megatron.study.slurm_nodes import (
    REPORT,
    comment_of,
    jobs_of,
    note_job,
)
from megatron.study.steps import planned_ledger, trained


def stand_ins(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    found = submitting_stand_ins(folder)
    (found / "queue").touch()
    (found / "scancel").write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >> {found}/cancelled\n')
    (found / "scancel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{found}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return found


def test_status_is_told_of_jobs_that_wait_in_vain_and_of_those_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, folder = stand_ins(monkeypatch, tmp_path / "bin"), tmp_path / "study"
    folder.mkdir()
    assert jobs_of(folder) == {}
    for number, key in enumerate([("a", "train"), ("b", "train"), ("b", "evaluate"), REPORT], 101):
        note_job(folder, key, str(number), [], Path("x"))  # type: ignore[arg-type]
    with (folder / "jobs.jsonl").open("a") as file:
        file.write('{"torn')
    lines = [
        f"102|PENDING|DependencyNeverSatisfied|afterok:101(failed)|{comment_of(('b', 'train'), folder)}",
        f"103|PENDING|Dependency|afterok:102(unfulfilled)|{comment_of(('b', 'evaluate'), folder)}",
        f"104|RUNNING|None|(null)|{comment_of(REPORT, folder)}",
        "105|CANCELLED|None|(null)|(null)",
    ]
    (programs / "queue").write_text("\n".join(lines) + "\n")
    found = {name: [(job.job, job.task, job.state) for job in jobs] for name, jobs in jobs_of(folder).items()}
    assert found == {
        "": [("104", "report", "RUNNING")],
        "a": [("101", "train", "GONE")],
        "b": [("102", "train", "BLOCKED"), ("103", "evaluate", "PENDING")],
    }
    (programs / "squeue").unlink()
    assert {job.state for jobs in jobs_of(folder).values() for job in jobs} == {"UNKNOWN"}


SIZE = ("--slurm", "--nodes", "2", "--gpus-per-node", "4", "--time", "60")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study with data: two arms that share a trunk, an average of both, and one of a run's last checkpoints."""
    monkeypatch.chdir(tmp_path)
    base = json.loads(json.dumps(BASE, default=str))
    base["validation"]["fraction"] = 0
    base["train"]["global_batch_size"] = 8
    for name, source in base["sources"].items():
        write_corpus(tmp_path / name, len(name))
        source.pop("tokens")
        source["data"] = [str(tmp_path / name)]
    path = write(tmp_path, made_tables(base))
    stand_ins(monkeypatch, tmp_path / "bin")
    return path


def made_tables(base: dict[str, Any], **over: Any) -> dict[str, Any]:
    horizon = {"peak": 0.001, "horizon": "20 steps"}
    stages = {
        "init": stage(steps=6, lr=horizon),
        "text": stage(mixture={"web": 1}),
        "code": stage(mixture={"web": 0.5, "code": 0.5}),
        "mean": {"last": 3},
    }
    arms: dict[str, Any] = {
        "text": {"stages": ["init", "text"]},
        "code": {"from": "text/init", "stages": ["code"]},
        "mean": {"from": "text/init", "stages": ["mean"]},
        "soup": {"stages": [{"name": "soup", "average": ["text/text", "code/code"]}]},
    }
    return tables(arms, stages, base=base, results={"loss": False}, **over)


def by_label(path: Path) -> dict[str, str]:
    return {node.label: name for name, node in plan_study(path).graph.nodes.items()}


def noted(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "jobs.jsonl").read_text().splitlines()]


def test_a_study_is_submitted_once_and_in_order(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(study, ["run", str(made), *SIZE, "--dependency", "afterok:7", "--comment", "mine"]) == EXIT_DONE
    said, output, ids = capsys.readouterr().out, tmp_path / "runs/made", by_label(made)
    rows = noted(output)
    jobs = {(row["node"], row["task"]): row["job"] for row in rows}
    assert [row["task"] for row in rows].count("train") == 3 and jobs.keys() == {
        (ids["init"], "train"), (ids["text"], "train"), (ids["code"], "train"), (ids["mean"], "average"),
        (ids["soup"], "average"), (ids["text"], "evaluate"), (ids["code"], "evaluate"), (ids["mean"], "evaluate"),
        (ids["soup"], "evaluate"), ("", "report"),
    }  # fmt: skip
    calls = submissions(tmp_path / "bin")
    assert len(calls) == len(rows) and all(row["job"] in said for row in rows)
    options = dict(zip((row["job"] for row in rows), (" ".join(call) for call in calls), strict=True))
    trunk, text, code = (jobs[(ids[name], "train")] for name in ("init", "text", "code"))
    assert "--dependency=afterok:7 " in options[trunk] and "kill-on-invalid-dep=yes" in options[text]
    assert f"--dependency=afterok:{trunk} " in options[text] and f"afterok:{trunk} " in options[code]
    assert f"--dependency=afterok:{text}:{code} " in options[jobs[(ids["soup"], "average")]]
    scripts = {row["job"]: Path(row["file"]).read_text() for row in rows}
    asked = directives(scripts[text])
    assert asked["nodes"] == "2" and asked["gpus-per-node"] == "4" and "requeue" in asked and "dependency" not in asked
    assert asked["comment"] == f"mine stagemix-study {ids['text']} train {output}"
    assert asked["job-name"] == f"made-text-{ids['text'][:8]}"
    assert "resume-from" not in scripts[trunk] and "--set checkpoint.keep=" in scripts[trunk]  # `mean` needs its last
    assert "checkpoint.keep=" not in scripts[text]
    mean = scripts[jobs[(ids["mean"], "average")]]
    assert directives(mean)["nodes"] == "1" and "gpus-per-node" not in directives(mean)
    for step in (6, 4, 2):
        assert f"runs/made/nodes/{ids['init']}/checkpoints/step-{step:09d}" in mean
    evaluates = scripts[jobs[(ids["text"], "evaluate")]]
    assert f"study evaluate {made} --node {ids['text']} &" in evaluates
    assert f"study report {made} &" in scripts[jobs[("", "report")]]
    for name in ("init", "text", "code"):
        assert (output / "nodes" / ids[name] / "node.toml").is_file()


def queue_of(folder: Path, rows: Sequence[Mapping[str, Any]], **states: str) -> str:
    lines = []
    for row in rows:
        comment = comment_of((row["node"], row["task"]), folder)
        after = ",".join(row["after"]) or "(null)"
        lines.append(f"{row['job']}|{states.get(row['task'], 'PENDING')}|Dependency|{after}|{comment}\n")
    return "".join(lines)


def test_submitted_twice_and_after_a_kill_between_two_calls(made: Path, tmp_path: Path) -> None:
    programs, output = tmp_path / "bin", tmp_path / "runs/made"
    (programs / "refuses").write_text("sbatch: error: QOSMaxSubmitJobPerUserLimit\n")
    assert run_command(study, ["run", str(made), *SIZE]) == EXIT_USAGE
    (programs / "refuses").unlink()
    assert run_command(study, ["run", str(made), *SIZE]) == EXIT_DONE
    rows = noted(output)
    # the third job was submitted, and the process killed before it could put that on record
    lines = (output / "jobs.jsonl").read_text().splitlines(keepends=True)
    (output / "jobs.jsonl").write_text("".join(lines[:2]))
    (programs / "queue").write_text(queue_of(output, rows[:3]))
    before = len(submissions(programs))
    assert run_command(study, ["run", str(made), *SIZE]) == EXIT_DONE
    second = noted(output)[2:]
    keys = [(row["node"], row["task"]) for row in [*rows[:3], *second]]
    assert sorted(keys) == sorted((row["node"], row["task"]) for row in rows)
    assert len(submissions(programs)) - before == len(rows) - 3
    (programs / "queue").write_text(queue_of(output, [*rows[:3], *second]))
    assert run_command(study, ["run", str(made), *SIZE]) == EXIT_DONE
    assert len(submissions(programs)) - before == len(rows) - 3


def test_where_slurm_does_not_answer_nothing_is_submitted(made: Path, tmp_path: Path) -> None:
    (tmp_path / "bin/squeue").write_text("#!/bin/bash\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    assert run_command(study, ["run", str(made), *SIZE]) == EXIT_UNAVAILABLE
    assert not submissions(tmp_path / "bin")
    assert run_command(study, ["run", str(made), *SIZE, "--dry-run"]) == EXIT_DONE


def test_a_dry_run_writes_nothing_and_names_gpu_hours(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", str(made), *SIZE, "--dry-run", "--gpu-type", "h100", "--at-once", "1"]
    assert run_command(study, words) == EXIT_DONE
    said = capsys.readouterr().out
    assert "10 jobs: 3 train, 2 average, 4 evaluate, 1 report" in said and "GPU-hours of training" in said
    assert not (tmp_path / "runs").exists() and not submissions(tmp_path / "bin")


def test_a_study_whose_data_are_planned_can_be_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).resolve().parents[2] / "examples/studies/paper-a/full.toml"
    stand_ins(monkeypatch, tmp_path / "bin")
    monkeypatch.chdir(tmp_path)
    words = ["--slurm", "--nodes", "1", "--gpus-per-node", "8", "--time", "60"]
    assert run_command(study, ["run", str(path), *words, "--dry-run"]) == EXIT_DONE
    assert run_command(study, ["run", str(path), *words]) != EXIT_DONE and not submissions(tmp_path / "bin")


def test_cancelling_names_waiting_jobs_first(made: Path, tmp_path: Path) -> None:
    assert run_command(study, ["run", str(made), *SIZE]) == EXIT_DONE
    rows = noted(tmp_path / "runs/made")
    (tmp_path / "bin/queue").write_text(queue_of(tmp_path / "runs/made", rows) + "999|PENDING|None|(null)|(null)\n")
    assert run_command(study, ["run", str(made), "--slurm", "--cancel"]) == EXIT_DONE
    first, second = (tmp_path / "bin/cancelled").read_text().splitlines()
    assert first == f"--state=PENDING {second}" and sorted(second.split()) == sorted(row["job"] for row in rows)


def test_the_study_says_options_of_its_jobs(made: Path, tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text('partition = "slow"\naccount = "lm"\ngpus_per_node = 8\nmodule = ["cuda"]\ntime = "9:00:00"\n')
    with made.open("a") as file:
        file.write('[slurm]\npartition = "gpu"\nmodule = ["nccl"]\n[slurm.evaluate]\npartition = "small"\ntime = 30\n')
    words = ["run", str(made), "--slurm", "--nodes", "1", "--site", str(site), "--cpus-per-task", "3"]
    assert run_command(study, words) == EXIT_DONE
    rows = noted(tmp_path / "runs/made")
    asked = {row["task"]: directives(Path(row["file"]).read_text()) for row in rows}
    assert [asked[task]["partition"] for task in ("train", "average", "evaluate")] == ["gpu", "gpu", "small"]
    assert asked["evaluate"]["time"] == "30" and asked["report"]["time"] == "9:00:00"
    assert asked["train"]["gpus-per-node"] == "8" and asked["report"]["account"] == "lm"
    assert asked["train"]["cpus-per-task"] == asked["evaluate"]["cpus-per-task"] == "3"
    text = Path(rows[0]["file"]).read_text()
    assert "module load cuda || exit 2\nmodule load nccl || exit 2" in text


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("[slurm]\npartitoin = 'x'\n", "did you mean 'partition'"),
        ("[slurm]\njob_name = 'x'\n", "each job is called by its node"),
        ("[slurm]\narray = '1-3'\n", "are no array"),
        ("[slurm]\nevaluate = 3\n", "[slurm.evaluate]"),
        ("[slurm.average]\nnodes = 2\n", "it is one process"),
        ("[slurm]\ntime = 'soon'\n", "no time that sbatch reads"),
        ("[slurm]\ncpu = true\ngpus_per_node = 2\n", "contradict"),
    ],
)
def test_options_of_the_study_that_make_no_sense(
    made: Path, table: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with made.open("a") as file:
        file.write(table)
    assert run_command(study, ["plan", str(made)]) == EXIT_USAGE
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--at-once", "0"), "at least 1"),
        (("--array", "0-3"), "are no array"),
        (("--job-name", "x"), "called by its node"),
        (("--dependency", "singleton"), "name jobs"),
        (("--tasks-per-node", "8"), "more processes than the 4 GPUs"),
        (("--lead", "9999"), "asked to stop"),
    ],
)
def test_options_on_the_line_that_make_no_sense(
    made: Path, tmp_path: Path, words: Sequence[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(study, ["run", str(made), *SIZE, *words]) == EXIT_USAGE
    assert said in capsys.readouterr().err and not submissions(tmp_path / "bin")


def test_an_edited_study_is_refused_as_everywhere(made: Path, tmp_path: Path) -> None:
    assert run_command(study, ["run", str(made), *SIZE]) == EXIT_DONE
    ids = by_label(made)
    (tmp_path / "runs/made/nodes" / ids["text"] / "metrics.jsonl").write_text('{"step": 7}\n')
    made.write_text(made.read_text().replace('"steps" = 4', '"steps" = 5'))
    assert run_command(study, ["run", str(made), *SIZE]) == EXIT_CHANGED_PAST
    assert run_command(study, ["run", str(made), *SIZE, "--edited"]) == EXIT_DONE


def test_a_branch_begins_at_its_parent_and_goes_on_by_itself(made: Path, tmp_path: Path) -> None:
    """The script, in a real bash: --resume-from until there is a checkpoint of the run's own."""
    assert run_command(study, ["run", str(made), *SIZE]) == EXIT_DONE
    ids, output = by_label(made), tmp_path / "runs/made"
    row = next(row for row in noted(output) if row["node"] == ids["text"] and row["task"] == "train")
    script = Path(row["file"]).read_text().replace(str(Path(row["file"]).parent) + "/", f"{tmp_path}/")
    parent = output / "nodes" / ids["init"] / "checkpoints/step-000000006"
    for number, (folder, begins) in enumerate([("", True), (".partial-step-000000006-ab", True), ("discarded", True),
                                               ("step-000000006", False)]):  # fmt: skip
        (output / "nodes" / ids["text"] / "checkpoints" / folder).mkdir(parents=True, exist_ok=True)
        batch = Batch(tmp_path / f"batch-{number}", script).start()
        batch.end_step(8)
        batch.wait()
        words = batch.words("srun")
        assert ("--resume-from" in words) == begins
        assert not begins or words[words.index("--resume-from") + 1] == str(parent)
        assert words[words.index("train") + 1] == str(output / "nodes" / ids["text"] / "node.toml")
    subprocess.run(["bash", "-n", row["file"]], check=True)


def test_a_node_launched_by_hand_is_waited_for(made: Path, tmp_path: Path) -> None:
    """`stagemix launch_slurm nodes/ID/node.toml`: no mark of the study, and its record in the node's folder."""
    ids, output = by_label(made), tmp_path / "runs/made"
    folder = output / "nodes" / ids["init"] / "slurm"
    folder.mkdir(parents=True)
    (folder / "jobs.jsonl").write_text('{"time": 1.0, "file": "0001-train.sbatch", "job": "777"}\n')
    (tmp_path / "bin/queue").write_text("777|RUNNING|None|(null)|(null)\n")
    assert run_command(study, ["run", str(made), *SIZE]) == EXIT_DONE
    rows = {(row["node"], row["task"]): row["after"] for row in noted(output)}
    assert (ids["init"], "train") not in rows and rows[(ids["text"], "train")] == ["afterok:777"]


def test_a_local_run_is_refused_while_jobs_wait(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(study, ["run", str(made), *SIZE]) == EXIT_DONE
    rows = noted(tmp_path / "runs/made")
    (tmp_path / "bin/queue").write_text(queue_of(tmp_path / "runs/made", rows))
    capsys.readouterr()
    assert run_command(study, ["run", str(made)]) == EXIT_USAGE
    assert "are in SLURM's queue" in capsys.readouterr().err


def test_stages_are_called_as_where_they_were_trained_or_will_be(made: Path, tmp_path: Path) -> None:
    """A trunk was trained, then its stage was given another name; the config of a node two levels below, written before
    the one between is trained, must say what that one's ledger will say: a resume compares names."""
    text = made.read_text().replace('"stages" = ["init", "text"]', '"stages" = ["init", "text", "code"]')
    made.write_text(text)
    before = plan_study(made)
    trunk, middle, last = before.graph.arms[0].path
    folder = end_checkpoint(before, trunk)
    folder.mkdir(parents=True)
    ledger = planned_ledger(trained(before.graph.nodes[trunk].step))
    assert ledger is not None
    (folder / "state.json").write_text(json.dumps({"data": ledger.to_json()}))
    (folder / "manifest.json").write_bytes(manifest_bytes(build_manifest(folder, 6, True)))
    made.write_text(text.replace('"init"', '"start"').replace("text/init", "text/start"))
    after = plan_study(made)
    assert after.graph.arms[0].path == (trunk, middle, last) and after.graph.nodes[trunk].label == "start"
    names = [[stage.name for stage in node_config(after, name).stages] for name in (middle, last)]
    assert names == [["init", "text"], ["init", "text", "code"]]
