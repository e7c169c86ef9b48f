"""The seam between the trainer and whatever runs a model: a whole optimizer step.

The loop above sees no model, no mesh and no file; an engine sees no schedule, no source name and no config but its
own sections.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from megatron.checkpoint.tensor_shards import TensorShards, TensorSource


class MicrobatchLike(Protocol):
    """What one forward pass reads. b sequences of T input positions; any object with these five will do."""

    @property
    def tokens(self) -> Tensor:
        """Input ids, int64 [b, T]."""

    @property
    def targets(self) -> Tensor:
        """The next token of the same document, int64 [b, T]; -100 where there is none or it does not count."""

    @property
    def document_ids(self) -> Tensor:
        """Pieces along a row, int32 [b, T], never falling: a new number is a new piece, and attention stops there."""

    @property
    def source_ids(self) -> Tensor:
        """Which source each row comes from, int64 [b]."""

    @property
    def sample_numbers(self) -> Tensor:
        """The rows' numbers among all samples of the run, int64 [b]; dropout is keyed by them."""


NO_TARGET = "no target of the batch is valid"
"""Why a batch makes no update in which the loss is on nothing: the mean over no target is no number."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. Losses are in nats.

    loss: mean over the valid targets of the global batch.
    loss_by_source: source id -> (sum of losses, valid targets); the sums add up to loss x valid_targets.
    grad_norm: 2-norm of the whole gradient before clipping.
    valid_targets: of the global batch.
    updated: False when the loss or the gradient's norm was not finite or beyond its bound, or no target was valid:
        then weights and optimizer state are bit for bit what they were before.
    reason: why there was no update; empty when there was one.
    spike: whether that is a finite loss or norm beyond its bound.
    """

    loss: float
    loss_by_source: dict[int, tuple[float, int]]
    grad_norm: float
    valid_targets: int
    updated: bool
    reason: str = ""
    spike: bool = False


@dataclass(frozen=True)
class Bounds:
    """Above what loss and gradient norm (before clipping) a step makes no update, and how each bound came about.

    They are the same numbers on every rank, and are known before the step is launched: no device is asked for them.
    """

    loss: float = math.inf
    grad_norm: float = math.inf
    loss_words: str = ""
    grad_norm_words: str = ""


class LaunchedStep(Protocol):
    """A step whose work has been handed to the device, and perhaps is not done."""

    @property
    def ready(self) -> bool:
        """Whether `result` waits for nothing."""

    def result(self) -> StepResult:
        """What it did; waits for the device where it must."""


@dataclass(frozen=True)
class DoneStep:
    """A step that is done."""

    done: StepResult
    ready: bool = True

    def result(self) -> StepResult:
        """What it did."""
        return self.done


@dataclass(frozen=True)
class PrecisionChoice:
    """The precision that runs (fp64, fp32 or bf16) and why, in words with figures, for the log and the checkpoint."""

    name: str
    reason: str
    milliseconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelChoice:
    """The kernels that run, as fields of `kernels.choice.Kernels`, and why, for the log and the checkpoint."""

    kernels: dict[str, Any]
    reason: str
    milliseconds: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """Trains one model, on however many ranks.

    Tensors in and out of states have global names; each rank gives the shards that it is to write and reads the boxes
    that it holds. Every method but describe and parameter_count is called by all ranks together.
    """

    def launch_step(
        self, microbatches: Sequence[MicrobatchLike], lr: float, bounds: Bounds | None = None
    ) -> LaunchedStep:
        """One optimizer step at learning rate lr. Whatever is called next on the engine sees weights after it.

        bounds: a loss or a gradient norm above them makes no update, as one that is not finite does.

        Data rank r of n is given rows r*B/n to (r+1)*B/n of the global batch of B, whatever else it shares them with.
        The result is that of the global batch, on every rank.
        """

    def train_step(self, microbatches: Sequence[MicrobatchLike], lr: float, bounds: Bounds | None = None) -> StepResult:
        """`launch_step` and its result at once."""

    def evaluate(self, microbatches: Sequence[MicrobatchLike]) -> dict[int, tuple[float, int]]:
        """Source id -> (sum of losses in nats, valid targets). Changes no state, random state included.

        Every rank is given the same microbatches; data ranks share them out.
        """

    def model_state(self) -> TensorShards:
        """Master weights by parameter name: live tensors, to be read or copied before the next step."""

    def load_model_state(self, source: TensorSource) -> None:
        """Takes over weights. CheckpointError names what is missing, unknown or of another shape."""

    def optimizer_state(self) -> TensorShards:
        """Flat: "<parameter>/exp_avg", "<parameter>/exp_avg_sq", "<parameter>/step". Empty before the first step."""

    def load_optimizer_state(self, source: TensorSource) -> None:
        """Takes over what `optimizer_state` gave, bit for bit; a source without names resets."""

    def reset_optimizer(self) -> None:
        """Forgets moments and step counts, as at the start of a training stage that asks for a fresh optimizer."""

    def rng_state(self) -> dict[str, Tensor]:
        """Random states by name, uint8. Training draws from none of them: dropout is keyed by what it drops."""

    def load_rng_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `rng_state` gave."""

    def parameter_count(self) -> int:
        """Parameters of the whole model, a tied head counted once."""

    def describe(self) -> dict[str, str]:
        """What runs, chosen once: engine, layout, precision, attention, optimizer, threads, versions."""
