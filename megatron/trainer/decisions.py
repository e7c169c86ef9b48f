"""What all ranks do after a step, from what each of them was asked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron.launch.attempts import SAVE_NOW, STOP_NOW, WALL_TIME


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a step. stop: why the run stops, a signal's name, "stop-now" or "wall time"; empty: it
    goes on. save: a checkpoint was asked for."""

    stop: str = ""
    save: bool = False


def reasons_of(signal_names: Sequence[str]) -> tuple[str, ...]:
    """What a process may be asked by, the one that counts first: who is told to stop for good must not be requeued."""
    return (STOP_NOW, *dict.fromkeys(signal_names), WALL_TIME, SAVE_NOW)


def decision_of(asked: Collection[str], reasons: Sequence[str]) -> Decision:
    """What follows from all that was asked."""
    stop = next((reason for reason in reasons if reason in asked and reason != SAVE_NOW), "")
    return Decision(stop, SAVE_NOW in asked)
