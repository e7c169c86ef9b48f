"""What a checkpoint of a run holds besides tensors, and the act of saving one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.manager import CheckpointManager
from megatron.config.version import VERSION
from megatron.engines.base import Engine, KernelChoice, PrecisionChoice
from megatron.metrics.sinks import Sink
from megatron.planner.resolve import ResolvedRun
from megatron.tokenizers.base import Tokenizer
from megatron.trainer.state import TrainerState

FORMAT = 1


@dataclass
class Saver:
    """Saves the run as it stands; all ranks together. Called with (keep_forever, retire).

    published: called with the seconds of each save when its checkpoint is there; of one that runs beside training at
    the next `poll`.
    """

    manager: CheckpointManager
    state: TrainerState
    engine: Engine
    sinks: Sequence[Sink]
    constants: Mapping[str, Any]
    resolved: ResolvedRun
    files: Mapping[str, bytes | Path]
    asynchronous: bool = False
    published: Callable[[float], None] = lambda seconds: None
    _began: float | None = None

    def __call__(self, keep_forever: bool, retire: bool) -> None:
        """Makes the metrics durable, then the checkpoint: a published checkpoint never lacks rows up to its step."""
        for sink in self.sinks:
            sink.sync()
        engine = self.engine
        began = time.monotonic()
        self.manager.save(
            self.state.step,
            engine.model_state(),
            engine.optimizer_state(),
            engine.rng_state(),
            {**self.constants, **self.state.to_json(), "lr": self.resolved.lr.rate(self.state.consumed_tokens)},
            self.files,
            keep_forever,
            retire,
            self.asynchronous,
        )
        self._began = began
        self.poll()

    def poll(self) -> None:
        """Raises what went wrong in a save beside training; never waits."""
        self.manager.poll()
        if self._began is not None and not self.manager.in_flight:
            began, self._began = self._began, None
            self.published(time.monotonic() - began)

    def finish(self) -> None:
        """All ranks: waits for a save beside training."""
        self.manager.finish()
        self.poll()


def constants_of(
    run_id: str,
    shape: dict[str, Any],
    precision: PrecisionChoice,
    kernels: KernelChoice,
    tokenizer: Tokenizer,
    resolved: ResolvedRun,
) -> dict[str, Any]:
    """The part of `state.json` that does not change from step to step."""
    stages = resolved.schedule.stages
    return {
        "format": FORMAT,
        "version": VERSION,
        "run_id": run_id,
        "model": shape,
        "precision": asdict(precision),
        "kernels": asdict(kernels),
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
            "files": [f"tokenizer/{path.name}" for path in tokenizer.files()],
        },
        "schedule": [{"name": s.name, "steps": s.steps, "samples": s.samples, "tokens": s.tokens} for s in stages],
    }


def files_of(config_toml: str, tokenizer: Tokenizer) -> dict[str, bytes | Path]:
    """The files kept in every checkpoint, by their path in it, as they are now."""
    tokenizer_files = {f"tokenizer/{path.name}": path.read_bytes() for path in tokenizer.files()}
    return {"config.toml": config_toml.encode(), **tokenizer_files}
