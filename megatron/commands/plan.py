"""`stagemix plan`: what a run will train on, before it does. Runs in under a second and never imports torch."""

from __future__ import annotations

import argparse
import json
from math import lcm
from pathlib import Path
from typing import Any

from megatron.commands.frame import config_arguments, load_from
from megatron.commands.plan_hardware_arguments import add_hardware_arguments, asked_of, processes_of
from megatron.commands.plan_tables import show_plan
from megatron.commands.tables import console_for_tables
from megatron.config.errors import ConfigError
from megatron.config.kernel_checks import kernel_refusals
from megatron.config.layout import Layout, resolve_layout
from megatron.config.load import json_schema
from megatron.config.model_shape import VOCABULARY_MULTIPLE, resolve_model
from megatron.config.quantities import format_count
from megatron.config.schema import RunConfig
from megatron.planner.layout_plan import batches_of, default_processes, plan_layout
from megatron.planner.ledger_files import read_ledger
from megatron.planner.plan import plan_of
from megatron.planner.plan_warnings import warnings_of
from megatron.planner.resolve import ResolvedRun, resolve_run

EPILOG = """\
example:
  stagemix plan examples/minimal.toml
  stagemix plan CONFIG --set stages.cooldown.tokens=5M --json > plan.json
  stagemix plan CONFIG --html plan.html      # one file for a browser or a mail: charts, tables, warnings
  stagemix plan CONFIG --png plan.png        # for slides; needs: pip install 'stagemix[plot]'
  stagemix plan CONFIG --ledger runs/mine    # would this edited config resume that run?
  stagemix plan CONFIG --processes 64        # how [parallel] lies over so many: layers, bytes, bubble
  stagemix plan CONFIG --nodes 8 --hardware h100            # does it fit, how long does it take, what does it need
  stagemix plan CONFIG --nodes 8 --hardware h100 --search   # and which layouts are the fastest
  stagemix plan CONFIG --nodes 8 --hardware h100 --efficiency runs/mine   # with what a run really reached

The drawing shows the share of each source over tokens: one column is a slice of one training stage, a rule stands
where a stage ends, and the learning rate is beneath. Colours by group; without colour (NO_COLOR, a pipe) letters.

Sources whose files are not there yet can be planned with: sources.NAME.tokens = "503B" and no data.

--json prints one object: "steps", "samples", "tokens", "stages" (with "asked_tokens", "lr_before" and "lr_start" at
its beginning, "lr_first" and "lr_last" of its steps, "sources", and "groups" with "error" at its end and "error_below"
after any sample), "sources" (each with "tokens_by_stage", "epochs_after" each stage, "passes" of 1, 2 and 4 epochs,
"dry_at", "never_seen", "left_to_cap" and "unused" tokens), "groups", "layout" (with "axes", "refusals", "notes",
"batches" with "microbatches" and "bubble", "stages" of the pipeline, "ranks" with their "bytes"; null without a model),
and "warnings" (each with "gravity", "kind" and "text", and "exit_code" where train would refuse).

--hardware adds "hardware", in bytes and seconds: "accelerator", "efficiency", "processes", "nodes", "partial_node"
(processes on a node that is not full), "precision", "memory_margin", "capacity_bytes" (of an accelerator, less the
margin), "refusals"; "layout" (null where train refuses it), with "words", "set" (KEY=VALUE for --set), "leave_out"
(keys to take out of the file), "changes", "fits", "needed_bytes", "missing_bytes", "micro_batch_size",
"microbatches", "bubble", "memory" ("ranks" of the pipeline, each with "parameters", "gradients", "optimizer",
"gathered", "accumulated", "receive", "activations", "logits", "workspace", "framework", "total" and the "moment" when
it is fullest; "fullest", the number of one), "step" ("total", what it is spent on, "exposed" communication by axis,
"hidden", "tokens_per_second", "tokens_per_second_per_process", "mfu_causal" and "mfu_full"), "communication" by axis,
"notes", and "run" ("hours", "gpu_hours", "stages", "batches"); "nearest", the same of the layout that fits with the
fewest changes, null where the config's fits; "search", null unless asked for or nothing is near, with "looked_at",
"refused", "too_large", "timed", "best" (each with its "set" words), "misses", "fewest_processes" and
"fewest_is_exact" where nothing fits, and "fastest", as "layout"; and "disk" ("checkpoint_bytes", "output_bytes",
"export_bytes", "data_bytes", "index_bytes", "metrics_bytes", "checkpoints_at_most", "checkpoints_at_the_end",
"sources", "bandwidth", "save_seconds").
docs/planner.md says how it is computed, and how far it is from published and measured figures.

exit codes: 0 also for a layout that does not fit or that train would refuse: the plan says so; 2 unknown hardware or a
config that is none; 3 a run for --efficiency that has too few steps.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="of the layout; default the product of the axes in [parallel]"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the plan as one self-contained page")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw mixture, rate and epochs as a picture")
    parser.add_argument("--detail", action="store_true", help="also every weight, count and target by stage and source")
    parser.add_argument(
        "--width", type=int, metavar="COLUMNS", help="default the terminal's; in a file or pipe 80, tables wider"
    )
    parser.add_argument(
        "--allow-lr-change", action="store_true", help="with --ledger: permit another learning rate in a begun stage"
    )
    parser.add_argument(
        "--ledger",
        type=Path,
        metavar="RUN",
        help="plan on from this run or checkpoint, and check its past is unchanged",
    )
    add_hardware_arguments(parser)


def main(argv: list[str] | None = None) -> int:
    """Prints the plan. Returns an exit code; raises StagemixError."""
    if argv is not None and argv[:1] == ["--schema"]:
        print(json.dumps(json_schema(), indent=2))
        return 0
    parser = argparse.ArgumentParser(
        prog="stagemix plan",
        description="Draws the mixture over tokens and shows, for each training stage and source, tokens, epochs and "
        "what is left, the learning rate at each boundary, and warnings. `stagemix plan --schema` prints the JSON "
        "Schema of config files.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.width is not None and args.width < 40:
        parser.error(f"--width {args.width}: the drawing needs at least 40 columns")
    if args.processes is not None and args.processes < 1:
        parser.error(f"--processes {args.processes}: at least one is needed")
    processes = processes_of(parser, args)
    config = load_from(args)
    asked = asked_of(parser, args, processes or default_processes(config.parallel))
    ledger = read_ledger(args.ledger) if args.ledger else None
    layout, misfit = _layout(config, processes, asked is not None)
    run = resolve_run(config, ledger=ledger, allow_lr_change=args.allow_lr_change, layout=layout)
    plan = plan_of(run, config.stages, config.train.tokens)
    plan["layout"], refused = (None, misfit) if misfit else _plan_layout(config, run, processes)
    if asked is not None:
        from megatron.commands.plan_hardware import hardware_part

        plan["hardware"] = hardware_part(config, run, plan, _vocabulary(config.tokenizer.path), asked)
    plan["warnings"] = [*refused, *warnings_of(plan, config.tokenizer.path, _has_sentinels(config, plan))]
    written = _draw(args, config.run.name, run, plan)
    if args.json:
        print(json.dumps(plan, indent=2))
        return 0
    console = console_for_tables(args.width)
    show_plan(config.run.name, run, plan, console, args.width, args.detail)
    if asked is not None:
        from megatron.commands.plan_hardware_tables import show_hardware

        show_hardware(plan["hardware"], console)
    for path in written:
        print(f"{path}: {format_count(path.stat().st_size)}B")
    return 0


def _layout(config: RunConfig, processes: int | None, search: bool) -> tuple[Layout | None, list[dict[str, Any]]]:
    """The layout where the processes are known; and, where another one will be looked for, why there is none."""
    if processes is None:
        return None, []
    try:
        return resolve_layout(config.parallel, processes), []
    except ConfigError as error:
        if not search:
            raise
        return None, [_refused("layout", error)]


def _plan_layout(
    config: RunConfig, run: ResolvedRun, processes: int | None
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The layout's part of the plan, and what train will say of a [model] table that is no decoder and of [kernels]. A
    plan of the mixture needs none."""
    section, train = config.parallel, config.train
    count = processes or default_processes(section)
    # One process has no layout to show, and the tokenizer is not loaded for it.
    read = count > 1 or config.tokenizer.path == "bytes"
    vocabulary = config.model.vocab_size or (_vocabulary(config.tokenizer.path) if read else None)
    try:
        # One that every tensor size divides stands for a vocabulary that is not known yet.
        known = vocabulary or lcm(VOCABULARY_MULTIPLE, section.tensor)
        shape = resolve_model(config.model, known, max(stage.shapes.longest_sequence for stage in run.schedule.stages))
    except ConfigError as error:
        return None, [_refused("model", error)]
    batches = batches_of(run.schedule, config.model.seq_length if config.validation.fraction else None)
    layout = plan_layout(section, shape, train, config.optimizer, batches, processes, vocabulary is not None)
    refused = kernel_refusals(config.kernels, section, count, shape, train, train.precision)
    return layout, [_refused("kernels", error) for error in refused]


def _refused(what: str, error: ConfigError) -> dict[str, Any]:
    text = f"train will refuse the {what}: {error}"
    return {"gravity": "high", "kind": "train-refuses", "exit_code": error.exit_code, "text": text}


def _vocabulary(path: str) -> int | None:
    """A tokenizer's ids; it is loaded only where there is a layout to plan. None where it is not there yet."""
    if path != "bytes" and not Path(path).exists():
        return None
    from megatron.tokenizers.load import load_tokenizer

    return load_tokenizer(path).vocab_size


def _has_sentinels(config: RunConfig, plan: dict[str, Any]) -> bool:
    """Whether the tokenizer serves a plan with fill-in-the-middle. It is loaded for nothing else: a plan needs none."""
    path = config.tokenizer.path
    if not any(stage["fim"] for stage in plan["stages"]) or not (path == "bytes" or Path(path).exists()):
        return True
    from megatron.data.fim import sentinels_of
    from megatron.tokenizers.load import load_tokenizer

    return sentinels_of(load_tokenizer(path), config.tokenizer.fim) is not None


def _draw(args: argparse.Namespace, name: str, run: ResolvedRun, plan: dict[str, Any]) -> list[Path]:
    """Writes the files that were asked for. Their modules are imported only then: plan stays quick without."""
    written: list[Path] = []
    for path, suffix in ((args.html, ".html"), (args.png, ".png")):
        if path is not None and path.suffix != suffix:
            raise ConfigError(f"--{suffix[1:]} {path}: give a name that ends in {suffix}")
    if args.html is not None:
        from megatron.planner.plan_page import write_page

        written.append(write_page(args.html, name, run, plan))
    if args.png is not None:
        from megatron.planner.plan_picture import write_picture

        written.append(write_picture(args.png, name, run, plan))
    return written
