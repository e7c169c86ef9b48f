"""`stagemix train CONFIG`: trains a run, or goes on with it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from megatron.commands.frame import config_arguments, load_from
from megatron.config.errors import ConfigError, StagemixError
from megatron.launch.torchrun import may_be_one_of_several

EPILOG = """\
The run's folder (run.output in CONFIG) receives checkpoints/, metrics.jsonl, config.toml, exit.json and, while it
trains, heartbeat.json. Starting the same command again goes on from the newest whole checkpoint, bit for bit as if
nothing had happened.

SIGTERM, SIGINT (Ctrl-C), SIGUSR1 or SIGUSR2 (health.stop_signals): the step is finished, a checkpoint saved, exit code
75. A second one, or health.stop_seconds without an end: at once. The same, without a signal, in time before the end of
a SLURM allocation (STAGEMIX_END_TIME, else SLURM_JOB_END_TIME).

touch OUTPUT/save-now: a checkpoint after the next step, and training goes on; the file is removed when it is there.
touch OUTPUT/stop-now: a checkpoint after the next step, exit code 75, and no batch script of ours starts it again.

Several processes share a run out as [parallel] says; what its axes leave of the processes is the data axis. Rank 0
alone writes the folder and speaks. All end together: a signal to any rank stops all at the same step, and the first
error of any ends all with its code, shown once by the rank whose it is. Give every process the same command line, files
and versions: one that differs is refused by name.

exit codes: 0 done · 2 config · 3 data · 4 checkpoint · 5 the config changes the past · 6 choice not available here ·
8 losses are not finite · 9 a process hangs · 10 a process was lost · 74 disk · 75 stopped, start again to go on. A
launcher may end with another: torchrun gives 1 for any failure. Read OUTPUT/exit.json, or the last lines of torchrun:
"Root Cause" is the rank that failed first, its code and its message.

examples:
  stagemix train run.toml
  stagemix train run.toml --set run.output=runs/second --set train.micro_batch_size=2
  stagemix train run.toml --resume-from runs/mine/checkpoints/step-000000100

  torchrun --nproc-per-node 8 --signals-to-handle SIGTERM,SIGINT,SIGUSR1,SIGUSR2 --shutdown-timeout 300 \\
      tools/train.py run.toml
    Without SIGUSR1 or 2 in --signals-to-handle it kills torchrun and leaves its processes behind. They are killed when
    --shutdown-timeout seconds (30 by default) have passed since the signal: give a step and a save the time they take.

  srun --ntasks-per-node 8 --kill-on-bad-exit=1 stagemix train run.toml
    The batch script exports MASTER_ADDR (the first node's name) and MASTER_PORT (a free port there); sbatch's
    --signal=USR1@300 asks for a stop, and so for a checkpoint, 300 seconds before the time is over.

  deepspeed --no_local_rank --num_gpus 8 tools/train.py run.toml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `train`."""
    config_arguments(parser)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--fresh", action="store_true", help="begin at step 0; refused where run.output holds a run")
    start.add_argument(
        "--resume-from",
        metavar="CHECKPOINT",
        type=Path,
        help="go on from this checkpoint folder instead of the newest whole one; newer checkpoints of the run are "
        "moved to checkpoints/discarded; a checkpoint of another run begins a branch in an empty run.output",
    )
    parser.add_argument(
        "--allow-lr-change",
        action="store_true",
        help="permit another learning rate in a training stage that has begun; the change is recorded in the ledger",
    )


class _Parser(argparse.ArgumentParser):
    """Where others may have been given the same words, a mistake in them is an error like any other: shown once."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError, or ends as argparse does."""
        if may_be_one_of_several():
            raise ConfigError(f"{self.prog}: {message}; {self.prog} --help shows what there is")
        super().error(message)


def main(argv: list[str] | None = None) -> int:
    """Trains; gives the exit code."""
    parser = _Parser(
        prog="stagemix train",
        description="Train a run through its training stages, or go on with it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    try:
        args = parser.parse_args(argv)
        config = load_from(args)
    except StagemixError as error:
        if not may_be_one_of_several():
            raise
        from megatron.trainer.session import refuse

        refuse(error)
    # torch takes seconds to load: --help and a mistake in the config should not wait for it.
    from megatron.trainer.resume import Start
    from megatron.trainer.session import run_training

    return run_training(config, Start(args.fresh, args.resume_from), args.allow_lr_change)
