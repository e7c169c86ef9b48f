"""An action of `stagemix study`: what it is told, and what it does. Each has a file; `study.py` lists them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from megatron.study.plan import PlannedStudy, plan_study


@dataclass(frozen=True)
class Action:
    """line: for the overview · arguments: adds its own beside STUDY · run: gives the exit code, raises StagemixError ·
    chooses: whether --arm and --seeds choose a part of the study."""

    line: str
    epilog: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    chooses: bool = True


def choice_arguments(one: argparse.ArgumentParser) -> None:
    """--arm and --seeds."""
    one.add_argument(
        "--arm", action="append", default=[], metavar="NAME", help="an arm, or a pattern of arms; may be given again"
    )
    seeds_argument(one)


def seeds_argument(one: argparse.ArgumentParser) -> None:
    """--seeds."""
    one.add_argument("--seeds", type=_seeds, default=[], metavar="1,2,3", help="these instead of study.seeds")


def planned_study(args: argparse.Namespace) -> PlannedStudy:
    """The study that the arguments name, with the arms and seeds that they choose. Raises ConfigError, DataError."""
    return plan_study(args.study, args.arm, args.seeds)


def _seeds(words: str) -> list[int]:
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{words!r}: give whole numbers with commas, for example 1,2,3") from None
