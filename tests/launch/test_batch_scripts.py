"""What a batch script does, by running it in a real bash: signals reach the step once, exit codes and values arrive."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from batch_stand_ins import Batch

from megatron.launch.attempts import End, exit_words
from megatron.launch.data_script import DataJob, data_script, serve_script
from megatron.launch.slurm_options import SlurmOptions
from megatron.launch.slurm_script import Head, Paths, Size
from megatron.launch.training_script import TrainingJob, training_script

USR1, TERM = signal.SIGUSR1, signal.SIGTERM
TWO_NODES = Size(nodes=2, tasks=2, ranks=2)


def paths(folder: Path) -> Paths:
    return Paths(folder, folder, "python")


def head(size: Size = TWO_NODES, array: str | None = None) -> Head:
    return Head("name", ["about"], size, True, ("B:USR1@120", "why"), array)


def script(folder: Path, options: SlurmOptions | None = None, size: Size = TWO_NODES, **more: object) -> str:
    job = TrainingJob({None: folder / "run.toml"}, {None: folder / "out"}, **more)  # type: ignore[arg-type]
    return training_script(job, head(size), options or SlurmOptions(), paths(folder))


def test_the_stop_signal_reaches_the_step_once_and_the_end_is_handed_on(tmp_path: Path) -> None:
    batch = Batch(tmp_path, script(tmp_path)).start()
    batch.send(USR1)
    code, said = batch.wait()
    assert batch.signals() == ["USR1"]
    assert batch.words("requeue")[-3:] == [str(tmp_path / "out"), "--code", "75"]
    assert code == 0 and "ended with 75 after SIGUSR1" in said


def test_a_termination_is_not_handed_on_and_the_script_waits_for_the_step(tmp_path: Path) -> None:
    batch = Batch(tmp_path, script(tmp_path)).start()
    batch.send(TERM)
    time.sleep(0.3)
    batch.end_step(75)
    code, said = batch.wait()
    assert batch.signals() == []
    assert batch.words("requeue")[-1] == "75" and code == 0 and "after SIGTERM" in said


@pytest.mark.parametrize("heard", [USR1, TERM])
def test_a_signal_during_set_up_is_remembered_and_no_step_begins(tmp_path: Path, heard: signal.Signals) -> None:
    options = SlurmOptions(setup_line=['touch "$SEEN/setting-up"; sleep 0.5'])
    batch = Batch(tmp_path, script(tmp_path, options)).start("setting-up")
    batch.send(heard)
    code, said = batch.wait()
    assert not batch.words("srun")
    assert batch.words("requeue")[-3:] == [str(tmp_path / "out"), "--code", "75"]
    assert code == 0 and f"SIG{heard.name[3:]} came before the step" in said


@pytest.mark.parametrize("asked, step, said", [(True, 138, 75), (True, 140, 75), (True, 137, 137), (False, 138, 138)])
def test_ranks_that_died_of_the_request_to_stop_were_stopped(tmp_path: Path, asked: bool, step: int, said: int) -> None:
    """A rank that still imports has no handler of SIGUSR1 yet, which then kills it."""
    batch = Batch(tmp_path, script(tmp_path))
    srun = tmp_path / "bin" / "srun"
    srun.write_text(f"#!/bin/bash\ntrap 'exit {step}' USR1\ntouch $SEEN/started\nwhile :; do sleep 0.02; "
                    f"[ -e $SEEN/end ] && exit {step}; done\n")  # fmt: skip
    batch.start()
    if asked:
        batch.send(USR1)
    else:
        batch.end_step(step)
    assert batch.wait()[0] == 0
    assert batch.words("requeue")[-2:] == ["--code", str(said)]


def test_the_signal_is_given_once_though_it_comes_while_srun_starts(tmp_path: Path) -> None:
    """The window between the start of srun and the moment at which its process id is known, widened by a DEBUG trap."""
    text = script(tmp_path).replace(
        '\nif [ "$heard" ]; then\n',
        """
trap 'case "$BASH_COMMAND" in "step=$"!) until [ -e "$SEEN/started" ]; do :; done; kill -USR1 $$;; esac' DEBUG
if [ "$heard" ]; then
""",
    )
    assert "DEBUG" in text
    batch = Batch(tmp_path, text).start()
    code, _ = batch.wait()
    assert batch.signals() == ["USR1"] and code == 0
    assert batch.words("requeue")[-1] == "75"


@pytest.mark.parametrize("step, requeue", [(0, 0), (1, 1), (10, 0), (137, 137)])
def test_the_script_ends_as_requeue_says(tmp_path: Path, step: int, requeue: int) -> None:
    batch = Batch(tmp_path, script(tmp_path))
    (batch.seen / "requeue-says").write_text(str(requeue))
    batch.start().end_step(step)
    assert batch.wait()[0] == requeue
    assert batch.words("requeue")[-2:] == ["--code", str(step)]


def test_the_code_is_the_steps_though_signals_rained_before(tmp_path: Path) -> None:
    """wait returns 128 + a signal's number when one comes: that must never pass for the step's own code."""
    batch = Batch(tmp_path, script(tmp_path)).start()
    for _ in range(40):
        batch.send(TERM)
        time.sleep(0.005)
    batch.end_step(9)
    batch.wait()
    assert batch.words("requeue")[-2:] == ["--code", "9"]


def test_where_the_ranks_meet_and_when_the_time_is_over(tmp_path: Path) -> None:
    batch = Batch(tmp_path, script(tmp_path)).start()
    batch.end_step(0)
    batch.wait()
    # the name of the first node is unknown to the name service here, so SLURM's address of it counts
    assert batch.variable("MASTER_ADDR") == "127.0.0.9"
    ends = subprocess.run(["date", "-d", "2031-05-06 07:08:09", "+%s"], capture_output=True, text=True, check=True)
    assert batch.variable("STAGEMIX_END_TIME") == ends.stdout.strip()
    assert batch.variable("OMP_NUM_THREADS") == "4"  # 7 cores of a node, 2 ranks


@pytest.mark.parametrize("says", ["", "N/A\n", "Unknown\n"])
def test_no_end_time_is_invented(tmp_path: Path, says: str) -> None:
    batch = Batch(tmp_path, script(tmp_path))
    (batch.seen / "squeue-says").write_text(says)
    batch.start().end_step(0)
    batch.wait()
    assert batch.variable("STAGEMIX_END_TIME") == ""


def test_ports_differ_by_job_and_by_restart(tmp_path: Path) -> None:
    found = []
    for number, (job, restarts) in enumerate((("100", "0"), ("101", "0"), ("100", "1"), ("100", "2"))):
        folder = tmp_path / str(number)
        batch = Batch(folder, script(tmp_path), SLURM_JOB_ID=job, SLURM_RESTART_COUNT=restarts).start()
        batch.end_step(0)
        batch.wait()
        found.append(int(batch.variable("MASTER_PORT") or 0))
    assert len(set(found)) == 4 and all(20000 <= port < 30000 for port in found)


def test_one_process_needs_no_meeting_place(tmp_path: Path) -> None:
    assert "MASTER_ADDR" not in script(tmp_path, size=Size())


def test_values_with_blanks_and_quotes_arrive_as_they_are(tmp_path: Path) -> None:
    odd = tmp_path / 'it\'s a "folder" $HOME `x`'
    odd.mkdir()
    override = 'run.name=it\'s "so" $HOME `x` \\ {task}'
    options = SlurmOptions(env={"WORDS": "a b'c\"$d"}, launcher="srun", srun_arg=["--label x"])
    batch = Batch(tmp_path, script(odd, options, overrides=[override])).start()
    batch.end_step(0)
    batch.wait()
    called = batch.words("srun")
    assert called[-4:] == ["train", str(odd / "run.toml"), "--set", override] and "--label x" in called
    assert batch.variable("WORDS") == "a b'c\"$d"
    assert batch.words("requeue")[-3] == str(odd / "out")
    assert (odd / "4321-0.txt").exists()


def test_no_secret_is_recorded(tmp_path: Path) -> None:
    more = {"WANDB_API_KEY": "sesame", "TORCH_TOKEN": "sesame", "CUDA_VISIBLE_DEVICES": "0"}
    batch = Batch(tmp_path, script(tmp_path), **more).start()
    batch.end_step(0)
    batch.wait()
    record = (tmp_path / "4321-0.txt").read_text()
    assert "CUDA_VISIBLE_DEVICES=0" in record and "WANDB_API_KEY" in record and "sesame" not in record


def test_a_setup_that_fails_ends_the_job(tmp_path: Path) -> None:
    text = script(tmp_path, SlurmOptions(setup=[str(tmp_path / "absent")]))
    batch = Batch(tmp_path, text)
    done = subprocess.run(["bash", str(batch.file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "absent" in done.stderr and not batch.words("srun")


def test_torchrun_is_deaf_to_what_its_processes_hear_themselves(tmp_path: Path) -> None:
    size = Size(nodes=2, tasks=1, ranks=8)
    batch = Batch(tmp_path, script(tmp_path, SlurmOptions(launcher="torchrun"), size, shutdown_seconds=420)).start()
    batch.end_step(0)
    batch.wait()
    called = batch.words("srun")
    assert "--ntasks-per-node=1" in called
    port = batch.variable("MASTER_PORT")
    for word in ("--nnodes=2", "--nproc-per-node=8", f"--rdzv-endpoint=127.0.0.9:{port}", "--shutdown-timeout=420"):
        assert word in called
    shell = called[called.index("bash") : called.index("torchrun") + 1]
    ignored = subprocess.run(
        [*shell, "grep", "SigIgn", "/proc/self/status"], capture_output=True, text=True, check=True
    )
    mask = int(ignored.stdout.split()[1], 16)
    assert all(mask >> (number - 1) & 1 for number in (TERM, USR1, signal.SIGUSR2))


def test_containers_stand_before_the_command(tmp_path: Path) -> None:
    pyxis = SlurmOptions(
        container_image="nvcr.io#nvidia/pytorch:25.06-py3", container_mounts=["/data:/data", "/my runs:/r"]
    )
    batch = Batch(tmp_path / "a", script(tmp_path, pyxis)).start()
    batch.end_step(0)
    batch.wait()
    called = batch.words("srun")
    assert "--container-image=nvcr.io#nvidia/pytorch:25.06-py3" in called
    assert "--container-mounts=/data:/data,/my runs:/r" in called and called[-3:-1] == ["stagemix", "train"]
    apptainer = SlurmOptions(
        apptainer="my image.sif", container_mounts=["/data:/data"], program="python -m megatron.commands.cli"
    )
    batch = Batch(tmp_path / "b", script(tmp_path, apptainer, Size(2, 2, 2, gpus=2))).start()
    batch.end_step(0)
    batch.wait()
    called = batch.words("srun")
    at = called.index("apptainer")
    assert called[at : at + 5] == ["apptainer", "exec", "--nv", "--bind", "/data:/data"]
    assert called[-6:] == ["my image.sif", "python", "-m", "megatron.commands.cli", "train", str(tmp_path / "run.toml")]


def test_tasks_of_an_array_train_their_own_runs(tmp_path: Path) -> None:
    job = TrainingJob(
        {3: tmp_path / "a.toml", 5: tmp_path / "b c.toml"},
        {3: tmp_path / "out3", 5: tmp_path / "out 5"},
        ["run.seed={task}"],
    )
    text = training_script(job, head(array="3,5"), SlurmOptions(), paths(tmp_path))
    batch = Batch(tmp_path, text, SLURM_ARRAY_TASK_ID="5", SLURM_ARRAY_JOB_ID="4320").start()
    batch.end_step(1)
    batch.wait()
    assert batch.words("srun")[-3:] == [str(tmp_path / "b c.toml"), "--set", "run.seed=5"]
    assert batch.words("requeue")[-3:] == [str(tmp_path / "out 5"), "--code", "1"]


@pytest.mark.parametrize("code, dropped", [(0, False), (2, True), (8, True), (9, False), (75, False), (137, False)])
def test_an_error_that_would_come_again_drops_the_rest_of_a_chain(tmp_path: Path, code: int, dropped: bool) -> None:
    (tmp_path / "jobs").write_text("11\n12\n")
    batch = Batch(tmp_path, script(tmp_path, chain=tmp_path / "jobs"))
    (batch.seen / "requeue-says").write_text(str(code))
    batch.start().end_step(code)
    assert batch.wait()[0] == code
    assert batch.words("scancel") == (["--state=PENDING", "11", "12"] if dropped else [])


def test_a_user_who_stops_a_run_stops_its_chain(tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text("11\n12\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "exit.json").write_text(exit_words(End(1, 0.0, 75, "stop-now: OUTPUT/stop-now")))
    batch = Batch(tmp_path, script(tmp_path, chain=tmp_path / "jobs"))
    (batch.seen / "requeue-says").write_text("75")
    batch.start().end_step(75)
    assert batch.wait()[0] == 75
    assert batch.words("scancel") == ["--state=PENDING", "11", "12"]


@pytest.mark.parametrize("heard, again", [(USR1, True), (TERM, False)])
def test_a_command_that_resumes_is_requeued_but_not_when_it_was_cancelled(
    tmp_path: Path, heard: signal.Signals, again: bool
) -> None:
    job = DataJob(
        ["preprocess_data", "--input", "a b"], shard='"$SLURM_ARRAY_TASK_ID/8"', resumes=True, cores_option=True
    )
    text = data_script(job, head(Size(cores=3), "1-8"), SlurmOptions(), paths(tmp_path))
    batch = Batch(tmp_path, text, SLURM_ARRAY_TASK_ID="5", SLURM_ARRAY_JOB_ID="4320").start()
    batch.send(heard)
    time.sleep(0.2)
    batch.end_step(75)
    code, _ = batch.wait()
    assert batch.words("srun")[-7:] == ["preprocess_data", "--input", "a b", "--shard", "5/8", "--workers", "3"]
    assert ("requeue" in batch.words("scontrol")) == again and code == (0 if again else 75)
    if again:
        assert batch.words("scontrol")[-1] == "4320_5"


def test_items_of_an_array_are_named_by_their_last_part(tmp_path: Path) -> None:
    job = DataJob(
        ["export_hf", "--input", "{item}", "--output", "exports/{name}-{task}"], ("runs/a", "runs/b c"), array=True
    )
    text = data_script(job, head(Size(), "0-1"), SlurmOptions(), paths(tmp_path))
    batch = Batch(tmp_path, text, SLURM_ARRAY_TASK_ID="1", SLURM_ARRAY_JOB_ID="4320").start()
    batch.end_step(7)
    assert batch.wait()[0] == 7
    assert batch.words("srun")[-5:] == ["export_hf", "--input", "runs/b c", "--output", "exports/b c-1"]


def test_a_command_asked_to_stop_during_set_up_goes_on_later(tmp_path: Path) -> None:
    options = SlurmOptions(setup_line=['touch "$SEEN/setting-up"; sleep 0.5'])
    job = DataJob(["preprocess_data"], resumes=True)
    batch = Batch(tmp_path, data_script(job, head(Size()), options, paths(tmp_path))).start("setting-up")
    batch.send(USR1)
    assert batch.wait()[0] == 0
    assert not batch.words("srun") and batch.words("scontrol")[-2:] == ["requeue", "4321"]


@pytest.mark.parametrize("known, again", [("99 RUNNING\n", True), ("", False)])
def test_the_server_goes_on_while_training_does(tmp_path: Path, known: str, again: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.toml").touch()
    text = serve_script(tmp_path / "out", ["--device", "cuda"], "99", head(Size()), SlurmOptions(), paths(tmp_path))
    batch = Batch(tmp_path, text)
    (batch.seen / "squeue-says").write_text(known)
    batch.start().send(USR1)
    code, _ = batch.wait()
    assert batch.words("srun")[-5:] == ["evaluate", "--serve", str(tmp_path / "out"), "--device", "cuda"]
    assert ("requeue" in batch.words("scontrol")) == again and code == (0 if again else 75)
