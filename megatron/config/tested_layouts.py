"""The combinations of axes that were compared with one process (law T1). What is not listed here is refused.

`tests/layouts` runs every entry: those that cover each axis and engine in CI, all of them in `make soak`. Whoever adds
a row adds the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

from megatron.config.layout import Layout
from megatron.config.schema import ParallelSection

TensorKind = Literal["", "tensor", "tensor with sequence"]
DataKind = Literal["", "none", "optimizer", "gradients", "full"]
ScheduleKind = Literal["", "1f1b", "interleaved", "zero-bubble", "zbv"]
Engine = Literal["torch", "deepspeed"]


@dataclass(frozen=True)
class Combination:
    """Which axes a layout has, whatever their sizes.

    tensor, context, schedule: "" or False where the axis has one rank. data: `parallel.data_shard` where there are
    data ranks, "none" where only context ranks add up their gradients, "" where no others do. replicated:
    `parallel.data_replicate` above 1.
    """

    engine: Engine = "torch"
    tensor: TensorKind = ""
    context: bool = False
    schedule: ScheduleKind = ""
    data: DataKind = ""
    replicated: bool = False
    offload: bool = False

    def words(self) -> str:
        """For people: "tensor with sequence x pipeline (1f1b) x data_shard full on torch"."""
        parts = [self.tensor, "context" if self.context else "", f"pipeline ({self.schedule})" if self.schedule else ""]
        if self.data:
            parts.append(f"data_shard {self.data}" + (" with data_replicate" if self.replicated else ""))
        parts.append("offload" if self.offload else "")
        return f"{' x '.join(filter(None, parts)) or 'one process'} on {self.engine}"

    def smallest(self) -> tuple[ParallelSection, int]:
        """A `[parallel]` section with two ranks on each of its axes, and its number of processes."""
        tensor, context, pipeline = (2 if there else 1 for there in (self.tensor, self.context, self.schedule))
        data = 4 if self.replicated else 1 if self.data in ("", "none") and self.context else 2 if self.data else 1
        section = ParallelSection(
            engine=self.engine,
            tensor=tensor,
            sequence=self.tensor == "tensor with sequence",
            context=context,
            pipeline=pipeline,
            schedule=self.schedule or "1f1b",
            data_shard=self.data or "none",
            data_replicate=2 if self.replicated else 1,
            offload="optimizer" if self.offload else "none",
        )
        return section, tensor * context * pipeline * data


def combination_of(section: ParallelSection, layout: Layout) -> Combination:
    """What a layout combines."""
    shares = layout.shard > 1 or section.offload != "none"
    several = layout.data > 1 or layout.context > 1
    return Combination(
        engine=section.engine,
        tensor="" if layout.tensor == 1 else "tensor with sequence" if section.sequence else "tensor",
        context=layout.context > 1,
        schedule="" if layout.pipeline == 1 else section.schedule,
        data=section.data_shard if shares else "none" if several else "",
        replicated=section.data_shard != "none" and layout.replicate > 1,
        offload=section.offload != "none",
    )


_TENSOR: tuple[TensorKind, ...] = ("", "tensor", "tensor with sequence")
_SCHEDULES: tuple[ScheduleKind, ...] = ("1f1b", "interleaved")
_SHARDS: tuple[DataKind, ...] = ("optimizer", "gradients", "full")


def _every(
    engine: Engine = "torch",
    tensor: tuple[TensorKind, ...] = ("",),
    schedule: tuple[ScheduleKind, ...] = ("",),
    data: tuple[DataKind, ...] = ("",),
    **rest: bool,
) -> tuple[Combination, ...]:
    kinds = product(tensor, schedule, data)
    return tuple(Combination(engine, tensor=one, schedule=order, data=shard, **rest) for one, order, shard in kinds)


TESTED: tuple[Combination, ...] = (
    # every tensor kind x schedule x way to shard; full shard not where input and weight gradients are apart
    *_every(tensor=_TENSOR, schedule=("", *_SCHEDULES), data=("", "none", *_SHARDS)),
    *_every(tensor=_TENSOR, schedule=("zero-bubble", "zbv"), data=("", "none", "optimizer", "gradients")),
    # context with each of them, and all four axes on 16 ranks
    *_every(tensor=_TENSOR, schedule=("", *_SCHEDULES), data=("none",), context=True),
    *_every(tensor=_TENSOR, data=_SHARDS, context=True),
    *_every(schedule=_SCHEDULES, data=_SHARDS, context=True),
    *_every(tensor=("tensor with sequence",), schedule=_SCHEDULES, data=("optimizer", "full"), context=True),
    # replicas of shards
    *_every(
        tensor=("", "tensor with sequence"),
        schedule=("", *_SCHEDULES),
        data=("optimizer", "full"),
        replicated=True,
    ),
    *_every("deepspeed", tensor=_TENSOR, data=("", "none", *_SHARDS)),
    *_every("deepspeed", tensor=_TENSOR, schedule=_SCHEDULES, data=("", "none", "optimizer")),
    *_every("deepspeed", tensor=("", "tensor with sequence"), data=("none", *_SHARDS), context=True),
    *_every("deepspeed", data=_SHARDS, offload=True),
)
