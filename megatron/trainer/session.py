"""One process of a run from its start to its exit code, with the exit on record whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.config.errors import EXIT_BUG, EXIT_DONE, EXIT_IO, EXIT_REQUEUE, IO_REMEDIES, StagemixError
from megatron.config.schema import RunConfig
from megatron.metrics.console import Console
from megatron.trainer.build import build
from megatron.trainer.loop import train
from megatron.trainer.resume import Start
from megatron.trainer.run_folder import RunFolder
from megatron.trainer.signals import StopSignals
from megatron.trainer.state import TrainerState


def run_training(config: RunConfig, start: Start, allow_lr_change: bool = False) -> int:
    """Trains the run of `config`, or goes on with it, and gives the exit code: 0 done, 75 stopped by a signal.

    OUTPUT/exit.json records code, reason, step and consumed samples at every end but a kill; errors are raised after
    that, as StagemixError where the user can do something about them.
    """
    folder, state = RunFolder(config.run.output), TrainerState()
    folder.open()
    console = Console(config.log.every)

    def record(code: int, reason: str) -> None:
        folder.record_exit(code, reason, progress_of(state))

    try:
        with StopSignals(lambda number: record(128 + number, f"second signal {number}: ended at once")) as stop:
            code, reason = _train(config, start, allow_lr_change, folder, state, console, stop)
        record(code, reason)
    except BaseException as error:
        _record_error(error, record, console.say)
        raise
    finally:
        folder.close()
    return code


def _train(
    config: RunConfig,
    start: Start,
    allow_lr_change: bool,
    folder: RunFolder,
    state: TrainerState,
    console: Console,
    stop: StopSignals,
) -> tuple[int, str]:
    built = build(config, start, allow_lr_change, folder, state, console, lambda: stop.requested)
    if built is None:
        console.say(f"run {config.run.name} is complete: {state.step} steps; nothing to do")
        return EXIT_DONE, "already complete"
    try:
        train(built.run)
    finally:
        built.close()
    if built.complete:
        console.say(f"run {config.run.name} is complete: {state.step} steps, {state.consumed_tokens} tokens")
        return EXIT_DONE, "complete"
    console.say(f"{stop.name}: stopped at step {state.step}; start the same command again to go on")
    return EXIT_REQUEUE, stop.name


def progress_of(state: TrainerState) -> dict[str, Any]:
    """Where the run stands, for exit.json."""
    return {
        "step": state.step,
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_tokens,
        "training_stage": state.training_stage,
    }


def _record_error(error: BaseException, record: Callable[[int, str], None], say: Callable[[str], None]) -> None:
    code = EXIT_BUG
    if isinstance(error, StagemixError):
        code = error.exit_code
    elif isinstance(error, OSError) and error.errno in IO_REMEDIES:
        code = EXIT_IO
    try:
        record(code, f"{type(error).__name__}: {error}")
    except StagemixError as second:
        # A full disk takes no record either; the error that ended the run is the one to raise.
        say(f"note: exit.json could not be written: {second}")
