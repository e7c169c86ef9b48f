"""The weighted mean of checkpoints, as a checkpoint: weights alone, with the data position of the first.

Means are taken in float64, a few megabytes at a time. They depend on the members' values and weights alone: neither on
the order in which members are named, nor on the layouts that they were saved in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from math import gcd, lcm, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.averaged_members import AVERAGED, Members, OpenMember
from megatron.checkpoint.finite import is_finite
from megatron.checkpoint.imported import FORMAT, ORIGIN
from megatron.checkpoint.room import check_room
from megatron.checkpoint.tensor_files import raw_bytes
from megatron.checkpoint.weights_alone import write_weights_alone
from megatron.config.errors import CheckpointError
from megatron.config.version import VERSION
from megatron.data.ledger import Ledger
from megatron.data.ledger_events import averaged_event

_EXACT = 2**29
"""Whole weights up to this, times a float32, are exact in float64."""


def whole_weights(weights: Sequence[Fraction | Decimal | int]) -> tuple[int, ...]:
    """The smallest whole numbers in the same proportion; each one's share is itself over their sum, exactly."""
    exact = [Fraction(weight) for weight in weights]
    common = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * common) for weight in exact]
    return tuple(weight // gcd(*whole) for weight in whole)


class AveragedTensors:
    """A TensorSource: sum_i w_i x_i / sum_i w_i of the members' tensors, in float64, rounded once to `dtype`.

    For one thread; it has threads of its own, which read members side by side.
    """

    def __init__(self, members: Sequence[OpenMember], weights: Sequence[int], dtype: torch.dtype) -> None:
        """weights: as `whole_weights` gives them, one for each member."""
        self._members = list(members)
        self._dtype = dtype
        self._sources = [member.ref.model() for member in members]
        self._pool = ThreadPoolExecutor(max_workers=min(8, len(members)), thread_name_prefix="reader of a member")
        whole = sum(weights)
        exact = max(weights) <= _EXACT
        self._factors = [float(weight if exact else Fraction(weight, whole)) for weight in weights]
        self._divisor = float(whole) if exact else 1.0

    def names(self) -> Iterable[str]:
        """Every name."""
        return self._sources[0].names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self._sources[0].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The same for all."""
        return self._dtype

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The mean of a box, on the CPU. Raises CheckpointError for values of a member that are not finite."""
        boxes = list(self._pool.map(lambda source: source.read(name, offset, shape).to(self._dtype), self._sources))
        for member, box in zip(self._members, boxes, strict=True):
            if not is_finite(box):
                raise CheckpointError(
                    f"{member.ref.path}: tensor {name} holds NaN or infinity: leave this checkpoint out of the average"
                )
        # Sums round, so their order must follow from the values: by weight, then by the boxes' bytes.
        order = sorted(range(len(boxes)), key=lambda one: (self._factors[one], bytes(raw_bytes(boxes[one]))))
        total = torch.zeros(tuple(shape), dtype=torch.float64)
        for one in order:
            # apart: whether one instruction does both would depend on where in the box a value lies
            total.add_(boxes[one].double().mul_(self._factors[one]))
        return total.div_(self._divisor).to(self._dtype)

    def close(self) -> None:
        """Ends its threads."""
        self._pool.shutdown()


def write_average(
    output: Path,
    members: Members,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes the checkpoint `output`, whole or not at all: averaged weights, no optimizer state; data position, random
    states, config and tokenizer of the first member.

    Raises as `write_weights_alone` does; CheckpointError where a member has changed since it was opened.
    """
    first = members.opened[0]
    source = AveragedTensors(members.opened, members.weights, members.dtype)
    size = sum(prod(source.shape(name)) for name in source.names()) * members.dtype.itemsize
    taken = [name for name in first.files if name == "config.toml" or name.startswith("tokenizer/")]
    if first.trained:
        taken.append("rng.safetensors")
    try:
        return write_weights_alone(
            output,
            source,
            first.ref.step,
            lambda: averaged_state(members),
            {name: first.ref.path / name for name in taken},
            overwrite=overwrite,
            before=lambda aside: check_room(aside, size, "the average"),
            progress=progress,
        )
    finally:
        source.close()


def averaged_state(members: Members) -> dict[str, Any]:
    """state.json of the average: the first member's, with "averaged": what it was made of, also an event of the ledger.

    An average of imported models alone is an imported model.
    """
    first = members.opened[0]
    rows = [
        {**member.record(), "weight": str(weight), "share": str(Fraction(weight, sum(members.weights)))}
        for member, weight in zip(members.opened, members.weights, strict=True)
    ]
    record = {"members": rows, "sums": "float64", "weights": str(members.dtype).removeprefix("torch.")}
    state = {**first.ref.state, "format": FORMAT, "version": VERSION, AVERAGED: record}
    if not first.trained:
        origin = first.ref.state[ORIGIN]
        names = ", ".join(_name_of(member) for member in members.opened)
        return {**state, ORIGIN: {**_without_files(origin), "kind": "average", "folder": f"the average of {names}"}}
    ledger = Ledger.from_json(first.ref.state["data"])
    short = [{key: row[key] for key in ("path", "step", "share", "manifest")} for row in rows]
    stage = str(first.ref.state.get("training_stage", ""))
    ledger.events.append(averaged_event(stage, first.ref.step, ledger.consumed_samples, short))
    data = {**first.ref.state["data"], "events": ledger.events}
    return {**state, "data": data, "skipped_in_row": 0}


def _name_of(member: OpenMember) -> str:
    """An imported model's, for people."""
    origin = member.ref.state[ORIGIN]
    return str(origin.get("folder") or origin.get("name") or member.ref.path.name)


def _without_files(origin: Mapping[str, Any]) -> dict[str, Any]:
    """What is true of the average, too: checksums of files are those of one member."""
    return {key: value for key, value in origin.items() if key != "files"}
