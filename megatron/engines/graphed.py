"""Forward and backward passes of a microbatch as one CUDA graph, for small models whose kernels end before the next is
launched.

A graph is recorded for each shape of rows and replayed on memory of its own: rows are copied in, losses copied out.
What changes from step to step must not be recorded, so the loss is recorded as a plain sum, and gradients are scaled
where they are added to the masters'. Recorded are masks for any documents, since a graph cannot choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron.kernels.document_lengths import DocumentBounds
from megatron.parallel.pipeline import Rows

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""(a call that launches work) -> (what launches the same again on the same memory, what the call gave)."""
Run = Callable[[Rows, float], tuple[Tensor, Tensor]]
"""(rows, scale) -> (scale x the sum of losses [1], each row's sum of losses [n])."""


def cuda_capture(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Records a call after three that make what is made once (torch's notes on CUDA graphs, whole-network capture)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = call()
    return graph.replay, given


@dataclass(frozen=True)
class _Recorded:
    rows: Rows
    replay: Callable[[], None]
    losses: Tensor
    gradients: list[Tensor]


class GraphedMicrobatches:
    """Runs microbatches by graphs. parameters: those that compute; their `.grad` is free for the recording."""

    def __init__(self, run: Run, parameters: Sequence[nn.Parameter], capture: Capture = cuda_capture) -> None:
        self._run, self._parameters, self._capture = run, parameters, capture
        self._recorded: dict[tuple[int, ...], _Recorded] = {}

    def __call__(self, rows: Rows) -> tuple[Tensor, list[Tensor]]:
        """(each row's sum of losses, gradients of the sum of all losses by parameter). The gradients lie in the graph's
        memory until the next call.
        """
        key = tuple(rows.tokens.shape)
        if key not in self._recorded:
            self._recorded[key] = self._record(rows)
        found = self._recorded[key]
        for name in ("tokens", "targets", "document_ids", "sample_numbers"):
            getattr(found.rows, name).copy_(getattr(rows, name), non_blocking=True)
        found.replay()
        return found.losses.clone(), found.gradients

    def _record(self, rows: Rows) -> _Recorded:
        batch, length = rows.tokens.shape
        own = Rows(*(tensor.clone() for tensor in (rows.tokens, rows.targets, rows.document_ids, rows.sample_numbers)))
        own = replace(own, bounds=DocumentBounds(batch * length, length))  # documents anywhere

        def call() -> Tensor:
            for parameter in self._parameters:
                parameter.grad = None
            total, losses = self._run(own, 1.0)
            total.sum().backward()
            return losses

        replay, losses = self._capture(call)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if len(gradients) != len(self._parameters):
            raise RuntimeError("no gradient reached some parameters while a CUDA graph was recorded")
        for parameter in self._parameters:
            parameter.grad = None
        return _Recorded(own, replay, losses, gradients)
