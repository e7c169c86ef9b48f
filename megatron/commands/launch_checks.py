"""What is looked at on the login node before a run waits in a queue: its config, its past, its layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import lcm
from pathlib import Path

from megatron.config.errors import EXIT_UNAVAILABLE, ConfigError
from megatron.config.kernel_checks import kernel_refusals
from megatron.config.layout import resolve_layout
from megatron.config.load import load_config
from megatron.config.model_shape import VOCABULARY_MULTIPLE, ModelShape, resolve_model
from megatron.config.schema import RunConfig
from megatron.planner.layout_plan import batches_of, plan_layout
from megatron.planner.ledger_files import checkpoint_folders, read_ledger
from megatron.planner.resolve import resolve_run

CHECKPOINT_BYTES = 12
"""A parameter's in a checkpoint: float32 master weight and AdamW's two moments."""


@dataclass(frozen=True)
class CheckedRun:
    """A run that train would accept on so many processes, as far as a login node can tell.

    layout: words; empty where the model's vocabulary is not known here. notes: what else is worth a line.
    """

    config: RunConfig
    path: Path
    output: Path
    processes: int
    layout: str
    checkpoint_bytes: int | None
    notes: list[str] = field(default_factory=list)


def check_run(path: Path, overrides: Sequence[str], processes: int, dry_run: bool = False) -> CheckedRun:
    """The run of a config. Raises what train would raise: ConfigError, DataError, ChangedPastError."""
    return check_config(load_config(path, overrides), path, processes, dry_run)


def check_config(config: RunConfig, path: Path, processes: int, dry_run: bool = False) -> CheckedRun:
    """The same of a config that is at hand; path: where it lies, or will lie."""
    output = Path(config.run.output)
    layout = resolve_layout(config.parallel, processes)
    ledger = read_ledger(output) if checkpoint_folders(output) else None
    run = resolve_run(config, ledger=ledger, layout=layout)
    notes = _sizes_without_data(config, dry_run)
    vocabulary = config.model.vocab_size or _vocabulary(config.tokenizer.path, notes)
    longest = max(stage.shapes.longest_sequence for stage in run.schedule.stages)
    shape = resolve_model(config.model, vocabulary or lcm(VOCABULARY_MULTIPLE, config.parallel.tensor), longest)
    batches = batches_of(run.schedule, config.model.seq_length if config.validation.fraction else None)
    plan = plan_layout(
        config.parallel, shape, config.train, config.optimizer, batches, processes, vocabulary is not None
    )
    for refused in plan["refusals"]:
        if refused["exit_code"] != EXIT_UNAVAILABLE:
            raise ConfigError(f"{path}: train will refuse the layout over {processes} processes: {refused['text']}")
        notes.append(f"here, on this machine: {refused['text']}")
    for error in kernel_refusals(
        config.kernels, config.parallel, processes, shape, config.train, config.train.precision
    ):
        raise error
    notes += plan["notes"]
    bytes_ = _checkpoint_bytes(shape) if vocabulary else None
    return CheckedRun(config, path, output, processes, plan["words"], bytes_, notes)


def _checkpoint_bytes(shape: ModelShape) -> int:
    return CHECKPOINT_BYTES * shape.parameter_count()


def _sizes_without_data(config: RunConfig, dry_run: bool) -> list[str]:
    """Sources that are sizes to plan with cannot be trained on: an error, but for a dry run."""
    planned = [name for name, source in config.sources.items() if not source.data]
    if not planned:
        return []
    said = (
        f"sources.{', sources.'.join(planned)}: tokens = … stands for files that are not there yet, and train needs "
        "them: set data = [prefixes of .bin/.idx], as preprocess_data wrote them"
    )
    if not dry_run:
        raise ConfigError(said)
    return [said]


def _vocabulary(path: str, notes: list[str]) -> int | None:
    if path != "bytes" and not Path(path).exists():
        notes.append(f"tokenizer.path {path}: not there yet: the vocabulary's part of the layout is not checked")
        return None
    from megatron.tokenizers.load import load_tokenizer

    return load_tokenizer(path).vocab_size
