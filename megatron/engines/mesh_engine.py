"""What both engines do alike: microbatches onto the device, rows gathered from all ranks, random states."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.errors import CheckpointError
from megatron.engines.base import NO_TARGET, Bounds, DoneStep, LaunchedStep, MicrobatchLike, StepResult
from megatron.engines.row_losses import RowLosses, gather_rows
from megatron.kernels.document_lengths import document_bounds
from megatron.parallel.mesh import Mesh
from megatron.parallel.pipeline import Pipeline, Rows


class MeshEngine:
    """An engine's place among the ranks. whole: every parameter of the whole model by name, without memory."""

    def __init__(self, mesh: Mesh, whole: Mapping[str, Tensor], description: Mapping[str, str]) -> None:
        self._mesh = mesh
        self._whole = dict(whole)
        self._description = dict(description)

    _model: Callable[..., Any]
    """What is called with rows where there is no pipeline."""
    _pipeline: Pipeline | None

    def _run(self, rows: Rows, scale: float) -> tuple[Tensor, Tensor]:
        """(scale x the sum of losses [1], each row's sum of losses)."""
        for module in self._computing():
            module.bounds = rows.bounds  # type: ignore[assignment]
        return self._model(  # type: ignore[no-any-return]
            rows.tokens,
            rows.document_ids,
            targets=rows.targets,
            scale=scale,
            sample_numbers=rows.sample_numbers,
        )

    def _look(self, rows: Rows) -> Tensor | None:
        """Each row's sum of losses without training, float64 [n]; None where the head is on another rank."""
        return self._run(rows, 1.0)[1] if self._pipeline is None else self._pipeline.evaluate(rows)

    def launch_step(
        self, microbatches: Sequence[MicrobatchLike], lr: float, bounds: Bounds | None = None
    ) -> LaunchedStep:
        """One optimizer step."""
        raise NotImplementedError

    def train_step(self, microbatches: Sequence[MicrobatchLike], lr: float, bounds: Bounds | None = None) -> StepResult:
        """One optimizer step and what it did."""
        return self.launch_step(microbatches, lr, bounds).result()

    def _nothing_to_learn(self, microbatches: Sequence[MicrobatchLike]) -> DoneStep:
        """Of a batch without a valid target."""
        by_source = self._gather(microbatches, None).by_source()
        return DoneStep(StepResult(0.0, by_source, 0.0, 0, False, NO_TARGET))

    def _computing(self) -> Sequence[nn.Module]:
        """The modules that run."""
        raise NotImplementedError

    def _looked(self) -> None:
        """Called after weights were only looked at."""
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[MicrobatchLike]) -> dict[int, tuple[float, int]]:
        """Source id -> (sum of losses in nats, valid targets). Data ranks take equal runs of the microbatches; since
        sharded weights are gathered by all of them together, one whose run is short runs the first again."""
        if not microbatches:
            return {}
        data, sizes = self._mesh.data, [m.targets.shape[0] for m in microbatches]
        share = -(-len(microbatches) // data.size)
        mine = list(microbatches[share * data.rank : share * (data.rank + 1)])
        for module in self._computing():
            module.eval()
        losses = [self._look(self._place(m)) for m in (*mine, *[microbatches[0]] * (share - len(mine)))]
        for module in self._computing():
            module.train()
        self._looked()
        found = [part for part in losses[: len(mine)] if part is not None]
        targets = [m.targets for m in mine] or [microbatches[0].targets[:0]]
        sources = [m.source_ids for m in mine] or [microbatches[0].source_ids[:0]]
        first = sum(sizes[: share * data.rank])
        return gather_rows(
            self._mesh, sum(sizes), first, targets, sources, torch.cat(found) if found else None
        ).by_source()

    def rng_state(self) -> dict[str, Tensor]:
        """torch's generators: "cpu", and "cuda" where the model is there."""
        state = {"cpu": torch.get_rng_state()}
        if self._mesh.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._mesh.device)
        return state

    def load_rng_state(self, state: Mapping[str, Tensor]) -> None:
        """Sets torch's generators."""
        if "cpu" not in state:
            raise CheckpointError("random state lacks cpu")
        torch.set_rng_state(state["cpu"])
        if self._mesh.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self._mesh.device)

    def parameter_count(self) -> int:
        """Parameters of the whole model, a tied head counted once."""
        return sum(parameter.numel() for parameter in self._whole.values())

    def describe(self) -> dict[str, str]:
        """What runs."""
        return dict(self._description)

    def _place(self, m: MicrobatchLike) -> Rows:
        tensors = (m.tokens, m.targets, m.document_ids, m.sample_numbers)
        # What the host can count, no kernel has to ask the device for.
        bounds = document_bounds(m.document_ids) if m.document_ids.device.type == "cpu" else None
        return Rows(*(tensor.to(self._mesh.device, non_blocking=True) for tensor in tensors), bounds=bounds)

    def _gather(self, microbatches: Sequence[MicrobatchLike], losses: Tensor | None) -> RowLosses:
        """The table of a training batch, of which every data rank has an equal part."""
        data, mine = self._mesh.data, sum(m.targets.shape[0] for m in microbatches)
        targets, sources = [m.targets for m in microbatches], [m.source_ids for m in microbatches]
        return gather_rows(self._mesh, mine * data.size, mine * data.rank, targets, sources, losses)


def not_finite(loss: float, grad_norm: float) -> str:
    """Why a step with these makes no update; empty where it may."""
    names = [name for name, value in (("loss", loss), ("gradient norm", grad_norm)) if not math.isfinite(value)]
    return f"{' and '.join(names)} not finite" if names else ""


def beyond(loss: float, grad_norm: float, bounds: Bounds) -> str:
    """By how much a step is a spike, in words; empty where it is none."""
    found = []
    for name, value, bound, words in (
        ("loss", loss, bounds.loss, bounds.loss_words),
        ("gradient norm", grad_norm, bounds.grad_norm, bounds.grad_norm_words),
    ):
        if value > bound:
            found.append(f"{name} {value:.4g} above {bound:.4g}" + f" ({words})" * bool(words))
    return f"spike: {', '.join(found)}" if found else ""


def step_result(
    loss: float,
    by_source: dict[int, tuple[float, int]],
    grad_norm: float,
    valid: int,
    bounds: Bounds,
    dropped: bool,
) -> StepResult:
    """Of a step that was left without an update where a number is not finite, or where it was `dropped` as a spike."""
    reason, spike = not_finite(loss, grad_norm), ""
    if dropped and not reason:
        spike = (
            beyond(loss, grad_norm, bounds) or f"spike: loss {loss:.4g} or gradient norm {grad_norm:.4g} at its bound"
        )
    return StepResult(loss, by_source, grad_norm, valid, not (reason or spike), reason or spike, bool(spike))
