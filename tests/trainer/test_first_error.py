"""The first error of a job is shown whole and once, by the rank whose it is; what all ranks meet is nobody's."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rank_faults import at, refuses
from rank_jobs import start_ranks
from tiny_run import ROOT, exit_record, make_run

pytestmark = pytest.mark.timeout(240)

NINE = ("--set", "train.global_batch_size=9", "--set", "train.micro_batch_size=2")
UNEVEN = ("--set", "parallel.tensor=2", "--set", "model.intermediate_size=33")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "train.global_batch_sise=9"), "error: --set train.global_batch_sise=9: unknown key"),
        (("--frsh",), "error: stagemix train: unrecognized arguments: --frsh; stagemix train --help shows"),
        (
            NINE,
            "error: stage 'balanced': global_batch_size 9 is not a multiple of micro_batch_size 2 x 2 data ranks = 4",
        ),
        (UNEVEN, "error: model.intermediate_size 33 is not a multiple of parallel.tensor 2 (33 = 2 x 16 + 1)"),
    ],
    ids=["key", "argument", "batch", "layout"],
)
def test_what_is_wrong_on_every_rank_is_shown_once_and_blames_none(
    tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    job = start_ranks(2, make_run(tmp_path), *words)
    assert job.wait() == [2, 2], job.text()
    assert job.log(0).startswith(message) and job.log(0).count("\n") == 1, job.text()
    assert job.log(1) == ""
    if "train.global_batch_sise=9" not in words and "--frsh" not in words:  # the run's folder is known
        assert exit_record(tmp_path / "run")["reason"] == job.log(0).removeprefix("error: ").rstrip("\n")


def _slow(mine: int) -> None:
    if mine:
        return
    import megatron.trainer.build as module

    check = module.check_layout

    def late(*arguments: object) -> None:
        time.sleep(1)
        check(*arguments)  # type: ignore[arg-type]

    module.check_layout = late


def test_a_slow_rank_0_still_shows_what_all_meet(tmp_path: Path) -> None:
    job = start_ranks(2, make_run(tmp_path), *UNEVEN, fault=_slow)
    assert job.wait() == [2, 2], job.text()
    assert job.log(0).startswith("error: model.intermediate_size 33") and job.log(1) == ""


def test_a_config_that_one_rank_cannot_read_ends_all(tmp_path: Path) -> None:
    job = start_ranks(3, make_run(tmp_path), of_rank={2: ("--set", "run.nmae=x")})
    assert job.wait() == [2, 2, 2], job.text()
    assert job.log(2).startswith("[rank 2] error: --set run.nmae=x: unknown key")
    assert job.log(0) == "rank 2 failed first, with exit code 2: see its own message\n" and job.log(1) == ""


def _killed_before_it_speaks(mine: int) -> None:
    if mine != 1:
        return
    import os
    import signal

    from megatron.parallel.health import Health

    Health._say = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    at(2, 1, refuses)(mine)


def test_rank_0_shows_what_the_first_did_not_live_to(tmp_path: Path) -> None:
    job = start_ranks(3, make_run(tmp_path), "--set", "train.global_batch_size=12", fault=_killed_before_it_speaks)
    assert job.wait() == [3, -9, 3], job.text()
    assert "error: rank 1 failed first: planted.bin: cannot be read" in job.log(0)
    assert job.log(1) == job.log(2) == ""


# torchrun

_PROGRAM = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
if __name__ == "__main__":
    from rank_faults import at, refuses
    from megatron.commands.frame import run_command
    from megatron.commands.train import main
    at(3, 1, refuses)(int(os.environ["RANK"]))
    sys.exit(run_command(main))
"""


def under_torchrun(program: Path, config: Path, *words: str) -> tuple[str, str]:
    """What two processes and torchrun say before its summary of the failure, and the summary."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run([*command, str(program), str(config), *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    before, _, summary = done.stderr.partition(" FAILED\n")
    return before, summary


def test_torchruns_root_cause_is_the_rank_that_failed_first_in_our_words(tmp_path: Path) -> None:
    program = tmp_path / "train_with_a_fault.py"
    program.write_text(_PROGRAM.format(root=str(ROOT), tests=str(ROOT / "tests")))
    said, summary = under_torchrun(program, make_run(tmp_path))
    assert said.count("planted.bin") == 1 and "[rank 1] error: planted.bin: cannot be read" in said
    others, root = summary.split("Root Cause (first observed failure):")
    assert "rank      : 1 (local_rank: 1)" in root and "exitcode  : 3" in root
    assert "traceback : planted.bin: cannot be read: look at the disk" in root
    assert "planted.bin" not in others and "traceback : rank 1 failed first" in others


def test_torchruns_root_cause_is_the_config_s_error(tmp_path: Path) -> None:
    said, summary = under_torchrun(ROOT / "tools" / "train.py", make_run(tmp_path), *NINE)
    message = "stage 'balanced': global_batch_size 9 is not a multiple of micro_batch_size 2 x 2 data ranks = 4"
    assert (
        said.count("global_batch_size 9") == 1 and f"error: {message}: set train.global_batch_size to 8 or 12" in said
    )
    others, root = summary.split("Root Cause (first observed failure):")
    assert f"traceback : {message}" in root and message not in others
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 2
