"""A stage of torch's pipeline that holds only what is in flight.

torch.distributed.pipelining (2.11 to 2.14) allocates a buffer for the hidden states of every microbatch of a step and
one for their gradients, in each stage and for the whole run, and all schedules but 1f1b keep whatever they have sent
until the step ends. Memory then grows with the microbatches of a step, though no more of them are in flight than the
pipeline is deep.

Here torch is given descriptions of those buffers without memory. A receive gets a new tensor when it is posted, and the
stage lets go of it when the forward or backward pass that it is for has run: whoever still needs it (autograd, until
the last gradient) holds it, and nobody else. The order of actions, and of communication, is torch's own.

What was sent is held until its send has been waited for (which NCCL asks for: until then its stream may read it):

- Hidden states until the backward pass of their microbatch: their gradient has come back, so they have arrived, and the
  wait is over at once. They take no memory of their own until then, being the stage's output, which autograd holds.
- Gradients, which nothing answers, until `GRADIENTS_SENT` later ones have been sent.

Such a wait cannot deadlock: torch lays all ranks' actions out one after the other, each receive directly after its
send, and no rank waits for what lies behind its own next action. `tests/parallel/test_pipeline_order.py` plays it
through.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules

GRADIENTS_SENT = 2
"""Gradients of hidden states that a stage may have sent and not yet waited for."""

_OVERRIDDEN = (
    "_prepare_forward_infra",
    "_create_grad_recv_info",
    "get_fwd_recv_ops",
    "get_bwd_recv_ops",
    "get_fwd_send_ops",
    "get_bwd_send_ops",
    "forward_one_chunk",
    "backward_one_chunk",
    "clear_runtime_states",
)
"""What torch's schedules call of a stage, and this one answers."""
_FIELDS = ("args_recv_info", "grad_recv_info", "backward_state")
"""What torch's stage keeps by microbatch, and this one lets go of."""


class InFlightStage(PipelineStage):
    """torch's stage, with memory for what is in flight only. keeps_sends: whether its schedule keeps sends until the
    step's end (all but 1f1b, which waits for each), so that this stage makes them and waits for them itself; then
    `finish` must be called after every step.
    """

    def __init__(self, *args: Any, keeps_sends: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self._keeps_sends = keeps_sends
        self._states_sent: dict[int, list[dist.Work]] = {}
        self._gradients_sent: deque[list[dist.Work]] = deque()

    # Descriptions of what will be received.

    def _prepare_forward_infra(self, *args: Any, **options: Any) -> Any:
        if hasattr(PipelineStage, "_setup_forward_recv_info"):  # torch 2.13 has it apart
            return super()._prepare_forward_infra(*args, **options)
        with self._without_memory():
            return super()._prepare_forward_infra(*args, **options)

    def _setup_forward_recv_info(self, *args: Any, **options: Any) -> None:
        with self._without_memory():
            super()._setup_forward_recv_info(*args, **options)

    def _create_grad_recv_info(self, *args: Any, **options: Any) -> Any:
        with self._without_memory():
            return super()._create_grad_recv_info(*args, **options)

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        """torch makes buffers on the stage's device: for so long on the meta device."""
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    # Receiving.

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """What receives a microbatch's hidden states, into new memory."""
        self._fill(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """What receives the gradients of a microbatch's hidden states, into new memory."""
        self._fill(self.grad_recv_info.get(bwd_chunk_id, ()))
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _fill(self, infos: Iterable[Any]) -> None:
        for info in infos:
            buffer = getattr(info, "buffer", None)
            if buffer is not None and buffer.is_meta:
                info.buffer = self._new(buffer)

    def _new(self, described: Tensor) -> Tensor:
        return torch.empty_like(described, device=self.device, requires_grad=described.requires_grad)

    @staticmethod
    def _let_go(infos: Iterable[Any]) -> None:
        for info in infos:
            buffer = getattr(info, "buffer", None)
            if buffer is not None and not buffer.is_meta:
                info.buffer = torch.empty_like(buffer, device="meta", requires_grad=buffer.requires_grad)

    # Running.

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **options: Any) -> Any:
        """The forward pass of a microbatch. Autograd holds what it read of the hidden states that came in."""
        output = super().forward_one_chunk(fwd_chunk_id, *args, **options)
        self._let_go(self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """The backward pass of a microbatch, or the gradient of its input."""
        for work in self._states_sent.pop(bwd_chunk_id, ()):
            work.wait()
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        self._let_go(self.grad_recv_info.get(bwd_chunk_id, ()))
        if full_backward and loss is not None:
            # The schedule keeps losses until the step's end, and a loss its graph, whose leaf is the input.
            loss.detach_()
        state = self.backward_state.get(bwd_chunk_id)
        if state is not None and len(state) == 4 and not self.is_first:
            # Gradients of weights start from what the graph has kept. Only the first stage goes back to these.
            for value in state[0]:
                if isinstance(value, Tensor):
                    value.grad = None
            self.backward_state[bwd_chunk_id] = (*state[:3], None)

    # Sending.

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """What sends a microbatch's hidden states, for the schedule to do; nothing where it has been done here."""
        ops = super().get_fwd_send_ops(fwd_chunk_id)
        if not self._keeps_sends:
            return ops
        self._states_sent[fwd_chunk_id] = schedules._batch_p2p(ops)
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """What sends the gradients of a microbatch's hidden states, as above."""
        ops = super().get_bwd_send_ops(bwd_chunk_id)
        if not self._keeps_sends:
            return ops
        self._gradients_sent.append(schedules._batch_p2p(ops))
        while len(self._gradients_sent) > GRADIENTS_SENT or self._oldest_arrived():
            _wait(self._gradients_sent.popleft())
        return []

    def _oldest_arrived(self) -> bool:
        return bool(self._gradients_sent) and all(work.is_completed() for work in self._gradients_sent[0])

    def finish(self) -> None:
        """Waits for what is still being sent. torch does so at a step's end, too."""
        for works in self._states_sent.values():
            _wait(works)
        for works in self._gradients_sent:
            _wait(works)
        self._forget_sends()

    def clear_runtime_states(self) -> None:
        """Before a step: what an earlier one has left that did not end."""
        super().clear_runtime_states()
        for infos in (*self.args_recv_info.values(), *self.grad_recv_info.values()):
            self._let_go(infos)
        self._forget_sends()

    def _forget_sends(self) -> None:
        self._states_sent.clear()
        self._gradients_sent.clear()


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()


def make_stage(
    kind: Any,
    module: nn.Module,
    number: int,
    count: int,
    device: torch.device,
    group: dist.ProcessGroup | None,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
) -> PipelineStage:
    """A stage for a schedule of this kind. inputs, outputs: of one microbatch, on the meta device.

    Where torch is not built as this file expects, torch's own stage, with a warning: it computes the same, and holds
    all microbatches' buffers.
    """
    given: dict[str, Any] = {"input_args": inputs, "output_args": outputs, "group": group}
    missing = _missing(kind)
    if not missing:
        keeps = issubclass(kind, schedules._PipelineScheduleRuntime)
        return InFlightStage(module, number, count, device, keeps_sends=keeps, **given)
    warnings.warn(
        f"torch {torch.__version__}: its pipeline has no {', '.join(missing)}, so that memory cannot be held to the "
        "microbatches in flight: buffers to receive all microbatches of a step are allocated in every stage",
        stacklevel=2,
    )
    return PipelineStage(module, number, count, device, **given)


def _missing(kind: Any) -> list[str]:
    """What is not there of what is relied upon."""
    known = (schedules.Schedule1F1B, getattr(schedules, "_PipelineScheduleRuntime", ()))
    names = [f"PipelineStage.{name}" for name in _OVERRIDDEN if not hasattr(PipelineStage, name)]
    names += [
        f"schedules.{name}" for name in ("_batch_p2p", "_PipelineScheduleRuntime") if not hasattr(schedules, name)
    ]
    if not issubclass(kind, known):
        names.append(f"known way to run {kind.__name__}")
    return names
