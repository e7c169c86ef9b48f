"""`stagemix average_checkpoints`: the mean of several checkpoints' weights, as one checkpoint."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron.config.errors import EXIT_DONE, ConfigError

EXAMPLE = """examples:
  stagemix average_checkpoints --output averages/soup --checkpoint runs/a --checkpoint runs/b
  stagemix average_checkpoints --output averages/late \\
      --checkpoint runs/a/checkpoints/step-000000900 --weight 2 --checkpoint runs/a/checkpoints/step-000000800
  stagemix train next.toml --resume-from averages/soup

The average is a whole checkpoint: of weights in the precision of the masters, summed in float64, and without optimizer
state. Step, data position (ledger, cursors), random states, config and tokenizer are those of the first checkpoint.
export_hf, evaluate, generate and ledger take it as any other. Training goes on from it
  by --resume-from, in a new run.output whose config begins as the first's does: the stage that comes next needs
    take = { optimizer = "fresh" } ; or
  by take = { weights = "averages/soup" } in a stage of any run.

--weight is of the --checkpoint before it: any positive number or fraction, 1 where it is left out; weights are divided
by their sum, exactly. The result depends on weights and values alone: neither on the order of the checkpoints nor on
the layouts that they were saved in. Imported models (import_hf) may be averaged with runs, behind one of a run.

exit codes: 0 done, 2 the checkpoints have no mean, or the output exists, 4 a checkpoint is missing or damaged,
            74 disk (then nothing is left)"""

_STEP = re.compile(r"step-(\d{9,})")


@dataclass
class Named:
    """A --checkpoint with its --weight."""

    path: Path
    weight: Fraction | None = None


class _Checkpoint(argparse.Action):
    """Begins a new entry."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        namespace.members = [*namespace.members, Named(values)]


class _Weight(argparse.Action):
    """Belongs to the entry before it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if not namespace.members:
            raise ConfigError(f"--weight {values}: stands before any --checkpoint: put it behind the one it is of")
        last = namespace.members[-1]
        if last.weight is not None:
            raise ConfigError(f"--checkpoint {last.path}: has two weights, {last.weight} and {values}: give one")
        last.weight = positive(values, last.path)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    built = argparse.ArgumentParser(
        prog="stagemix average_checkpoints",
        description="Averages the weights of checkpoints, tensor by tensor, into one checkpoint.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(built)
    return built


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.set_defaults(members=[])
    parser.add_argument("--output", type=Path, required=True, metavar="CHECKPOINT", help="the checkpoint to write")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        action=_Checkpoint,
        required=True,
        metavar="CHECKPOINT",
        help="a checkpoint's folder, or a run's for its newest whole one; at least two, the first gives the position",
    )
    parser.add_argument(
        "--weight",
        action=_Weight,
        metavar="NUMBER",
        help="of the --checkpoint before it; a positive decimal or fraction, default 1",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at --output")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    args = parser().parse_args(argv)
    named: list[Named] = args.members
    if len(named) < 2:
        raise ConfigError(f"--checkpoint {named[0].path}: is alone: an average needs at least two")
    # torch takes seconds to load: --help and a mistake in the words should not wait for it
    from megatron.checkpoint.aside import check_apart
    from megatron.checkpoint.averaged_members import open_members
    from megatron.checkpoint.averaging import whole_weights, write_average
    from megatron.checkpoint.weights_alone import check_free
    from megatron.commands.transfer_progress import shown

    check_free(args.output, args.overwrite)
    for one in named:
        check_apart(one.path, args.output, reads="--checkpoint")
    began = time.monotonic()
    weights = whole_weights([one.weight if one.weight is not None else 1 for one in named])
    print(f"averaging {len(named)} checkpoints to {args.output}", flush=True)
    members = open_members([one.path for one in named], weights, lambda words: print(words, file=sys.stderr))
    check_place(args.output, members.opened[0].ref.step, [one.ref.path for one in members.opened])
    lines = [
        f"  {Fraction(weight, sum(weights))} of {one.ref.path} (step {one.ref.step:,})"
        for one, weight in zip(members.opened, weights, strict=True)
    ]
    print("\n".join([*lines, *(f"  note: {note}" for note in members.notes)]), flush=True)
    with shown("average") as progress:
        write_average(args.output, members, overwrite=args.overwrite, progress=progress)
    word = str(members.dtype).removeprefix("torch.")
    print(f"summed in float64, kept in {word}, in {time.monotonic() - began:.1f} s: {args.output}")
    print("\n".join(_next(args.output, members.opened[0].trained)))
    return EXIT_DONE


def positive(words: str, path: Path) -> Fraction:
    """A weight, a decimal or a fraction, exactly. Raises ConfigError for what is no positive number."""
    try:
        value = Decimal(words) if "/" not in words else Fraction(words)
        usable = (isinstance(value, Fraction) or value.is_finite()) and value > 0
    except (InvalidOperation, ValueError, ZeroDivisionError):
        usable = False
    if not usable:
        raise ConfigError(f"--checkpoint {path}: --weight {words}: give a positive number, for example 2, 0.25 or 1/3")
    if isinstance(value, Decimal) and not -300 <= value.adjusted() <= 300:
        raise ConfigError(
            f"--checkpoint {path}: --weight {words}: is no weight beside others: leave it out, or all else"
        )
    return Fraction(value)


def check_place(output: Path, step: int, members: Sequence[Path]) -> None:
    """Raises ConfigError where the average would pass for a checkpoint of another step, or of a run that is there."""
    match = _STEP.fullmatch(output.name)
    if match is None:
        return
    if int(match.group(1)) != step:
        raise ConfigError(
            f"--output {output}: says step {int(match.group(1)):,}, and the average is of step {step:,}, as its first "
            f"checkpoint: call it step-{step:09d}, or any other name"
        )
    others = sorted(path.name for path in output.parent.glob("step-*") if path.name != output.name)
    if others:
        raise ConfigError(
            f"--output {output}: lies among checkpoints of a run ({others[-1]}), which would take it for its own: "
            "choose a folder outside it"
        )


def _next(output: Path, trained: bool) -> list[str]:
    place = shlex.quote(str(output))
    command = "stagemix {}" if Path(sys.argv[0]).name == "stagemix" else "python tools/{}.py"
    on = f'  {command.format("train")} NEXT.toml --resume-from {place}    # the next stage says optimizer = "fresh"'
    return [
        "next:",
        f"  {command.format('export_hf')} --input {place} --output {place}-hf",
        *([on] if trained else []),
        f'  or in a stage of any run: take = {{ weights = "{output}" }}',
    ]
