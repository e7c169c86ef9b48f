"""A process of a run from its start to its exit code, with the exit on record whatever happens."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from megatron.config.errors import EXIT_DONE, EXIT_REQUEUE, EXIT_WATCHDOG, ConfigError, StagemixError, exit_code_of
from megatron.config.load import config_to_tables
from megatron.config.schema import HealthSection, RunConfig
from megatron.launch.allocation import end_time
from megatron.launch.attempts import WALL_TIME
from megatron.launch.torchrun import tell_torchrun
from megatron.metrics.console import Console
from megatron.parallel.health_agreement import flat, program_facts
from megatron.parallel.health_signs import Blame
from megatron.parallel.health_words import show_stacks
from megatron.parallel.mesh import host_name, launched
from megatron.trainer.attempt import Attempt
from megatron.trainer.build import build
from megatron.trainer.job import Job, OneProcess, Rank
from megatron.trainer.resume import Start
from megatron.trainer.run_folder import RunFolder
from megatron.trainer.signals import StopSignals
from megatron.trainer.state import TrainerState
from megatron.trainer.stopping import Stopping, WallTime


def run_training(config: RunConfig, start: Start, allow_lr_change: bool = False) -> int:
    """Trains the run of `config`, or goes on with it, and gives the exit code: 0 done, 75 stopped and to go on.

    OUTPUT/exit.json records code, reason and position at every end but a kill; errors are raised after that, as
    StagemixError where the user can do something about them. One process of several doesn't raise: it shows its error,
    or the one that came first on another, and ends the process with that one's code.
    """
    who = launched()
    job = Rank(who, config.health) if who.world_size > 1 else OneProcess(config.health)
    session = _Session(config, start, allow_lr_change, job)
    return session.as_a_rank(job) if isinstance(job, Rank) else session.alone()


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


class _Session:
    """What one process of the run, alone or one of several, needs from its start to its end."""

    def __init__(self, config: RunConfig, start: Start, allow_lr_change: bool, job: Job) -> None:
        self._config, self._start, self._allow_lr_change, self._job = config, start, allow_lr_change, job
        self._folder, self._state = RunFolder(config.run.output), TrainerState()
        self._console = (Console if job.writes else Mute)(config.log.every)
        self._attempt = Attempt(
            self._folder, self._state, job.pulse, config.health.heartbeat_seconds, self._console.say
        )

    def alone(self) -> int:
        """The only process. Raises."""
        attempt = self._attempt

        def too_late() -> None:
            words = self._too_late_words(stop)
            show_stacks(0)
            print(f"error: {words}", file=sys.stderr, flush=True)
            tell_torchrun(words)
            attempt.ends(EXIT_WATCHDOG, words)

        def leave(name: str) -> None:
            words = _before_training(name)
            self._console.say(words)
            tell_torchrun(words)
            attempt.ends(EXIT_REQUEUE, words)

        stop = self._signals(lambda number: attempt.ends(128 + number, _second(number)), too_late, leave)
        try:
            with stop:
                attempt.open([host_name()], 1)
                code, reason = self._train(stop)
                attempt.ends(code, reason)
        except BaseException as error:
            self._record_error(error)
            raise
        finally:
            attempt.close()
        return code

    def as_a_rank(self, rank: Rank) -> int:
        """One of several; only rank 0 touches the run's folder."""
        attempt, health = self._attempt, rank.health

        def at_once(number: int) -> None:
            health.fail_at_once(128 + number, _second(number))
            attempt.ends(128 + number, _second(number))

        stop = self._signals(
            at_once,
            lambda: health.give_up(self._too_late_words(stop)),
            lambda name: health.leave(_before_training(name)),
        )
        health.record = attempt.ends
        try:
            with stop:
                health.stop_asked = lambda: stop.requested
                try:
                    rank.meet()
                    rank.agree("start", start_facts(self._config, self._start, self._allow_lr_change), ConfigError)
                    if rank.writes:
                        attempt.open(rank.hosts(), rank.who.world_size)
                    code, reason = self._train(stop)
                    attempt.ends(code, reason)
                    rank.close()
                except BaseException as error:
                    # Inside, since a launcher that sees the first end asks the rest to stop: they end with the job's.
                    rank.fail(error)
        finally:
            attempt.close()
        return code

    def _signals(
        self, at_once: Callable[[int], None], too_late: Callable[[], None], leave: Callable[[str], None]
    ) -> StopSignals:
        health = self._config.health
        return StopSignals(at_once, health.stop_signals, health.stop_seconds, too_late, leave)

    def _train(self, stop: StopSignals) -> tuple[int, str]:
        config, state, job, attempt, say = self._config, self._state, self._job, self._attempt, self._console.say
        stopping = Stopping(stop, attempt.pace)
        if job.writes:
            end = end_time()
            stopping.switches = attempt.switches
            stopping.wall = WallTime(end, config.health.end_margin_seconds, attempt.pace) if end else None
        built = build(config, self._start, self._allow_lr_change, self._folder, state, self._console, stopping, job)
        if built is None:
            say(f"run {config.run.name} is complete: {state.step} steps; nothing to do")
            return EXIT_DONE, "already complete"
        try:
            attempt.begins(built.run.engine.describe(), built.schedule.steps, built.schedule.tokens)
            began = state.step
            built.run.clock.lap()  # what came before is no part of the first step
            reason = built.train()
            if reason:
                stop.ends()
            if reason == WALL_TIME and state.step == began:
                raise stopping.too_short(state.step)
            built.finish()
            stopping.stopped()
        finally:
            built.close()
        if built.complete:
            say(f"run {config.run.name} is complete: {state.step} steps, {state.consumed_tokens} tokens")
            return EXIT_DONE, "complete"
        words = f"{reason}: stopped at step {state.step}; start the same command again to go on"
        say(words)
        tell_torchrun(words)
        return EXIT_REQUEUE, reason

    def _too_late_words(self, stop: StopSignals) -> str:
        return (
            f"{stop.name + ': ' if stop.requested else ''}the run was to stop, and had not after "
            f"{self._config.health.stop_seconds} seconds (health.stop_seconds): for {self._job.pulse.seconds:.0f} s "
            f"its phase is {self._job.pulse.now[0]!r}. It is ended by force; start the same command again, and it goes "
            "on from the last checkpoint that was published"
        )

    def _record_error(self, error: BaseException) -> None:
        code = exit_code_of(error)
        try:
            self._attempt.ends(code, f"{type(error).__name__}: {error}", Blame(0, host_name()))
        except StagemixError as second:
            # A full disk takes no record either; the error that ended the run is the one to raise.
            self._console.say(f"note: exit.json could not be written: {second}")


def _second(number: int) -> str:
    return f"second signal {number}: ended at once"


def _before_training(name: str) -> str:
    return f"{name}: stopped before the first step of this start; start the same command again to go on"


class Mute(Console):
    """The console of a rank that does not speak."""

    def begin(self, total_tokens: int, consumed_tokens: int) -> None:
        """No bar."""

    def say(self, text: str) -> None:
        """Nothing."""
