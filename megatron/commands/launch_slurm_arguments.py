"""The command line of `stagemix launch_slurm`: the options of a job, and what is launched."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError
from megatron.launch.slurm_options import SlurmOptions, option_fields, options_from

EPILOG = """\
One readable batch script is written (OUTPUT/slurm/0001-train.sbatch, the next 0002-…) and handed to sbatch. Config and
layout are checked before; nothing waits in a queue to find a misspelt key. The run is asked to stop shortly before its
time is over, saves, goes back into the queue and goes on where it stopped; so it does after a preemption or a lost
node. `stagemix requeue`, at the script's end, decides that, and leaves out nodes that failed. Edit the script freely:
nothing reads it back.

examples:
  stagemix launch_slurm run.toml --nodes 64 --gpus-per-node 8 --time 24:00:00 --dry-run
      shows the script; needs no SLURM
  stagemix launch_slurm run.toml --nodes 4 --site ~/cluster.toml --set train.micro_batch_size=2
      cluster.toml holds this cluster's habits, under the options' names with underscores:
        partition = "gpu"
        account = "lm"
        gpus_per_node = 8
        time = "24:00:00"
        module = ["cuda/12.8"]
        setup = ["/projects/lm/venv/bin/activate"]
        env = { NCCL_SOCKET_IFNAME = "ib0" }
  stagemix launch_slurm run.toml --nodes 2 --gpus-per-node 8 --time 12:00:00 --chain 5
      five jobs one after another, for sites that forbid requeueing; the rest is dropped when the run is complete
  stagemix launch_slurm run.toml --nodes 1 --gpus-per-node 8 --time 8:00:00 --array 0-7%2 \\
                        --set run.output=runs/sweep-{task} --set run.seed={task}
      an array of runs, two at a time; or --configs FILE, one CONFIG a line, in place of run.toml
  stagemix launch_slurm run.toml --nodes 2 --gpus-per-node 8 --time 12:00:00 --serve-evaluations --serve-gpus 1
      besides, a side job that evaluates each new checkpoint (evaluation.where = "queue")
  stagemix launch_slurm run.toml --nodes 2 --cpu --tasks-per-node 4 --time 60
      on CPUs, by gloo

Other commands as jobs, after --:
  stagemix launch_slurm --array 1-32%8 --cpus-per-task 16 --time 4:00:00 -- \\
                        preprocess_data --input corpora/*.jsonl --output-prefix data/code --tokenizer tokenizer.model
      32 shards, and a job that merges them when all are done
  stagemix launch_slurm --gpus-per-node 1 --time 120 --over runs/a --over runs/b -- \\
                        export_hf --input {item} --output exports/{name}
      a task for each item; so `evaluate`, whose --output needs {name} then

exit codes: 0 submitted, or shown; 2 options, config or layout that cannot be carried out, sbatch's refusal, or a job
that trains there already; 3 data; 5 the config changes the past; 6 no sbatch here; 74 the
folder of the scripts cannot be written"""


def parser() -> argparse.ArgumentParser:
    """The command line before `--`."""
    built = argparse.ArgumentParser(
        prog="stagemix launch_slurm",
        usage="%(prog)s CONFIG --nodes N --gpus-per-node G --time T [OPTIONS]\n"
        "       %(prog)s [OPTIONS] -- preprocess_data|export_hf|evaluate|… ARGUMENTS…",
        description="Writes a batch script for SLURM, keeps it and submits it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    built.add_argument("config", nargs="?", metavar="CONFIG", type=Path, help="the run's TOML file")
    built.add_argument(
        "--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help="override a key of CONFIG"
    )
    built.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    built.add_argument("--site", type=Path, metavar="FILE", help="TOML file with a cluster's defaults of these options")
    built.add_argument("--cpu", action="store_true", help="no GPUs: processes of --tasks-per-node, by gloo")
    built.add_argument("--folder", type=Path, metavar="DIR", help="for scripts and logs (default: OUTPUT/slurm)")
    add_options(built)
    _add_several(built)
    _add_serving(built)
    return built


def add_options(built: argparse.ArgumentParser, hidden: Collection[str] = ()) -> None:
    """The options of a job, in their groups; those that are hidden, by their names, are read and not shown."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for one in option_fields():
        about = one.metadata
        if about["group"] not in groups:
            groups[about["group"]] = built.add_argument_group(about["group"])
        group = groups[about["group"]]
        flag, text = f"--{one.name.replace('_', '-')}", about["help"].replace("%", "%%")
        if one.name in hidden:
            text = argparse.SUPPRESS
        if about["kind"] == "switch":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif about["kind"] == "number":
            group.add_argument(flag, type=int, metavar=about["metavar"] or "N", help=text)
        elif about["kind"] in ("list", "table"):
            text += "; may be given more than once" if text != argparse.SUPPRESS else ""
            group.add_argument(flag, action="append", default=None, metavar=about["metavar"] or "WORDS", help=text)
        else:
            group.add_argument(
                flag, choices=about["choices"] or None, metavar=None if about["choices"] else about["metavar"] or "X",
                help=text,
            )  # fmt: skip


def _add_several(built: argparse.ArgumentParser) -> None:
    several = built.add_argument_group("several jobs")
    several.add_argument("--configs", type=Path, metavar="FILE", help="an array of runs: a CONFIG a line")
    several.add_argument("--chain", type=int, metavar="N", help="N jobs one after another, none of them requeued")
    several.add_argument("--over", action="append", default=[], metavar="ITEM", help="after --: a task for each item")
    several.add_argument("--at-once", type=int, metavar="N", help="--over, --configs: so many tasks at a time at most")
    several.add_argument("--shards", type=int, metavar="N", help="of preprocess_data, where --array names some of 1-N")


def _add_serving(built: argparse.ArgumentParser) -> None:
    serving = built.add_argument_group("evaluations beside training")
    add = serving.add_argument
    add("--serve-evaluations", action="store_true", help="also submit a side job: stagemix evaluate --serve OUTPUT")
    add("--serve-time", metavar="T", help="its wall time (default: --time)")
    add("--serve-partition", metavar="X", help="its queue (default: --partition)")
    add("--serve-gpus", type=int, metavar="G", help="its GPUs (default: 1 where evaluation.device is cuda, else 0)")
    add("--serve-cpus", type=int, metavar="C", help="its cores (default: --cpus-per-task)")
    add("--serve-arg", action="append", default=[], metavar="WORD", help="a further argument of evaluate --serve")


def split(argv: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """The words before the first "--", and those behind it; None where there is none."""
    words = list(argv)
    if "--" not in words:
        return words, None
    at = words.index("--")
    return words[:at], words[at + 1 :]


def said_options(args: argparse.Namespace, site: Mapping[str, Any]) -> SlurmOptions:
    """The options of a command line on top of a site's defaults; args.cpu becomes what both come to.

    Raises ConfigError.
    """
    site = dict(site)
    # what the line says of GPUs counts more than the site's habit
    if site.pop("cpu", False) and args.gpus_per_node is None:
        args.cpu = True
    return options_from(_given(args), site)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    given = dict(vars(args))
    given["env"] = dict(_variable(words) for words in args.env or ())
    if args.cpu:
        if args.gpus_per_node:
            raise ConfigError(f"--cpu and --gpus-per-node {args.gpus_per_node} contradict each other: leave one out")
        given["gpus_per_node"] = 0
    return given


def _variable(words: str) -> tuple[str, str]:
    name, equals, value = words.partition("=")
    if not equals:
        raise ConfigError(f"--env {words}: write NAME=VALUE; what is exported in this shell, sbatch hands on by itself")
    return name, value
