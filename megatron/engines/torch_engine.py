"""The engine on plain torch: one process or many, by whatever holds the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron.checkpoint.tensor_shards import TensorShards, TensorSource
from megatron.config.errors import CheckpointError
from megatron.config.schema import OptimizerSection
from megatron.engines.base import MicrobatchLike, StepResult
from megatron.engines.held import Held, check_names, fill, finish_gradients, squared_norm
from megatron.engines.mesh_engine import MeshEngine, not_finite
from megatron.engines.row_losses import valid_targets
from megatron.optim.build import build_optimizer, check_state_names, flatten_state, load_state
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

    def refresh(self) -> None:
        """After the masters have changed, or weights were only looked at."""

    def drop_gradients(self) -> None:
        """Forgets all gradients."""


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
    ) -> None:
        """whole: every parameter of the whole model by name, without memory."""
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
        self._checked = False

    def train_step(self, microbatches: Sequence[MicrobatchLike], lr: float) -> StepResult:
        """One update from the mean loss over the valid targets of the global batch."""
        valid = valid_targets(self._mesh, [m.targets for m in microbatches])
        if valid == 0:
            return self._nothing_to_learn(microbatches)
        losses = self._forward_backward(microbatches, 1 / valid)
        finish_gradients(self._weights.held, self._mesh, self._tied_apart)
        gradients = self._gradients()
        by_source = self._gather(microbatches, losses).by_source()
        loss = sum(total for total, _ in by_source.values()) / valid
        grad_norm = float(squared_norm(gradients, self._weights.held, self._mesh).sqrt())
        reason = not_finite(loss, grad_norm)
        if not reason:
            self._clip(gradients, grad_norm)
            self._update(gradients, lr)
        self._weights.drop_gradients()
        return StepResult(loss, by_source, grad_norm, valid, not reason, reason)

    def _forward_backward(self, microbatches: Sequence[MicrobatchLike], scale: float) -> Tensor | None:
        """Leaves gradients in the weights; each row's sum of losses, where the head is held."""
        placed = [self._place(microbatch) for microbatch in microbatches]
        if self._pipeline is not None:
            losses = self._pipeline.train(Rows.joined(placed), len(placed), scale)
            self._weights.collect()
            return losses
        parts = []
        for number, rows in enumerate(placed):
            self._weights.before_backward(last=number == len(placed) - 1)
            total, losses = self._run(rows, scale)
            total.sum().backward()
            self._weights.collect()
            parts.append(losses)
        return torch.cat(parts)

    def _computing(self) -> Sequence[nn.Module]:
        return self._weights.modules

    def _looked(self) -> None:
        self._weights.refresh()

    def model_state(self) -> TensorShards:
        """Master weights by name, the shards that this rank writes."""
        return {item.name: [item.shard(item.local)] for item in self._weights.held if _to_write(item)}

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

    def _clip(self, gradients: Mapping[str, Tensor], norm: float) -> None:
        bound = self._section.clip_grad_norm
        if 0 < bound < norm and gradients:
            torch._foreach_mul_(list(gradients.values()), bound / norm)

    def _update(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        for key, local in self._updated.items():
            local.grad = gradients[key]
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        for local in self._updated.values():
            local.grad = None
        self._weights.refresh()


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
