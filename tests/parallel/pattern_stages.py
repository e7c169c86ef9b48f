"""A pipeline whose hidden states, gradients and sums are whole numbers known beforehand, so that a buffer that is
written too early shows, and what it holds of what comes and goes.

Sample n enters stage s as 100 n + s everywhere and its gradient leaves as n + 1; each stage multiplies by a matrix that
is the identity and adds one. So a stage's weight has the gradient sum over n of T (n + 1) (100 n + s), exactly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import schedules
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from megatron.config.layout import resolve_layout
from megatron.config.partition import stage_count, stage_numbers
from megatron.config.schema import ParallelSection
from megatron.parallel import pipeline as pipeline_module
from megatron.parallel import pipeline_stage
from megatron.parallel.mesh import close_mesh, launched, open_mesh
from megatron.parallel.pipeline import Pipeline, Rows, StageShape
from megatron.parallel.pipeline_stage import InFlightStage

WIDTH = 4
wrong: list[str] = []
"""What a stage of this process met that was not the pattern."""


class _Looked(torch.autograd.Function):
    """Its input, which is looked at now and again in the backward pass, as is the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, stage: int) -> Tensor:
        ctx.save_for_backward(x, numbers)
        ctx.stage = stage
        _look("enters", stage, x, 100 * numbers + stage)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, numbers = ctx.saved_tensors
        _look("is kept", ctx.stage, x, 100 * numbers + ctx.stage)
        _look("comes back", ctx.stage, gradient, numbers + 1)
        return gradient, None, None


def _look(words: str, stage: int, found: Tensor, expected: Tensor) -> None:
    if not torch.equal(found, expected.to(found.dtype)[:, None, None].expand_as(found)):
        wrong.append(f"stage {stage}: what {words} is {found[:, 0, 0].tolist()}, not {expected.tolist()}")


class PatternStage(nn.Module):
    """Stage `number` of `count`, called as a Decoder is."""

    def __init__(self, number: int, count: int) -> None:
        super().__init__()
        self.number, self.last, self.scale = number, number == count - 1, 1.0
        self.weight = nn.Parameter(torch.eye(WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor, sample_numbers: Tensor, **_: Any) -> Any:
        if self.number == 0:  # tokens
            x = (100.0 * sample_numbers)[:, None, None].double().expand(*x.shape, WIDTH).clone()
        else:
            x = _Looked.apply(x, sample_numbers, self.number)
        out = functional.linear(x, self.weight) + 1
        if not self.last:
            return out
        losses = ((sample_numbers + 1)[:, None, None] * out).sum((1, 2))
        return losses.sum()[None] * self.scale, losses.detach()


@dataclass(frozen=True)
class Step:
    """microbatches of `batch` samples of so many positions. evaluated: samples that are validated on afterwards."""

    microbatches: int
    batch: int
    length: int
    evaluated: int = 0


@dataclass(frozen=True)
class Found:
    """wrong: words, of everything that was not as it should be. alive: tensors that were sent or received into and
    still there, at most, by step. kind: the class of the stages. warnings: what was warned of."""

    wrong: tuple[str, ...]
    alive: tuple[int, ...]
    kind: str
    warnings: tuple[str, ...]


def run_pattern(section: ParallelSection, steps: tuple[Step, ...], plant: Callable[[int], None] | None = None) -> Found:
    """The body of a rank. plant: is given the pipeline rank before the first step, and makes something go wrong."""
    wrong.clear()
    mesh = open_mesh(resolve_layout(section, section.pipeline), launched(), 60)
    if plant is not None:
        plant(mesh.pipeline.rank)
    count = stage_count(section)
    owners = [0] * count
    for rank in range(section.pipeline):
        for number in stage_numbers(section, rank):
            owners[number] = rank
    numbers = stage_numbers(section, mesh.pipeline.rank)
    modules = [PatternStage(number, count) for number in numbers]
    shape = StageShape(WIDTH, torch.float64, 1)
    pipeline = Pipeline(modules, numbers, owners, mesh.pipeline, section.schedule, shape, mesh.device)
    counter = Transit()
    alive = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        for step in steps:
            with counter:
                _train(pipeline, modules, step, count)
            alive.append(counter.most)
    assert pipeline._built is not None
    kind = type(pipeline._built[2][0]).__name__
    close_mesh()
    return Found(tuple(wrong), tuple(alive), kind, tuple(str(one.message) for one in warned))


def _rows(samples: int, length: int) -> Rows:
    tokens = torch.zeros(samples, length, dtype=torch.int64)
    return Rows(tokens, tokens, tokens.int(), torch.arange(samples))


def _train(pipeline: Pipeline, modules: list[PatternStage], step: Step, count: int) -> None:
    samples = step.microbatches * step.batch
    rows = _rows(samples, step.length)
    losses = pipeline.train(rows, step.microbatches, 1.0)
    n = rows.sample_numbers.double()
    if losses is not None and not torch.equal(losses, (n + 1) * (100 * n + count) * step.length * WIDTH):
        wrong.append(f"losses {losses.tolist()}")
    for module in modules:
        expected = float((step.length * (n + 1) * (100 * n + module.number)).sum())
        gradient = module.weight.grad
        if gradient is None or not torch.equal(gradient, torch.full_like(gradient, expected)):
            wrong.append(f"stage {module.number}: weight's gradient {gradient}, not {expected}")
        module.weight.grad = None
    for _ in range(step.evaluated):
        held_out = _rows(3, step.length + 2)
        losses, n = pipeline.evaluate(held_out), held_out.sample_numbers.double()
        if losses is not None and not torch.equal(losses, (n + 1) * (100 * n + count) * (step.length + 2) * WIDTH):
            wrong.append(f"validation's losses {losses.tolist()}")


class Transit:
    """Counts, at every message of a pipeline, what has been sent or received into and is still held by anybody."""

    def __init__(self) -> None:
        self.most = 0
        self._seen: dict[int, StorageWeakRef] = {}

    def __enter__(self) -> None:
        self.most, self._seen = 0, {}
        self._torchs = schedules._batch_p2p

        def counted(ops: list[dist.P2POp], *args: Any, **options: Any) -> Any:
            for op in ops:
                reference = StorageWeakRef(op.tensor.untyped_storage())
                self._seen[reference.cdata] = reference
            self._seen = {key: one for key, one in self._seen.items() if not one.expired()}
            self.most = max(self.most, len(self._seen))
            return self._torchs(ops, *args, **options)

        schedules._batch_p2p = counted

    def __exit__(self, *_: object) -> None:
        schedules._batch_p2p = self._torchs


@dataclass(frozen=True)
class Ring:
    """A plant: on one pipeline rank, `buffers` that hidden states are received into by turns."""

    rank: int
    buffers: int

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        rings: dict[tuple[int, tuple[int, ...]], Any] = {}
        fill = InFlightStage._fill

        def by_turns(stage: InFlightStage, infos: Any) -> None:
            if not any(infos is states for states in stage.args_recv_info.values()):  # gradients
                return fill(stage, infos)
            for info in infos:
                if info.buffer is not None and info.buffer.is_meta:
                    key = stage.stage_index, tuple(info.buffer.shape)
                    made = [stage._new(info.buffer).detach() for _ in range(self.buffers)]
                    info.buffer = next(rings.setdefault(key, cycle(made))).detach()

        InFlightStage._fill = by_turns  # type: ignore[method-assign]


def torchs_own_stages(rank: int) -> None:
    """A plant: nothing of this project's in the way."""
    pipeline_module.make_stage = _torchs  # type: ignore[assignment]


def _torchs(kind: Any, module: Any, number: int, count: int, device: Any, group: Any, inputs: Any, outputs: Any) -> Any:
    return schedules.PipelineStage(module, number, count, device, input_args=inputs, output_args=outputs, group=group)


def another_torch(rank: int) -> None:
    """A plant: torch's stage lacks a method that this project's answers."""
    pipeline_stage._OVERRIDDEN = (*pipeline_stage._OVERRIDDEN, "get_ops_by_another_name")
