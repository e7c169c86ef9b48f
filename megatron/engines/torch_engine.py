"""The engine on plain torch, one process: microbatches one after the other, then one update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron.config.errors import CheckpointError
from megatron.config.schema import OptimizerSection
from megatron.engines.base import MicrobatchLike, StepResult
from megatron.engines.master_weights import MasterWeights
from megatron.kernels.cross_entropy import IGNORED
from megatron.models.decoder import Decoder
from megatron.optim.build import build_optimizer, flatten_state, load_state


class TorchEngine:
    """Implements `Engine`. The model that it is given holds the master weights and lives on one device."""

    def __init__(
        self, model: Decoder, optimizer: OptimizerSection, compute_dtype: torch.dtype, description: Mapping[str, str]
    ) -> None:
        """compute_dtype: what forward and backward run in; masters keep the model's dtype."""
        self._weights = MasterWeights(model, compute_dtype)
        self._section = optimizer
        self._optimizer = build_optimizer(self._weights.parameters, optimizer)
        self._device = model.embedding.weight.device
        self._description = dict(description)
        self._checked = False

    def train_step(self, microbatches: Sequence[MicrobatchLike], lr: float) -> StepResult:
        """One update from the mean loss over the valid targets of all microbatches."""
        valid = sum(int((m.targets != IGNORED).sum()) for m in microbatches)
        if valid == 0:
            sources = {int(s): (0.0, 0) for m in microbatches for s in m.source_ids}
            return StepResult(0.0, sources, 0.0, 0, False, "no target of the batch is valid")
        tally = _Tally()
        for microbatch in microbatches:
            tokens, targets, documents = self._place(microbatch)
            total, losses = self._weights.model.training_loss(tokens, targets, documents, 1 / valid)
            total.backward()
            self._weights.collect()
            tally.add(losses, targets, microbatch.source_ids)
        self._assert_every_gradient()
        by_source = tally.result()
        loss = sum(total for total, _ in by_source.values()) / valid
        grad_norm = self._clip()
        reason = _not_finite(loss, grad_norm)
        if not reason:
            self._update(lr)
        self._weights.drop_gradients()
        return StepResult(loss, by_source, grad_norm, valid, not reason, reason)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[MicrobatchLike]) -> dict[int, tuple[float, int]]:
        """Source id -> (sum of losses, valid targets)."""
        tally = _Tally()
        for microbatch in microbatches:
            tokens, targets, documents = self._place(microbatch)
            tally.add(self._weights.model.loss(tokens, targets, documents), targets, microbatch.source_ids)
        return tally.result()

    def model_state(self) -> dict[str, Tensor]:
        """Master weights by name."""
        return {name: parameter.detach() for name, parameter in self._weights.parameters.items()}

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Copies weights in; nothing is changed where anything does not fit."""
        parameters = self._weights.parameters
        if missing := sorted(parameters.keys() - state.keys()):
            raise CheckpointError(f"weights lack {', '.join(missing)}: another model wrote them")
        if unknown := sorted(state.keys() - parameters.keys()):
            raise CheckpointError(f"weights have unknown {', '.join(unknown)}: another model wrote them")
        for name, parameter in parameters.items():
            given = state[name]
            if given.shape != parameter.shape or torch.promote_types(given.dtype, parameter.dtype) != parameter.dtype:
                raise CheckpointError(
                    f"weight {name} is {given.dtype} {list(given.shape)}, "
                    f"the model needs {parameter.dtype} {list(parameter.shape)}"
                )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name])
        self._weights.refresh()

    def optimizer_state(self) -> dict[str, Tensor]:
        """Flat, by "<parameter>/<key>"."""
        return flatten_state(self._optimizer, self._weights.parameters)

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over copies of `state`."""
        load_state(self._optimizer, self._weights.parameters, self._section, state)

    def reset_optimizer(self) -> None:
        """Forgets moments and steps."""
        self._optimizer.state.clear()

    def rng_state(self) -> dict[str, Tensor]:
        """torch's generators: "cpu", and "cuda" where the model is there."""
        state = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    def load_rng_state(self, state: Mapping[str, Tensor]) -> None:
        """Sets torch's generators."""
        if "cpu" not in state:
            raise CheckpointError("random state lacks cpu")
        torch.set_rng_state(state["cpu"])
        if self._device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self._device)

    def parameter_count(self) -> int:
        """Parameters of the model, a tied head counted once."""
        return sum(p.numel() for p in self._weights.parameters.values())

    def describe(self) -> dict[str, str]:
        """What runs."""
        return dict(self._description)

    def _place(self, microbatch: MicrobatchLike) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(t.to(self._device) for t in (microbatch.tokens, microbatch.targets, microbatch.document_ids))  # type: ignore[return-value]

    def _assert_every_gradient(self) -> None:
        """A parameter without a gradient after the first backward pass is a fault of the program, not of the user."""
        if self._checked:
            return
        if missing := [name for name, gradient in self._weights.gradients().items() if gradient is None]:
            raise RuntimeError(f"no gradient reached {', '.join(missing)}")
        self._checked = True

    def _clip(self) -> float:
        """The gradient's norm before clipping; clips where the norm is finite and above the bound."""
        gradients = [g for g in self._weights.gradients().values() if g is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        bound = self._section.clip_grad_norm
        if bound > 0 and torch.isfinite(norm) and norm > bound:
            torch._foreach_mul_(gradients, bound / norm)
        return float(norm)

    def _update(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._weights.refresh()


class _Tally:
    """Losses by source. Rows' sums stay on the device until the result is asked for."""

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, losses: Tensor, targets: Tensor, source_ids: Tensor) -> None:
        self._rows.append((losses.sum(1, dtype=torch.float64), (targets != IGNORED).sum(1), source_ids))

    def result(self) -> dict[int, tuple[float, int]]:
        sums: dict[int, tuple[float, int]] = {}
        for losses, counts, sources in self._rows:
            for source, loss, count in zip(sources.tolist(), losses.tolist(), counts.tolist(), strict=True):
                before = sums.get(source, (0.0, 0))
                sums[source] = (before[0] + loss, before[1] + count)
        return dict(sorted(sums.items()))


def _not_finite(loss: float, grad_norm: float) -> str:
    names = [name for name, value in (("loss", loss), ("gradient norm", grad_norm)) if not math.isfinite(value)]
    return f"{' and '.join(names)} not finite" if names else ""
