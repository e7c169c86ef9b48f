"""Pipeline parallelism: the layers of a model shared out over ranks, scheduled by torch.distributed.pipelining.

Every rank of the pipeline axis is given the same microbatches. Hidden states travel between stages; what a stage needs
besides (documents, targets, sample numbers) it takes from its own copy of the microbatch.

What a rank holds of what travels is what is in flight (`pipeline_stage.py`).

Shapes are declared before the first step, so that torch need not find them by an extra forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from megatron.kernels.document_lengths import DocumentBounds
from megatron.parallel.axis import Axis
from megatron.parallel.pipeline_stage import InFlightStage, make_stage

SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


@dataclass(frozen=True)
class Rows:
    """Samples side by side: tokens, targets, document_ids [n, T], sample_numbers [n]. bounds: of the documents of any
    one microbatch in it, where they were counted before the rows were copied to a device."""

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor
    sample_numbers: Tensor
    bounds: DocumentBounds | None = None

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of several microbatches, one after the other."""
        tensors = [field.name for field in fields(cls) if field.name != "bounds"]
        counted = [part.bounds for part in parts if part.bounds is not None]
        bounds = None
        if counted and len(counted) == len(parts):
            bounds = DocumentBounds(max(b.documents for b in counted), max(b.longest for b in counted))
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in tensors), bounds=bounds)


@dataclass(frozen=True)
class StageShape:
    """How hidden states travel between stages: width, dtype, and how many ranks share a row's positions."""

    hidden_size: int
    dtype: torch.dtype
    sequence_ranks: int

    def hidden(self, batch: int, length: int, device: torch.device | str) -> Tensor:
        """An unset tensor as one microbatch's hidden states between stages, [batch, T / sequence ranks, hidden]."""
        return torch.empty(batch, length // self.sequence_ranks, self.hidden_size, dtype=self.dtype, device=device)


class Pipeline:
    """This rank's stages of a pipelined model, to be trained or only run.

    modules: stage modules held here, Decoder or wrapped; numbers: their stage numbers, ascending; owners: for every
    stage of the whole pipeline, the pipeline rank that holds it.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        numbers: Sequence[int],
        owners: Sequence[int],
        axis: Axis,
        schedule: str,
        shape: StageShape,
        device: torch.device,
    ) -> None:
        self._modules = dict(zip(numbers, modules, strict=True))
        self._owners = tuple(owners)
        self._axis = axis
        self._schedule_name = schedule
        self._shape = shape
        self._device = device
        self._built: tuple[tuple[int, int, int], Any, list[PipelineStage]] | None = None

    @property
    def holds_last(self) -> bool:
        """Whether the head is on this rank."""
        return len(self._owners) - 1 in self._modules

    @property
    def holds_both_ends(self) -> bool:
        """Whether this pipeline's embedding and head are on one rank, as in a V."""
        return self._owners[0] == self._owners[-1]

    def train(self, rows: Rows, microbatches: int, scale: float) -> Tensor | None:
        """Forward and backward of all rows; gradients of scale x the sum of losses are left in the modules.

        Returns each row's sum of losses, float64 [n], where the head is held; else None.
        """
        schedule, stages = self._schedule(microbatches, rows.tokens.shape[0] // microbatches, rows.tokens.shape[1])
        inputs = (rows.tokens,) if 0 in self._modules else ()
        given = {"document_ids": rows.document_ids, "sample_numbers": rows.sample_numbers, "targets": rows.targets}
        # Not among what is given: up to torch 2.11 split backward passes take tensors only.
        for module in self._modules.values():
            module.scale, module.bounds = scale, rows.bounds  # type: ignore[assignment]
        target = {"target": rows.targets} if self.holds_last else {}
        outputs = schedule.step(*inputs, **target, **given)
        for stage in stages:
            if isinstance(stage, InFlightStage):
                stage.finish()
        return None if outputs is None else outputs[1].detach()

    def _schedule(self, microbatches: int, batch: int, length: int) -> tuple[Any, list[PipelineStage]]:
        """A schedule serves one shape; a training stage of another sequence length needs another."""
        key = (microbatches, batch, length)
        if self._built is None or self._built[0] != key:
            self._built = None  # what served another shape goes first
            stages = [self._stage(number, batch, length) for number in self._modules]
            kind = SCHEDULES[self._schedule_name]
            held = stages[0] if kind is Schedule1F1B else stages
            self._built = key, kind(held, microbatches, loss_fn=_total, scale_grads=False), stages
        return self._built[1], self._built[2]

    def _stage(self, number: int, batch: int, length: int) -> PipelineStage:
        count = len(self._owners)
        hidden = self._shape.hidden(batch, length, "meta").requires_grad_()
        tokens = torch.empty(batch, length, dtype=torch.int64, device="meta")
        wide = torch.float64 if self._shape.dtype == torch.float64 else torch.float32
        total = torch.empty(1, dtype=wide, device="meta").requires_grad_()
        losses = torch.empty(batch, dtype=torch.float64, device="meta")
        return make_stage(
            SCHEDULES[self._schedule_name],
            self._modules[number],
            number,
            count,
            self._device,
            self._axis.group,
            inputs=(tokens if number == 0 else hidden,),
            outputs=(total, losses) if number == count - 1 else (hidden,),
        )

    @torch.no_grad()
    def evaluate(self, rows: Rows) -> Tensor | None:
        """Forward only, of one microbatch; each row's sum of losses, float64 [n], where the head is held.

        Stages pass hidden states on in order: while a later stage computes, an earlier one is at the next microbatch.
        """
        hidden: Tensor | None = None
        losses: Tensor | None = None
        for module in self._modules.values():
            module.bounds = rows.bounds  # type: ignore[assignment]
        for number, owner in enumerate(self._owners):
            if owner != self._axis.rank:
                continue
            hidden = self._arriving(number, rows, hidden)
            output = self._modules[number](
                hidden,
                document_ids=rows.document_ids,
                targets=rows.targets,
                scale=1.0,
                sample_numbers=rows.sample_numbers,
            )
            if number == len(self._owners) - 1:
                losses = output[1]
            else:
                hidden = output
                if self._owners[number + 1] != owner:
                    dist.send(output.contiguous(), group=self._axis.group, group_dst=self._owners[number + 1])
        return losses

    def _arriving(self, number: int, rows: Rows, held: Tensor | None) -> Tensor:
        if number == 0:
            return rows.tokens
        if self._owners[number - 1] == self._axis.rank:
            assert held is not None
            return held
        arriving = self._shape.hidden(rows.tokens.shape[0], rows.tokens.shape[1], self._device)
        dist.recv(arriving, group=self._axis.group, group_src=self._owners[number - 1])
        return arriving


def _total(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """The last stage has computed its loss already: (scale x the sum [1], each row's sum)."""
    return output[0].sum()
