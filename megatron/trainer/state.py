"""Where a run stands: a few numbers and the data position. Everything else is in the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from megatron.engines.base import MicrobatchLike, StepResult
from megatron.trainer.spike_bounds import SpikeState


class BatchLike(Protocol):
    """A global batch as the loader gives it."""

    @property
    def microbatches(self) -> Sequence[MicrobatchLike]:
        """The samples, in order, a few at a time."""

    @property
    def step(self) -> int:
        """Number of the optimizer step that it is for, from 1."""

    @property
    def passed_over(self) -> bool:
        """Whether it is consumed without being trained on: then nothing of it was read."""

    @property
    def training_stage(self) -> str:
        """Name of the training stage that it belongs to."""

    @property
    def samples(self) -> int:
        """Sequences in it."""

    @property
    def tokens(self) -> int:
        """Input positions in it."""

    @property
    def padding(self) -> int:
        """Those of them that hold no token."""

    @property
    def digest(self) -> str:
        """64 bits over its token ids and their places, in hexadecimal."""

    @property
    def samples_by_source(self) -> Mapping[str, int]:
        """Sequences of each source."""

    @property
    def loaded(self) -> tuple[int, int]:
        """What the samples that were read for it add to the two sums of the order hash."""

    @property
    def position(self) -> dict[str, Any]:
        """The data position after it, as JSON values."""


@dataclass
class TrainerState:
    """What `state.json` of a checkpoint restores.

    step: optimizer steps taken, skipped ones included; the first batch makes it 1.
    training_stage: the one that the last batch belonged to; empty before the first.
    data: the data position after the last batch, as the data package wrote it.
    skipped, skipped_in_row: steps without an update, over the whole run and up to now without a break; those that were
        passed over count in the first alone.
    passed_over: of them, over the whole run.
    seconds: time spent in steps over the whole run, all resumes together.
    taken: what training stages took over from elsewhere, by stage name: {"weights": path, …}.
    spikes: the steps that the next ones are compared with, and what was rolled back.
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    training_stage: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    skipped_in_row: int = 0
    seconds: float = 0.0
    taken: dict[str, dict[str, str]] = field(default_factory=dict)
    passed_over: int = 0
    spikes: SpikeState = field(default_factory=SpikeState)

    def advance(self, batch: BatchLike, result: StepResult) -> None:
        """Counts a step that trained on `batch`."""
        self.step += 1
        self.consumed_samples += batch.samples
        self.consumed_tokens += batch.tokens
        self.training_stage = batch.training_stage
        self.data = batch.position
        self.skipped += not result.updated
        self.passed_over += batch.passed_over
        if not batch.passed_over:
            self.skipped_in_row = 0 if result.updated else self.skipped_in_row + 1

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> TrainerState:
        """The state that `to_json` wrote, found among the other keys of `state.json`."""
        # Fields that are younger than the checkpoint have their defaults.
        state = cls(**{name: record[name] for name in cls.__dataclass_fields__ if name in record})
        if isinstance(kept := record.get("spikes"), dict):
            state.spikes = SpikeState(**deepcopy(kept))
        return state


@dataclass(frozen=True)
class Step:
    """A step that was just taken, as hooks see it; its numbers are those of the global batch. stop: why the run stops
    after it, empty: it goes on. save: whether a checkpoint was asked for."""

    state: TrainerState
    batch: BatchLike
    result: StepResult
    lr: float
    ends_training_stage: bool
    stop: str
    save: bool = False

    @property
    def learnt(self) -> bool:
        """Whether weights are worth saving for this step: not where updates have failed, nor where it was passed
        over."""
        return self.state.skipped_in_row == 0 and not self.batch.passed_over
