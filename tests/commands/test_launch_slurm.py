"""`stagemix launch_slurm` as a user calls it: what its batch script says, what it submits, and what it refuses."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
from batch_stand_ins import directives, submissions, submitting_stand_ins

from megatron.commands.frame import run_command
from megatron.commands.launch_slurm import main
from megatron.launch.attempts import Heartbeat, write_heartbeat
from megatron.launch.slurm_options import option_fields

BIG = ["--nodes", "64", "--gpus-per-node", "8", "--time", "24:00:00", "--set", "train.micro_batch_size=1"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch and squeue that write down what they get; the folder in which they do."""
    folder = submitting_stand_ins(tmp_path / "cluster")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run_command(main, [*words, "--dry-run"]) == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=60)
    return script


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    assert run_command(main, list(words)) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") or "\nerror: " in said
    return said


def on_cpus(config: Path, folder: Path) -> list[str]:
    """A run of four processes that the tiny config can have."""
    sets = ["--set", "train.micro_batch_size=1", "--set", f"run.output={folder}"]
    return [str(config), "--nodes", "2", "--cpu", "--tasks-per-node", "2", "--time", "60", *sets]


def test_64_nodes_of_8_GPUs(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my run"
    more = [f"--set=stages.{name}.steps=1" for name in ("balanced", "text", "cooldown")]
    more += [
        "--set",
        "sources.prose.max_epochs=9",
        "--set",
        "train.global_batch_size=512",
        "--set",
        f"run.output={out}",
        "--cpus-per-task",
        "12",
    ]
    script = dry_run(capsys, str(config), *BIG, *more, "--account", "lm", "--partition", "gpu", "--mem", "0")
    said = directives(script)
    expected = {
        "job-name": "tiny", "nodes": "64", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "12",
        "time": "24:00:00", "account": "lm", "partition": "gpu", "mem": "0", "requeue": "", "open-mode": "append",
        "signal": "B:USR1@300", "output": f"{out}/slurm/%j.log", "chdir": str(Path.cwd()),
    }  # fmt: skip
    assert said == expected
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash" and "512 processes" in script
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert not any(line and not line.startswith("#") for line in lines[:last])  # sbatch stops reading at a command
    code = [line.strip() for line in lines[last:] if line.strip() and not line.strip().startswith("#")]
    for wanted in (
        'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
        "export OMP_NUM_THREADS=12",
        'export MASTER_ADDR="$first"',
        f"output={shlex.quote(str(out))}",
        'srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=8 --kill-on-bad-exit=1 \\',
        "--set train.global_batch_size=512 \\",
    ):
        assert wanted in code
    assert "NCCL_" not in "".join(code).replace("NCCL|", "")
    assert not out.exists()  # a dry run writes nothing
    assert max(map(len, lines[5:])) <= 160


def test_a_dry_run_needs_neither_slurm_nor_torch(config: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from megatron.commands.launch_slurm import main; code = main(sys.argv[1:]); "
        "print('torch' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *on_cpus(config, tmp_path / "run"), "--dry-run"],
        env={**os.environ, "PATH": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash") and done.stdout.endswith("False\n")


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["--help"]) == 0
    said = capsys.readouterr().out
    for one in option_fields():
        assert f"--{one.name.replace('_', '-')}" in said and one.metadata["help"]
    assert "exit codes:" in said and "0-31%4" in said


def test_without_sbatch_the_dry_run_is_the_way_out(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "--dry-run" in refused(capsys, *on_cpus(config, tmp_path / "run"), code=6)
    assert not (tmp_path / "run").exists()


def test_it_is_kept_submitted_and_told(
    config: Path, tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "it's a run"
    assert run_command(main, on_cpus(config, out)) == 0
    said = capsys.readouterr().out
    script = out / "slurm" / "0001-train.sbatch"
    assert submissions(cluster) == [["--parsable", str(script)]]
    assert directives(script.read_text())["output"] == f"{out}/slurm/%j.log"
    for words in ("submitted 101", "status", "save-now", "stop-now", "scancel --batch --signal=USR1 101", "101.log"):
        assert words in said
    assert json.loads((out / "slurm" / "jobs.jsonl").read_text())["job"] == "101"
    assert run_command(main, on_cpus(config, out)) == 0  # the first is gone from the queue by now
    assert (out / "slurm" / "0002-train.sbatch").exists() and script.exists()


def test_sbatchs_own_words_are_shown_and_the_file_stays(
    config: Path, tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cluster / "refuses").write_text("sbatch: error: invalid partition specified: gpuu\n")
    said = refused(capsys, *on_cpus(config, tmp_path / "run"), "--partition", "gpuu")
    assert "invalid partition specified: gpuu" in said and "0001-train.sbatch" in said
    assert (tmp_path / "run" / "slurm" / "0001-train.sbatch").exists()


def test_a_chain_waits_each_for_the_one_before(
    config: Path, tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, [*on_cpus(config, tmp_path / "run"), "--chain", "3"]) == 0
    script = str(tmp_path / "run" / "slurm" / "0001-train.sbatch")
    waits = [["--kill-on-invalid-dep=yes", f"--dependency=afternotok:{jobs}"] for jobs in ("101", "101:102")]
    assert submissions(cluster) == [["--parsable", *words, script] for words in ([], *waits)]
    assert "no-requeue" in directives(Path(script).read_text())
    assert Path(script).with_suffix(".chain").read_text() == "101\n102\n103\n"


def test_a_run_that_trains_is_not_started_twice(
    config: Path, tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run_command(main, on_cpus(config, out)) == 0
    (cluster / "queue").write_text("101|101|101|PENDING\n")
    assert "job 101 is PENDING" in refused(capsys, *on_cpus(config, out))
    assert run_command(main, [*on_cpus(config, out), "--dependency", "afterany:101"]) == 0
    (cluster / "queue").write_text("")
    write_heartbeat(out, Heartbeat(time.time(), 1, 5, host="n17", pid=99))
    assert "process 99 on n17" in refused(capsys, *on_cpus(config, out))
    write_heartbeat(out, Heartbeat(time.time() - 1000, 1, 5, host="n17", pid=99))
    assert run_command(main, on_cpus(config, out)) == 0


def test_of_two_launches_at_once_one_submits(config: Path, tmp_path: Path, cluster: Path) -> None:
    """In two processes, with an sbatch that is slow to answer."""
    text = (cluster / "sbatch").read_text()
    (cluster / "sbatch").write_text(f'{text}echo "$n|$n|$n|PENDING" > $HERE/queue; sleep 0.5\n')
    words = [sys.executable, "-m", "megatron.commands.cli", "launch_slurm", *on_cpus(config, tmp_path / "run")]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate(timeout=60)[1] for one in both]
    assert sorted(one.returncode for one in both) == [0, 2], said
    assert len(submissions(cluster)) == 1 and "job 101 is PENDING" in "".join(said)


def test_a_folder_that_cannot_be_made_is_named(
    config: Path, tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for out in (Path("/proc/no/run"), tmp_path / "file" / "run"):
        assert f"{out}/" in refused(capsys, *on_cpus(config, out), code=74)
    assert not submissions(cluster)


def test_an_array_of_runs(config: Path, tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = on_cpus(config, tmp_path / "sweep-{task}")
    assert "must" not in refused(capsys, *on_cpus(config, tmp_path / "same"), "--array", "0-3")
    assert "would both write" in refused(
        capsys, *on_cpus(config, tmp_path / "one"), "--set", "run.seed={task}", "--array", "0-3"
    )
    assert run_command(main, [*words, "--array", "0-6:2%2", "--set", "run.seed={task}"]) == 0
    script = (tmp_path / "slurm" / "0001-train.sbatch").read_text()
    assert directives(script)["array"] == "0,2,4,6%2" and directives(script)["output"].endswith("%A_%a.log")
    for task in (0, 2, 4, 6):
        assert f"[{task}]={tmp_path}/sweep-{task}\n" in script


def test_configs_from_a_file(config: Path, tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (tiny_run.make_run(tmp_path, name) for name in ("one", "two"))
    (tmp_path / "list").write_text(f"# arms\n{one}\n\n{two}\n")
    words = ["--configs", str(tmp_path / "list"), *on_cpus(config, tmp_path)[1:-2], "--at-once", "1"]
    assert run_command(main, words) == 0
    script = (tmp_path / "slurm" / "0001-train.sbatch").read_text()
    assert directives(script)["array"] == "0-1%1" and f"[1]={two}" in script and f"[1]={tmp_path}/two" in script
    assert "lines 0 to 1" in refused(capsys, *words, "--array", "0-2")


BAD = {
    "no nodes": (["--gpus-per-node", "8", "--time", "60"], "--nodes"),
    "no time": (["--nodes", "1", "--gpus-per-node", "1"], "--time"),
    "24h": (["--nodes", "1", "--gpus-per-node", "1", "--time", "24h"], "24h"),
    "no gpus": (["--nodes", "1", "--time", "60"], "--cpu"),
    "cpu without tasks": (["--nodes", "1", "--cpu", "--time", "60"], "--tasks-per-node"),
    "cpu with gpus": (["--nodes", "1", "--cpu", "--gpus-per-node", "8", "--time", "60"], "contradict"),
    "zero nodes": (["--nodes", "0", "--gpus-per-node", "8", "--time", "60"], "at least 1"),
    "more tasks than gpus": (["--nodes", "1", "--gpus-per-node", "2", "--tasks-per-node", "4", "--time", "60"], "GPUs"),
    "layout": (["--nodes", "3", "--cpu", "--tasks-per-node", "1", "--time", "60"], "3 data ranks"),
    "tensor": ([*BIG[:6], "--set", "parallel.tensor=5"], "not a multiple"),
    "key": ([*BIG[:6], "--set", "train.micro_batch=5"], "micro_batch_size"),
    "too short": (["--nodes", "1", "--cpu", "--tasks-per-node", "1", "--time", "4"], "4 min"),
    "within the margin": (["--nodes", "1", "--cpu", "--tasks-per-node", "1", "--time", "1", "--lead", "9"], "60 s in"),
    "wide margin": (["--nodes", "1", "--cpu", "--tasks-per-node", "1", "--time", "10", "--lead", "9", "--set",
                     "health.end_margin_seconds=595"], "595 s free"),
    "secret": (["--env", "WANDB_API_KEY=x", *BIG], "secret"),
    "variable": (["--env", "PATHS", *BIG], "NAME=VALUE"),
    "sbatch arg": (["--sbatch-arg", "-n 4", *BIG], "long option"),
    "containers": (["--container-image", "a", "--apptainer", "b", *BIG], "one of them"),
    "mounts": (["--container-mounts", "a:b", *BIG], "without a container"),
    "array": (["--array", "3-1", *BIG], "backwards"),
    "dependency": (["--dependency", "17", *BIG], "afterany"),
    "chain requeued": (["--chain", "2", "--requeue", *BIG], "--requeue"),
    "name": (["--job-name", "a\nb", *BIG], "no #SBATCH line"),
    "serve": (["--serve-evaluations", "--nodes", "1", "--cpu", "--tasks-per-node", "1", "--time", "60"], "evaluation"),
}  # fmt: skip


@pytest.mark.parametrize("words, expected", BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused_before_anything_is_written(
    words: list[str], expected: str, config: Path, tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert expected in refused(capsys, str(config), *words, "--set", f"run.output={out}")
    assert not out.exists() and not submissions(cluster)


def test_a_task_number_needs_an_array(
    config: Path, tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--array" in refused(capsys, *on_cpus(config, tmp_path / "run-{task}"))
    assert not submissions(cluster) and not list(tmp_path.glob("run-*"))


def test_a_site_of_cpus(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "site.toml"
    site.write_text('cpu = true\ntasks_per_node = 2\nnodes = 2\ntime = "60"\n')
    sets = ["--set", "train.micro_batch_size=1", "--set", f"run.output={tmp_path / 'run'}"]
    said = directives(dry_run(capsys, str(config), "--site", str(site), *sets))
    assert said["ntasks-per-node"] == "2" and "gpus-per-node" not in said
    said = directives(dry_run(capsys, str(config), "--site", str(site), *sets, "--gpus-per-node", "2"))
    assert said["gpus-per-node"] == "2"
    site.write_text("cpu = true\ngpus_per_node = 8\n")
    assert "contradict" in refused(capsys, str(config), "--site", str(site), *sets)


def test_a_site_file_gives_defaults(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "site.toml"
    site.write_text(
        'partition = "gpu"\ntime = "1:00:00"\nnodes = 2\ngpus_per_node = 0\ntasks_per_node = 2\nexclusive = true\n'
        'module = ["cuda/12"]\nenv = { NCCL_SOCKET_IFNAME = "ib0", A = "1" }\nsbatch_arg = ["--gres-flags=x"]\n'
    )
    sets = ["--set", "train.micro_batch_size=1", "--set", f"run.output={tmp_path / 'run'}"]
    words = [
        str(config),
        "--site",
        str(site),
        *sets,
        "--partition",
        "debug",
        "--module",
        "gcc",
        "--env",
        "A=2",
        "--dry-run",
    ]
    script = dry_run(capsys, *words)
    said = directives(script)
    assert (said["partition"], said["time"], said["exclusive"], said["gres-flags"]) == ("debug", "1:00:00", "", "x")
    assert "module load cuda/12 || exit 2\nmodule load gcc || exit 2" in script
    assert "export A=2" in script and "export NCCL_SOCKET_IFNAME=ib0" in script
    for text, expected in (
        ('partitoin = "gpu"', "did you mean 'partition'"),
        ("nodes = true", "whole number"),
        ('env = ["A"]', "a table"),
        ('launcher = "mpirun"', "srun, torchrun"),
        ("nodes = ", "TOML"),
    ):
        site.write_text(text)
        assert expected in refused(capsys, *words)


def nodes_failed(out: Path, cluster: Path, *usable: str) -> None:
    """n7 and "gone" failed, n8 did so long ago; SLURM has the `usable` nodes."""
    out.mkdir()
    kept = {"n7.site.org": time.time() + 9999, "n8": time.time() - 1, "gone": time.time() + 9999}
    excluded = {host: {"reason": "x", "time": 0, "until": until, "failures": 2} for host, until in kept.items()}
    (out / "bad_nodes.json").write_text(json.dumps({"excluded": excluded, "suspected": {}, "given": {}}))
    known = "".join(f"echo NodeName={name} NodeHostName={name} State=IDLE Partitions=gpu\n" for name in usable)
    (cluster / "scontrol").write_text(
        f'#!/bin/bash\n[ "$2" = hostnames ] && {{ echo "$3" | tr , "\\n"; exit; }}\n{known}'
    )
    (cluster / "scontrol").chmod(0o755)


def test_nodes_that_failed_before_are_left_out(
    config: Path, tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    nodes_failed(out, cluster, "n1", "n7", "n8", "n9")
    assert run_command(main, [*on_cpus(config, out), "--exclude", "n1", "--dry-run"]) == 0
    script, said = capsys.readouterr()
    assert directives(script)["exclude"] == "n1,n7"
    assert f"stagemix requeue {out} --forgive HOST" in said and "gone failed before" in said
    (cluster / "refuses").write_text("sbatch: error: Requested node configuration is not available\n")
    said = refused(capsys, *on_cpus(config, out))
    assert "configuration is not available" in said.partition("error: ")[2]
    assert "n7" in said.partition("error: ")[2] and "--forgive HOST" in said.partition("error: ")[2]


@pytest.mark.parametrize("more", [["--exclude", "n1"], ["--nodelist", "n7"], ["--partition", "other"]])
def test_no_more_nodes_are_left_out_than_can_be_spared(
    more: list[str], config: Path, tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    nodes_failed(out, cluster, "n1", "n7", "n8")
    asked = directives(dry_run(capsys, *on_cpus(config, out), *more)).get("exclude")
    assert asked == ("n1" if more[0] == "--exclude" else None)


def test_all_that_failed_are_left_out_where_slurm_cannot_be_asked(
    config: Path, tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    nodes_failed(out, cluster)
    (cluster / "scontrol").write_text("#!/bin/bash\nexit 1\n")
    assert run_command(main, [*on_cpus(config, out), "--dry-run"]) == 0
    script, said = capsys.readouterr()
    assert directives(script)["exclude"] == "n7,gone" and "bad_nodes.json" in said and "--forgive HOST" in said


def test_the_lead_is_that_of_the_run_so_far(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "step_seconds": 100.0, "checkpoint_seconds": 200.0}) + "\n"
    )
    script = dry_run(capsys, *on_cpus(config, out))
    assert directives(script)["signal"] == "B:USR1@660" and "as this run measured" in script
    assert directives(dry_run(capsys, *on_cpus(config, out), "--lead", "77"))["signal"] == "B:USR1@77"


def test_a_side_job_evaluates(config: Path, tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--set", 'evaluation.suite="heldout"', "--set", 'evaluation.where="queue"']
    more = ["--serve-evaluations", "--serve-gpus", "1", "--serve-partition", "small", "--serve-time", "2:00:00"]
    assert run_command(main, [*on_cpus(config, tmp_path / "run"), *sets, *more]) == 0
    side = tmp_path / "run" / "slurm" / "0002-serve_evaluations.sbatch"
    assert submissions(cluster)[1] == ["--parsable", "--dependency=after:101", str(side)]
    said = directives(side.read_text())
    assert (said["partition"], said["gpus-per-node"], said["time"], said["nodes"]) == ("small", "1", "2:00:00", "1")
