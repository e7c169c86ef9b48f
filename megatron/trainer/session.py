"""A process of a run from its start to its exit code, with the exit on record whatever happens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NoReturn

from megatron.config.errors import EXIT_DONE, EXIT_REQUEUE, ConfigError, StagemixError, exit_code_of
from megatron.config.load import config_to_tables
from megatron.config.schema import HealthSection, RunConfig
from megatron.launch.torchrun import tell_torchrun
from megatron.metrics.console import Console
from megatron.parallel.health_agreement import flat, program_facts
from megatron.parallel.mesh import launched
from megatron.trainer.build import build
from megatron.trainer.job import Job, OneProcess, Rank
from megatron.trainer.loop import train
from megatron.trainer.resume import Start
from megatron.trainer.run_folder import RunFolder
from megatron.trainer.signals import StopSignals
from megatron.trainer.state import TrainerState


def run_training(config: RunConfig, start: Start, allow_lr_change: bool = False) -> int:
    """Trains the run of `config`, or goes on with it, and gives the exit code: 0 done, 75 stopped by a signal.

    OUTPUT/exit.json records code, reason, step and consumed samples at every end but a kill; errors are raised after
    that, as StagemixError where the user can do something about them. One process of several doesn't raise: it shows
    its error, or the one that came first on another, and ends the process with that one's code.
    """
    who = launched()
    if who.world_size > 1:
        return _train_as_a_rank(config, start, allow_lr_change, Rank(who, config.health))
    folder, state = RunFolder(config.run.output), TrainerState()
    folder.open()
    console = Console(config.log.every)

    def record(code: int, reason: str) -> None:
        folder.record_exit(code, reason, progress_of(state))

    try:
        with StopSignals(lambda number: record(128 + number, f"second signal {number}: ended at once")) as stop:
            code, reason = _train(config, start, allow_lr_change, folder, state, console, stop, OneProcess())
        record(code, reason)
    except BaseException as error:
        _record_error(error, record, console.say)
        raise
    finally:
        folder.close()
    return code


def _train_as_a_rank(config: RunConfig, start: Start, allow_lr_change: bool, rank: Rank) -> int:
    """The same as one of several processes; only rank 0 touches the run's folder."""
    folder, state = RunFolder(config.run.output), TrainerState()
    console = Console(config.log.every) if rank.writes else Mute(config.log.every)

    def record(code: int, reason: str) -> None:
        if folder.is_open:
            folder.record_exit(code, reason, progress_of(state))

    def at_once(number: int) -> None:
        words = f"second signal {number}: ended at once"
        rank.health.fail_at_once(128 + number, words)
        record(128 + number, words)

    rank.health.record = record
    try:
        with StopSignals(at_once) as stop:
            rank.health.stop_asked = lambda: stop.requested
            try:
                rank.meet()
                rank.agree("start", start_facts(config, start, allow_lr_change), ConfigError)
                if rank.writes:
                    folder.open()
                code, reason = _train(config, start, allow_lr_change, folder, state, console, stop, rank)
                record(code, reason)
                rank.close()
            except BaseException as error:
                # Inside, since a launcher that sees the first end asks the rest to stop: they end with the job's code.
                rank.fail(error)
    finally:
        folder.close()
    return code


def refuse(error: StagemixError, seconds: int = 30) -> NoReturn:
    """Ends a process for an error that came before its run, in the command line or the config. One of several ends with
    the others, so that one shows what all of them met; alone, or without the others within `seconds`, it raises.
    """
    who = launched()
    if who.world_size > 1:
        # A launcher that sees the first of them end asks the rest to stop: they end with the same code.
        with contextlib.suppress(StagemixError), StopSignals(lambda number: None):
            rank = Rank(who, HealthSection(start_seconds=seconds))
            rank.meet()
            rank.fail(error)
    raise error


def start_facts(config: RunConfig, start: Start, allow_lr_change: bool) -> dict[str, Any]:
    """What every process must have been started with: versions, sources of the program, config, options."""
    options = {"--fresh": start.fresh, "--resume-from": start.resume_from, "--allow-lr-change": allow_lr_change}
    return {**program_facts(), **flat(config_to_tables(config)), **options}


def _train(
    config: RunConfig,
    start: Start,
    allow_lr_change: bool,
    folder: RunFolder,
    state: TrainerState,
    console: Console,
    stop: StopSignals,
    job: Job,
) -> tuple[int, str]:
    built = build(config, start, allow_lr_change, folder, state, console, lambda: stop.name, job)
    if built is None:
        console.say(f"run {config.run.name} is complete: {state.step} steps; nothing to do")
        return EXIT_DONE, "already complete"
    try:
        signal_name = train(built.run)
        built.finish()
    finally:
        built.close()
    if built.complete:
        console.say(f"run {config.run.name} is complete: {state.step} steps, {state.consumed_tokens} tokens")
        return EXIT_DONE, "complete"
    words = f"{signal_name}: stopped at step {state.step}; start the same command again to go on"
    console.say(words)
    tell_torchrun(words)
    return EXIT_REQUEUE, signal_name


class Mute(Console):
    """The console of a rank that does not speak."""

    def begin(self, total_tokens: int, consumed_tokens: int) -> None:
        """No bar."""

    def say(self, text: str) -> None:
        """Nothing."""


def progress_of(state: TrainerState) -> dict[str, Any]:
    """Where the run stands, for exit.json."""
    return {
        "step": state.step,
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_tokens,
        "training_stage": state.training_stage,
    }


def _record_error(error: BaseException, record: Callable[[int, str], None], say: Callable[[str], None]) -> None:
    try:
        record(exit_code_of(error), f"{type(error).__name__}: {error}")
    except StagemixError as second:
        # A full disk takes no record either; the error that ended the run is the one to raise.
        say(f"note: exit.json could not be written: {second}")
