"""The engine on plain torch: one process or many, by whatever holds the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron.checkpoint.tensor_shards import TensorShards, TensorSource
from megatron.config.errors import CheckpointError
from megatron.config.schema import OptimizerSection
from megatron.engines.base import Bounds, LaunchedStep, MicrobatchLike, StepResult
from megatron.engines.graphed import Capture, GraphedMicrobatches, cuda_capture
from megatron.engines.held import (
    Held,
    MasterShards,
    check_names,
    fill,
    finish_gradients,
    of_all_tensors,
    squared_norm,
)
from megatron.engines.master_weights import MasterWeights
from megatron.engines.mesh_engine import MeshEngine, step_result
from megatron.engines.row_losses import RowLosses, valid_targets
from megatron.kernels.gradient_norm import clip_scale
from megatron.optim.build import (
    build_optimizer,
    check_state_names,
    flatten_state,
    load_state,
    squares_of,
    waits_for_no_numbers,
)
from megatron.optim.triton_adamw import TritonAdamW
from megatron.parallel.mesh import Mesh
from megatron.parallel.pipeline import Pipeline, Rows


class Weights(Protocol):
    """What holds the masters: `MasterWeights` for one process, `ShardedWeights` for many."""

    held: list[Held]
    modules: Sequence[nn.Module]

    def before_backward(self, last: bool) -> None:
        """Before each microbatch's forward pass; whether it is the step's last."""

    def collect(self) -> None:
        """After each microbatch's backward pass."""

    def copies(self) -> dict[str, Tensor]:
        """By key: narrow copies of the masters that compute."""

    def refresh(self, written: bool = False) -> None:
        """After the masters have changed. written: the optimizer has written the copies already."""

    def looked(self) -> None:
        """After weights were only looked at."""

    def drop_gradients(self) -> None:
        """Forgets all gradients."""


class TorchStep:
    """A step's numbers where they were computed; `result` brings them to the host, once.

    From a GPU they are copied at once, behind what computes them: `result` then waits for that copy, and not for all
    that has been launched since, the next step among it.
    """

    def __init__(
        self, table: RowLosses, grad_norm: Tensor, valid: int, ready: bool, bounds: Bounds | None = None
    ) -> None:
        """grad_norm: float64 of no dimension, on the table's device. ready: whether the host may wait for them here."""
        self.table, self.grad_norm, self.ready = table, grad_norm, ready
        self._valid, self._bounds = valid, bounds or Bounds()
        self._result: StepResult | None = None
        # Compared where the numbers are, once: a host that added up in another order could see the other side.
        self.beyond = (table.table[0].sum() / valid > self._bounds.loss) | (grad_norm > self._bounds.grad_norm)
        self._numbers = torch.cat((table.table.flatten(), torch.stack((grad_norm.double(), self.beyond.double()))))
        self._copied: torch.cuda.Event | None = None
        if self._numbers.is_cuda:
            on_host = torch.empty(self._numbers.shape, dtype=torch.float64, pin_memory=True)
            self._numbers = on_host.copy_(self._numbers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(table.table.device))

    def result(self) -> StepResult:
        """Losses by source, norm, and whether the update was made."""
        if self._result is None:
            if self._copied is not None:
                self._copied.synchronize()
            by_source = RowLosses(self._numbers[:-2].view(3, -1)).by_source()
            grad_norm, spike = self._numbers[-2:].tolist()
            loss = sum(total for total, _ in by_source.values()) / self._valid
            self._result = step_result(loss, by_source, grad_norm, self._valid, self._bounds, bool(spike))
        return self._result


class TorchEngine(MeshEngine):
    """Implements `Engine`."""

    def __init__(
        self,
        weights: Weights,
        optimizer: OptimizerSection,
        mesh: Mesh,
        whole: Mapping[str, Tensor],
        description: Mapping[str, str],
        pipeline: Pipeline | None = None,
        stays_on_device: bool | None = None,
    ) -> None:
        """whole: every parameter of the whole model by name, without memory. stays_on_device: whether a step is
        launched without waiting for its numbers; default on GPUs, with an optimizer that can.
        """
        super().__init__(mesh, whole, description)
        self._weights = weights
        self._section = optimizer
        self._pipeline = pipeline
        self._model = weights.modules[0]
        # The two ends of a pipeline have a weight in common only where the head is tied and they are apart.
        apart = pipeline is not None and not pipeline.holds_both_ends
        self._tied_apart = apart and "head.weight" not in whole
        # Elementwise updates need no whole tensors; a shard without elements needs no update.
        self._updated = {item.key: item.local for item in weights.held if item.local.numel()}
        cut = {item.key for item in weights.held if tuple(item.local.shape) != item.shape}
        self._optimizer = build_optimizer(self._updated, optimizer, cut)
        self._writes_copies = isinstance(self._optimizer, TritonAdamW) and bool(copies := weights.copies())
        if self._writes_copies:
            self._optimizer.write_copies({self._updated[key]: copy for key, copy in copies.items()})
        lows = {item.local: item.low for item in weights.held if item.low is not None}
        if lows:
            if not isinstance(self._optimizer, TritonAdamW):
                raise ValueError("only TritonAdamW steps masters that are kept in halves")
            self._optimizer.in_halves(lows)
        self._graphs: GraphedMicrobatches | None = None
        self._squares = squares_of(optimizer) or of_all_tensors
        self._checked = False
        if stays_on_device is None:
            stays_on_device = mesh.device.type == "cuda" and waits_for_no_numbers(optimizer)
        self._stays_on_device = stays_on_device

    def launch_step(
        self, microbatches: Sequence[MicrobatchLike], lr: float, bounds: Bounds | None = None
    ) -> LaunchedStep:
        """One update from the mean loss over the valid targets of the global batch."""
        valid = valid_targets(self._mesh, [m.targets for m in microbatches])
        if valid == 0:
            return self._nothing_to_learn(microbatches)
        losses = self._forward_backward(microbatches, 1 / valid)
        finish_gradients(self._weights.held, self._mesh, self._tied_apart)
        gradients = self._gradients()
        step = TorchStep(
            self._gather(microbatches, losses),
            squared_norm(gradients, self._weights.held, self._mesh, self._squares).sqrt(),
            valid,
            ready=not self._stays_on_device,
            bounds=bounds,
        )
        if self._stays_on_device:
            self._update_on_device(gradients, lr, step)
        elif not (result := step.result()).reason:
            self._clip(gradients, result.grad_norm)
            self._update(gradients, lr)
        self._weights.drop_gradients()
        return step

    def _forward_backward(self, microbatches: Sequence[MicrobatchLike], scale: float) -> Tensor | None:
        """Leaves gradients in the weights; each row's sum of losses, where the head is held."""
        placed = [self._place(microbatch) for microbatch in microbatches]
        if self._pipeline is not None:
            losses = self._pipeline.train(Rows.joined(placed), len(placed), scale)
            self._weights.collect()
            return losses
        parts = []
        for number, rows in enumerate(placed):
            if self._graphs is not None:
                parts.append(self._by_graph(rows, scale))
                continue
            self._weights.before_backward(last=number == len(placed) - 1)
            total, losses = self._run(rows, scale)
            total.sum().backward()
            self._weights.collect()
            parts.append(losses)
        return torch.cat(parts)

    def _by_graph(self, rows: Rows, scale: float) -> Tensor:
        assert self._graphs is not None and isinstance(self._weights, MasterWeights)
        losses, gradients = self._graphs(rows)
        self._weights.add(gradients, scale)
        return losses

    def use_graphs(self, capture: Capture = cuda_capture) -> None:
        """From now on microbatches run by CUDA graphs; only over masters with narrow copies, on one process."""
        assert isinstance(self._weights, MasterWeights) and self._pipeline is None
        self._graphs = GraphedMicrobatches(self._run, self._weights.computing(), capture)

    def _computing(self) -> Sequence[nn.Module]:
        return self._weights.modules

    def _looked(self) -> None:
        self._weights.looked()

    def model_state(self) -> TensorShards:
        """Master weights by name, the shards that this rank writes."""
        return MasterShards(item for item in self._weights.held if _to_write(item))

    def load_model_state(self, source: TensorSource) -> None:
        """Copies weights in; nothing is changed where anything does not fit."""
        check_names(self._whole, source)
        fill(self._weights.held, source)
        self._weights.refresh()

    def optimizer_state(self) -> TensorShards:
        """Flat, by "<parameter>/<key>"."""
        held = {item.key: item for item in self._weights.held}
        state = {}
        for place, tensor in flatten_state(self._optimizer, self._updated).items():
            key, field = place.rsplit("/", 1)
            item = held[key]
            if _to_write(item) and (tensor.ndim or not item.shape or item.begins):
                state[f"{item.name}/{field}"] = [item.shard(tensor)]
        return state

    def load_optimizer_state(self, source: TensorSource) -> None:
        """Takes over copies; a source without names resets."""
        names = list(source.names())
        check_state_names(names, self._whole, self._section)
        if not names:
            self.reset_optimizer()
            return
        tensors = {}
        fields: dict[str, list[str]] = {}
        for place in names:
            name, field = place.rsplit("/", 1)
            fields.setdefault(name, []).append(field)
        for item in self._weights.held:
            for field in fields.get(item.name, []) if item.local.numel() else []:
                tensors[f"{item.key}/{field}"] = _read(source, f"{item.name}/{field}", item)
        load_state(self._optimizer, self._updated, self._section, tensors)

    def reset_optimizer(self) -> None:
        """Forgets moments and steps."""
        self._optimizer.state.clear()

    def _gradients(self) -> dict[str, Tensor]:
        """Local gradients by key. One that is missing is a fault of the program: a schedule has lost it."""
        gradients = {item.key: item.gradient() for item in self._weights.held if item.local.numel()}
        if not self._checked and (missing := [key for key, gradient in gradients.items() if gradient is None]):
            raise RuntimeError(f"no gradient reached {', '.join(missing)}")
        self._checked = True
        return {key: gradient for key, gradient in gradients.items() if gradient is not None}

    def _update_on_device(self, gradients: Mapping[str, Tensor], lr: float, step: TorchStep) -> None:
        """Clips and updates without asking what the loss and the norm are: gradients are scaled as they are read, and
        everything stays as it was where `found_inf` is not 0."""
        scale, unusable = clip_scale(step.grad_norm.square(), self._section.clip_grad_norm)
        lost = step.table.table[0].sum().isfinite().logical_not()
        self._update(gradients, lr, scale.float(), torch.maximum(unusable, (lost | step.beyond).float()))

    def _clip(self, gradients: Mapping[str, Tensor], norm: float) -> None:
        bound = self._section.clip_grad_norm
        if 0 < bound < norm and gradients:
            torch._foreach_mul_(list(gradients.values()), bound / norm)

    def _update(
        self, gradients: Mapping[str, Tensor], lr: float, scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if isinstance(self._optimizer, TritonAdamW):
            given = {self._updated[key]: gradient for key, gradient in gradients.items()}
            self._optimizer.step(gradients=given, scale=scale, found_inf=found_inf)
        else:
            self._step_by_torch(gradients, scale, found_inf)
        self._weights.refresh(written=self._writes_copies)

    def _step_by_torch(self, gradients: Mapping[str, Tensor], scale: Tensor | None, found_inf: Tensor | None) -> None:
        if scale is not None:
            # torch's fused kernels divide by `grad_scale`
            optimizer: Any = self._optimizer
            optimizer.grad_scale, optimizer.found_inf = scale.reciprocal(), found_inf
        for part in _parts(gradients):
            for key, gradient in part:
                local = self._updated[key]
                local.grad = gradient.to(local.dtype)
            self._optimizer.step()
            for key, _ in part:
                self._updated[key].grad = None


_WIDENED = 1 << 26
"""Elements of narrow gradients that are widened at once for the optimizer: 256 MB of float32."""


def _parts(gradients: Mapping[str, Tensor]) -> Iterator[list[tuple[str, Tensor]]]:
    """Wide gradients all together, narrow ones a few at a time."""
    part: list[tuple[str, Tensor]] = []
    elements = 0
    for key, gradient in gradients.items():
        part.append((key, gradient))
        elements += gradient.numel() if gradient.dtype == torch.bfloat16 else 0
        if elements > _WIDENED:
            yield part
            part, elements = [], 0
    if part:
        yield part


def _to_write(item: Held) -> bool:
    return item.owned and item.local.numel() > 0


def _read(source: TensorSource, name: str, item: Held) -> Tensor:
    if not source.shape(name):
        return source.read(name, (), ())
    if source.shape(name) != item.shape:
        raise CheckpointError(
            f"optimizer state {name} is {list(source.shape(name))}, the model needs {list(item.shape)}"
        )
    return source.read(name, item.offset, tuple(item.local.shape))
