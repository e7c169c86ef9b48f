"""`stagemix study`: several arms as one graph, in which what arms have in common is trained once."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron.commands import study_add_arm, study_report, study_run, study_slurm, study_status
from megatron.commands.study_action import Action, choice_arguments, planned_study
from megatron.commands.study_evaluate import ACTION as EVALUATE
from megatron.commands.study_tables import show_study
from megatron.commands.tables import console_for_tables
from megatron.config.errors import EXIT_DONE, ConfigError
from megatron.config.quantities import format_count
from megatron.study.costs import check_processes, node_times
from megatron.study.drawing import FORMATS, dot, ends_of, mermaid, tree_lines
from megatron.study.plan import study_plan
from megatron.study.study_file import nearest

EPILOG = """\
examples:
  stagemix study plan examples/studies/paper-b/full.toml     # nodes, tokens, what arms share, warnings
  stagemix study graph examples/studies/paper-b/full.toml    # the tree of nodes alone
  stagemix study run STUDY --report                          # trains, evaluates and reports; again: goes on
  stagemix study run STUDY --slurm --nodes 4                 # the same as jobs of SLURM
  stagemix study status STUDY                                # where it is
  stagemix study add-arm STUDY cooled --from text/on --stage cooldown

`stagemix study run --help` explains one of them. --arm and --seeds choose a part of a study, in all of them.

exit codes: 0 done · 2 the study or one of its files cannot be carried out as written · 3 data or a tokenizer that is
there is broken; each action has more (docs/exit-codes.md)
"""
PLAN_EPILOG = """\
examples:
  stagemix study plan examples/studies/paper-b/full.toml
  stagemix study plan STUDY --arm 'text*' --arm balanced     # only these arms, and what they need
  stagemix study plan STUDY --hardware h100 --processes 64   # GPU-hours of each node on that layout
  stagemix study plan STUDY --json > plan.json
  stagemix study plan STUDY --html plan.html                 # one file for a browser or a mail
  stagemix study plan STUDY --graph dot | dot -Tsvg > graph.svg

A node is a training stage with everything before it. Arms that have the same node train it once; two are the same
where all that their weights depend on is: data, order, model, optimizer, learning rate, seed; not names, layout, paths
or later stages. docs/studies.md has the file's format and the whole list. Runs in seconds and never imports torch.

Where a set or an axis changes a trunk that other arms have in the same words, the plan says which arms no longer share
it, and the first key that differs, with both values.

exit codes: 0 done · 2 the study or one of its files cannot be carried out as written · 3 data or a tokenizer that is
there is broken (docs/exit-codes.md)
"""
GRAPH_EPILOG = """\
examples:
  stagemix study graph STUDY                          # a tree on the terminal
  stagemix study graph STUDY --format dot | dot -Tsvg > graph.svg
  stagemix study graph STUDY --format mermaid         # for Markdown
  stagemix study graph STUDY --arm 'share-*'

exit codes: 0 done · 2 the study or one of its files cannot be carried out as written · 3 data or a tokenizer that is
there is broken (docs/exit-codes.md)
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = argparse.ArgumentParser(
        prog="stagemix study",
        description="Arms of training stages that share trunks, in one TOML file (docs/studies.md).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    below = top.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, action in ACTIONS.items():
        one = below.add_parser(
            name,
            help=action.line,
            description=action.line,
            epilog=action.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.add_argument("study", metavar="STUDY", type=Path, help="the study's TOML file (see examples/studies/)")
        if action.chooses:
            choice_arguments(one)
        action.arguments(one)
    return top


def _graph_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("--format", choices=FORMATS, default="tree", help="default tree")


def _plan_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    one.add_argument("--html", type=Path, metavar="FILE", help="also write the plan as one self-contained page")
    one.add_argument("--graph", choices=FORMATS, help="print the graph instead of the plan")
    one.add_argument(
        "--hardware", metavar="NAME", help="GPU-hours on this accelerator: a100, h100, h200, b200, …, or a .toml file"
    )
    one.add_argument(
        "--processes", type=int, metavar="N", help="with --hardware: of each run; default the product of its axes"
    )
    one.add_argument(
        "--efficiency",
        type=Path,
        metavar="RUN",
        help="with --hardware: what this run reached, instead of published rates",
    )
    one.add_argument("--width", type=int, metavar="COLUMNS", help="default the terminal's")


def main(argv: list[str] | None = None) -> int:
    """Runs the subcommand. Returns an exit code; raises StagemixError."""
    words = sys.argv[1:] if argv is None else argv
    if words and not words[0].startswith("-") and words[0] not in ACTIONS:
        raise ConfigError(f"study {words[0]}: no such action: {nearest(words[0], ACTIONS, 'there are')}")
    if words[:1] == ["run"] and "--slurm" in words:
        return study_slurm.submit_study(words[1:])
    args = parser().parse_args(words)
    return ACTIONS[args.action].run(args)


def _plan(args: argparse.Namespace) -> int:
    if args.hardware is None and (args.processes is not None or args.efficiency is not None):
        given = "--processes" if args.processes is not None else "--efficiency"
        raise ConfigError(f"{given} is for GPU-hours: add --hardware, for example --hardware h100")
    if args.processes is not None and args.processes < 1:
        raise ConfigError(f"--processes {args.processes}: at least one is needed")
    if args.html is not None and args.html.suffix != ".html":
        raise ConfigError(f"--html {args.html}: give a name that ends in .html")
    if args.json and args.graph is not None:
        raise ConfigError(f"--json and --graph {args.graph}: both are for standard output: give one of them")
    plan = _planned(args)
    if args.html is not None:
        from megatron.study.page import write_study_page

        write_study_page(args.html, plan)
    if args.json:
        print(json.dumps(plan, indent=2, default=str))
        return EXIT_DONE
    if args.graph is not None:
        return _print_graph(plan, args.graph)
    show_study(plan, console_for_tables(args.width))
    if args.html is not None:
        print(f"{args.html}: {format_count(args.html.stat().st_size)}B")
    return EXIT_DONE


def _planned(args: argparse.Namespace) -> dict[str, Any]:
    planned = planned_study(args)
    if getattr(args, "hardware", None) is None:
        return study_plan(planned)
    from megatron.planner.hardware import find_accelerator

    accelerator = find_accelerator(args.hardware)
    efficiency = None
    if args.efficiency is not None:
        from megatron.planner.measured_efficiency import measured_efficiency

        efficiency = measured_efficiency(args.efficiency, accelerator)
    check_processes(planned.graph, args.processes)
    times, notes = node_times(planned.graph, accelerator, args.processes, efficiency)
    plan = study_plan(planned, times)
    plan["hardware"] = {"name": accelerator.name, "processes": args.processes, "notes": notes}
    return plan


def _graph(args: argparse.Namespace) -> int:
    return _print_graph(_planned(args), args.format)


def _print_graph(plan: dict[str, Any], form: str) -> int:
    if form == "tree":
        console = console_for_tables()
        for line in tree_lines(plan["nodes"], ends_of(plan), console.options.ascii_only):
            console.print(line, soft_wrap=True)
    else:
        print(dot(plan) if form == "dot" else mermaid(plan))
    return EXIT_DONE


ACTIONS: dict[str, Action] = {
    "plan": Action(
        "Prints nodes, tokens, what arms share and what they don't, mixtures and warnings.",
        PLAN_EPILOG,
        _plan_arguments,
        _plan,
    ),
    "graph": Action("Prints the graph of nodes alone.", GRAPH_EPILOG, _graph_arguments, _graph),
    "run": study_run.ACTION,
    "status": study_status.ACTION,
    "add-arm": study_add_arm.ACTION,
    "evaluate": EVALUATE,
    "report": study_report.ACTION,
}
"""By name, as `--help` lists them. A new one: `study_NAME.py` with an `ACTION`, and a line here."""
