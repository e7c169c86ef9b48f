"""Part c: each kernel against the definition, torch.compile and the least time that its bytes or operations take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from gpu_ceilings import Ceilings, ceilings_of
from gpu_job import Context, Job, Taken, Timer, first_line, free_memory
from gpu_operations import (
    Inputs,
    Maker,
    NotHere,
    Operation,
    Sizes,
    Way,
    all_operations,
    copied,
    tensors_of,
    words_of_sizes,
)
from gpu_results import Row
from torch import Tensor

TITLE = "time of every kernel"
NOTES = (
    "Medians of CUDA events around the call, the L2 cache written over before each; milliseconds. limit: the larger of "
    "bytes over the copy's bandwidth and operations over the best bf16 product's rate, both from part a (bytes that "
    "must be moved, not those that an implementation moves; products in fp8 count half). share: limit over measured, "
    "of both passes together; against eager: how many times as quick. spread: between which two times four fifths of "
    "the forward calls lay."
)


def jobs(context: Context) -> Iterator[Job]:
    """First every operation at its first size."""
    turns = [
        (turn, operation, sizes)
        for operation in all_operations().values()
        for turn, sizes in enumerate(operation.dry if context.dry else operation.timed)
    ]
    timer = Timer(context.device)
    found: list[Ceilings] = []
    for _, operation, sizes in sorted(turns, key=lambda turn: turn[0]):
        yield Job(f"{operation.name}, {words_of_sizes(sizes)}", partial(_time, context, timer, found, operation, sizes))


def _time(context: Context, timer: Timer, found: list[Ceilings], operation: Operation, sizes: Sizes) -> Sequence[Row]:
    """A row for every way."""
    if not found:
        found.append(ceilings_of(context))
    dtype = operation.dtypes[0]
    generator = torch.Generator(context.device).manual_seed(context.seed)
    inputs = operation.inputs(sizes, Maker(context.device, dtype, generator))
    limits = operation.traffic(sizes, dtype.itemsize).limits(found[0].copy, found[0].gemm)
    rows: list[Row] = []
    eager: float | None = None
    for name, way in operation.ways.items():
        free_memory(context.device)
        begin = {"operation": operation.name, "sizes": words_of_sizes(sizes), "way": name}
        try:
            forward, backward = _passes(timer, way, copied(inputs))
        except NotHere as reason:
            rows.append(begin | {"not here": str(reason)})
        except torch.OutOfMemoryError as error:
            rows.append(begin | {"not here": first_line(error)})
        except Exception as error:  # the other ways are timed all the same
            rows.append(begin | {"failed": first_line(error)})
        else:
            figures = _figures(forward, backward, limits)
            eager = figures["both ms"] if name == "eager" else eager
            rows.append(begin | figures | {"against eager": f"{eager / figures['both ms']:.2f}" if eager else None})
    return rows


def _passes(timer: Timer, way: Way, inputs: Inputs) -> tuple[Taken, Taken | None]:
    """Seconds of the forward and of the backward pass, if it has one. The backward pass runs many times over one
    graph, which a compiled one refuses unless it is told."""
    _keep_graphs()
    call = way(inputs)
    forward = timer.seconds(call)
    outputs = [out for out in tensors_of(call()) if out.requires_grad]
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    if not outputs or not leaves:
        return forward, None
    upstream = [torch.ones_like(out) if out.ndim == 0 else torch.randn_like(out) for out in outputs]
    return forward, timer.seconds(lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True))


def _keep_graphs() -> None:
    import torch._functorch.config as config

    settings: Any = config
    settings.donated_buffer = False


def _figures(forward: Taken, backward: Taken | None, limits: tuple[float, float]) -> Row:
    both = 1e3 * (forward.median + (backward.median if backward else 0.0))
    limit = 1e3 * sum(limits)
    return {
        "forward ms": 1e3 * forward.median,
        "limit": 1e3 * limits[0],
        "backward ms": 1e3 * backward.median if backward else None,
        "its limit": 1e3 * limits[1] if backward else None,
        "both ms": both,
        "share": f"{limit / both:.0%}",
        "spread": f"{1e3 * forward.low:.3g} to {1e3 * forward.high:.3g}, {forward.calls} calls",
    }
