"""Evaluation of the run's own checkpoints: which are due, who evaluates them, and their results as rows of metrics.

Rank 0 does all of it, by files in OUTPUT/evaluations (evaluation/requests.py) and a process of its own for each
checkpoint; the trainer's process never sees the harness. Training is the same with and without.
"""

from __future__ import annotations

import importlib.util
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from megatron.checkpoint.manager import CheckpointManager
from megatron.checkpoint.manifest import NAME as MANIFEST
from megatron.config import errors
from megatron.config.errors import ConfigError, StagemixError, UnavailableError
from megatron.config.evaluation_section import HELDOUT, EvaluationSection
from megatron.evaluation.requests import EvaluationBox, Request
from megatron.evaluation.side_run import Outcome, carry_out
from megatron.evaluation.suite import read_suite
from megatron.metrics.in_loop import evaluation_row
from megatron.metrics.meters import StepClock
from megatron.metrics.sinks import Sink
from megatron.trainer.job import Job
from megatron.trainer.run_folder import RunFolder
from megatron.trainer.state import Step, TrainerState

LOOK_SECONDS = 5.0
"""Between looks at the folder while something is awaited: on a shared file system a look is no trifle."""


def check_can_evaluate(section: EvaluationSection) -> None:
    """Raises, before anything is trained, what would make every evaluation fail: ConfigError for an unknown suite, for
    tasks that it lacks and for folders that are not there; UnavailableError where the harness is not installed here and
    is needed here."""
    if not section.named:
        return
    if section.suite and section.suite != HELDOUT:
        read_suite(section.suite).select(section.tasks)
    if section.where == "queue":
        return
    for key in ("include_path", "data"):
        if (path := getattr(section, key)) and not Path(path).is_dir():
            raise ConfigError(f"evaluation.{key} {path}: no such folder")
    if importlib.util.find_spec("lm_eval") is None:
        raise UnavailableError(
            f'evaluation.where = "{section.where}" needs lm-evaluation-harness here, and it is not installed: '
            "pip install 'stagemix[eval]', or set evaluation.where = \"queue\" and run stagemix evaluate --serve where "
            "it is"
        )


class Beside:
    """A thread that carries out requests, one after the other, each in a process of its own, until told to stop."""

    def __init__(self, box: EvaluationBox, section: EvaluationSection) -> None:
        self._box, self._section = box, section
        self._stop = threading.Event()
        self._asked = threading.Event()
        self._thread = threading.Thread(target=self._run, name="evaluator", daemon=True)
        self.trouble: list[str] = []

    @property
    def goes_on(self) -> bool:
        """Whether requests are being carried out."""
        return self._thread.is_alive()

    def wake(self) -> None:
        """There may be a request."""
        self._asked.set()
        if not self._thread.is_alive() and not self._stop.is_set():
            self._thread = threading.Thread(target=self._run, name="evaluator", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends what runs, and gives its request back."""
        self._stop.set()
        self._asked.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._asked.clear()
                for request in self._box.pending():
                    if not self._stop.is_set():
                        carry_out(self._box, request, self._section, self._stop.is_set, self._section.niceness)
                # Another server may hold a request, and be lost: looked at again now and then.
                self._asked.wait(30.0 if self._box.pending() else None)
        except Exception as error:  # whatever it is, training goes on
            self.trouble.append(
                f"evaluations beside training stopped ({type(error).__name__}: {error}); they go on with the next one"
            )


class Evaluations:
    """The hook that asks for evaluations, and takes their results. All ranks have one; `begin` before the first step,
    `finish` after the last, `close` at any end.

    ends: consumed samples at the ends of training stages.
    """

    def __init__(
        self,
        section: EvaluationSection,
        folder: RunFolder,
        job: Job,
        state: TrainerState,
        sinks: Sequence[Sink],
        manager: CheckpointManager,
        clock: StepClock,
        ends: Collection[int],
        say: Callable[[str], None],
        stop_signal: Callable[[], str],
    ) -> None:
        self._section, self._job, self._state, self._sinks = section, job, state, sinks
        self._manager, self._clock, self._ends, self._say = manager, clock, ends, say
        self._stopped = lambda: bool(stop_signal())
        self._metrics = folder.metrics
        self._box = EvaluationBox(folder.path, by_run=True)
        self._awaited: dict[int, Request] = {}
        self._unpublished: list[Request] = []
        self._held: frozenset[Path] = frozenset()
        self._looked = 0.0
        self._beside = Beside(self._box, section) if section.where == "beside" and job.writes else None
        if job.writes:
            manager.holds = lambda path: path in self._held

    def begin(self) -> None:
        """All ranks: clears what a killed process left, takes results that have no row yet, and asks for what is
        missing of the checkpoints that are there."""
        if self._job.writes:
            for path in self._box.settle(self._state.step):
                self._say(f"set aside {path}: an evaluation beyond step {self._state.step}")
            self._box.clear()
            self._take_without_a_row()
            if self._section.named:
                self._ask_for_missing()
        if self._section.named and self._section.where == "here":
            self._evaluate_here()

    def __call__(self, step: Step) -> None:
        """Asks where it is time to; shows what has been found."""
        if not self._section.named:
            return
        state, every = step.state, self._section.every
        at_an_end = step.ends_training_stage and self._section.at_stage_ends
        between = bool(every) and state.step % every == 0
        if at_an_end or between:
            saved = step.ends_training_stage or step.learnt
            if not saved and self._job.writes:
                self._say(f"step {state.step} is not evaluated: it was not saved, while steps go without an update")
            if saved:
                self._ask_after(step, kept=step.ends_training_stage)
        if self._job.writes:
            self._look()

    def finish(self) -> None:
        """All ranks, after the last step, with no save in flight: waits for what is evaluated beside, for
        evaluation.wait_seconds at most, or until a signal."""
        if not self._section.named:
            return
        if self._job.writes:
            self._look(now=True)
        if self._section.where == "beside":
            self._job.while_rank_0("waits for evaluations", self._wait, self._stopped)
        if self._job.writes and self._state.skipped_in_row == 0:
            self._manager.retire()  # what was held for this longer than checkpoint.keep says
        if self._job.writes and self._awaited:
            steps = ", ".join(str(step) for step in sorted(self._awaited))
            self._say(
                f"not yet evaluated: step {steps}: start the same command again, or stagemix evaluate --serve "
                f"{self._box.output} --once"
            )

    def close(self) -> None:
        """Ends what runs beside; its requests stay, and are taken up at the next start."""
        if self._beside is not None:
            self._beside.stop()

    # Asking

    def _ask_after(self, step: Step, kept: bool) -> None:
        state, here = step.state, self._section.where == "here"
        if here:
            self._manager.finish()  # a save in flight has to land first
        if self._job.writes:
            waiting = [number for number, one in self._awaited.items() if one.consumed_samples not in self._ends]
            if not kept and len(waiting) >= self._section.backlog:
                self._say(
                    f"step {state.step} is not evaluated: {len(waiting)} checkpoints wait for it already "
                    "(evaluation.backlog)"
                )
            else:
                position = (state.training_stage, state.consumed_samples, state.consumed_tokens)
                self._await(Request(state.step, *position, "", os.getcwd(), self._wants()))
        if here:
            with self._clock.spending("evaluation"):
                self._evaluate_here()

    def _await(self, request: Request) -> None:
        """Holds the checkpoint from now on, and leaves the request as soon as it is published."""
        self._awaited[request.step] = request
        self._hold()
        self._unpublished.append(request)
        self._leave_requests()

    def _leave_requests(self) -> None:
        for request in list(self._unpublished):
            checkpoint = self._box.checkpoint_path(request.step)
            if not (checkpoint / MANIFEST).exists():
                continue
            self._unpublished.remove(request)
            known = Request(**{**vars(request), "checkpoint": _identity(checkpoint)})
            self._awaited[request.step] = known
            try:
                if self._asked_already(known):
                    continue
                self._box.ask(known)
            except OSError as error:
                self._say(f"step {request.step} is not evaluated: the request cannot be written: {error}")
                self._forget(request.step)
        if self._beside is not None and self._awaited:
            self._beside.wake()

    def _asked_already(self, known: Request) -> bool:
        """A server that is at it since before this start is left to it."""
        return any(one == known for one in self._box.pending())

    def _wants(self) -> dict[str, Any]:
        wants: dict[str, Any] = self._section.model_dump(mode="json")
        return wants

    def _ask_for_missing(self) -> None:
        done = self._box.results()
        for number, path in self._manager.steps():
            if number == 0 or number > self._state.step or number in done:
                continue
            try:
                state = json.loads((path / "state.json").read_text(encoding="utf-8"))
                samples, tokens = int(state["consumed_samples"]), int(state["consumed_tokens"])
                stage = str(state["training_stage"])
            except (OSError, ValueError, KeyError):
                continue  # damaged: named where the run looks for a checkpoint
            between = self._section.every and number % self._section.every == 0
            if not between and not (samples in self._ends and self._section.at_stage_ends):
                continue
            failure = self._box.failure(number)
            if failure is not None and not failure.get("again", True):
                self._say(f"step {number} is not evaluated: {failure['reason']}")
                continue
            self._await(Request(number, stage, samples, tokens, "", os.getcwd(), self._wants()))
        for request in self._box.pending(lambda words: self._say(f"note: {words}")):
            if request.step not in self._awaited:
                self._box.remove_request(request.step)  # its checkpoint is gone, or the config asks for it no more

    # Evaluating here

    def _evaluate_here(self) -> None:
        """All ranks wait while rank 0 has every request carried out."""
        outcomes: list[Outcome] = []

        def work(goes_on: Callable[[], bool]) -> None:
            while self._awaited and not goes_on():
                for request in list(self._awaited.values()):
                    if request.step in self._awaited and not goes_on():
                        found = carry_out(self._box, request, self._section, goes_on)
                        outcomes.extend([found] if found else [])
                    self._look(now=True)
                if self._awaited:
                    time.sleep(0.2)  # another server has it

        self._job.while_rank_0("evaluates a checkpoint", work, self._stopped)
        failed = [outcome for outcome in outcomes if outcome.code]
        if failed and self._section.required:
            raise _error_of(failed[0])

    # Results

    def _look(self, now: bool = False) -> None:
        """Shows what is done since the last look."""
        if self._unpublished:
            self._leave_requests()
        if not self._awaited or (not now and time.monotonic() - self._looked < LOOK_SECONDS):
            return
        self._looked = time.monotonic()
        if self._beside is not None and self._beside.trouble:
            self._say(f"note: {self._beside.trouble.pop()}")
        for step in sorted(self._awaited):
            if any(request.step == step for request in self._unpublished):
                continue
            if self._box.request_path(step).exists():
                continue  # written last, so that a result without it is whole
            self._take(step)

    def _take(self, step: int) -> None:
        found = self._box.results(lambda words: self._say(f"note: {words}")).get(step)
        if found is not None:
            self._show(found)
        elif (failure := self._box.failure(step)) is not None:
            code, where = failure.get("code"), self._box.failure_path(step)
            self._say(f"step {step} could not be evaluated (exit code {code}): {failure.get('reason')}; see {where}")
        else:
            self._say(f"step {step} is not evaluated: its request was removed from {self._box.requests}")
        self._forget(step)

    def _show(self, record: dict[str, Any]) -> None:
        row = evaluation_row(self._state.step, record)
        for sink in self._sinks:
            sink.write(row)
            sink.sync()

    def _forget(self, step: int) -> None:
        self._awaited.pop(step, None)
        self._hold()

    def _hold(self) -> None:
        self._held = frozenset(self._manager.folder / request.name for request in self._awaited.values())

    def _take_without_a_row(self) -> None:
        shown = set()
        if self._metrics.exists():
            with open(self._metrics, "rb") as rows:
                shown = {json.loads(row)["evaluated_step"] for row in rows if b'"evaluated_step"' in row}
        for step, record in self._box.results(lambda words: self._say(f"note: {words}")).items():
            if step not in shown:
                self._show(record)

    def _wait(self, goes_on: Callable[[], bool]) -> None:
        end, said = time.monotonic() + self._section.wait_seconds, False
        while self._awaited and self._evaluator_lives() and time.monotonic() < end and not goes_on():
            if not said:
                said = True
                self._say(
                    f"training is done; waits up to {self._section.wait_seconds} s (evaluation.wait_seconds) for the "
                    f"evaluation of {len(self._awaited)} checkpoint{'s' if len(self._awaited) > 1 else ''}"
                )
            self._look(now=True)
            time.sleep(0.2 if self._awaited else 0.0)

    def _evaluator_lives(self) -> bool:
        return self._beside is not None and self._beside.goes_on


def _identity(checkpoint: Path) -> str:
    """The SHA-256 that a manifest says of itself, and so of every file of the checkpoint."""
    return str(json.loads((checkpoint / MANIFEST).read_bytes())["manifest_sha256"])


def _error_of(outcome: Outcome) -> StagemixError:
    """The error that ends the run with the evaluation's own exit code."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, StagemixError)]
    kind = next((kind for kind in kinds if kind.exit_code == outcome.code), StagemixError)
    return kind(f"{outcome.words} (evaluation.required = true): see to it, then start the same command again")
