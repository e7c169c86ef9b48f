"""`stagemix evaluate --serve OUTPUT`: a side job that evaluates the checkpoints of a run that trains elsewhere."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from pydantic import ValidationError

from megatron.config.errors import EXIT_DONE, EXIT_REQUEUE, ConfigError
from megatron.config.evaluation_section import EvaluationSection
from megatron.evaluation.requests import EvaluationBox, Request
from megatron.evaluation.side_run import carry_out
from megatron.trainer.signals import StopSignals

PAUSE_SECONDS = 5.0


def serve(args: argparse.Namespace) -> int:
    """Carries out requests, oldest first, until the run is complete and none is left; with --once until none is left.

    Gives the exit code of the last evaluation that failed, else 0; 75 where a signal stopped it. Raises ConfigError for
    a folder that is no run's, and for options that make no sense here.
    """
    _check(args)
    box, failed, said = EvaluationBox(args.serve), EXIT_DONE, set[str]()

    def say_once(words: str) -> None:
        if words not in said:
            said.add(words)
            print(words, flush=True)

    with StopSignals(lambda number: None) as stop:

        def stopped() -> bool:
            return stop.requested

        say_once(f"serves {box.folder}")
        while not stopped():
            done = 0
            for request in box.pending(say_once):
                if stopped():
                    break
                print(f"step {request.step} ({request.training_stage}): begins", flush=True)
                found = carry_out(box, request, _wants(request, args), stopped)
                if found is None:
                    print(f"step {request.step}: another process has it", flush=True)
                    continue
                print(found.words, flush=True)
                done += 1
                failed = found.code or failed
            if done:
                continue
            if args.once or (_complete(args.serve) and not box.pending()):
                return failed
            _pause(stop)
    print(f"{stop.name}: stopped; what was being evaluated waits for the next server", flush=True)
    return EXIT_REQUEUE


def _check(args: argparse.Namespace) -> None:
    if not args.serve.is_dir():
        raise ConfigError(f"--serve {args.serve}: no such folder: name the run's output, and start the run first")
    if not any((args.serve / name).exists() for name in ("checkpoints", "metrics.jsonl", "config.toml")):
        raise ConfigError(f"--serve {args.serve}: no run has written there: name a folder that run.output names")
    for option in ("models", "output", "compare", "suite", "tasks", "config", "include_path", "data"):
        if getattr(args, option, None):
            raise ConfigError(f"--serve takes what to evaluate from the run: leave --{option.replace('_', '-')} out")


def _wants(request: Request, args: argparse.Namespace) -> EvaluationSection:
    """What the run wants, on this server's device. Programs of models run only where this server was told so, too:
    whoever can write in the folder cannot say it for it."""
    try:
        wants = EvaluationSection(**request.wants)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"the request for step {request.step}: {where}: {first['msg']}: update stagemix") from None
    here = {"allow_code_execution": wants.allow_code_execution and args.allow_code_execution}
    if args.device is not None:
        here["device"] = args.device
    return wants.model_copy(update=here)


def _complete(run: Path) -> bool:
    """Whether the run says of itself that it came to its end."""
    try:
        return bool(json.loads((run / "exit.json").read_text(encoding="utf-8"))["code"] == EXIT_DONE)
    except (OSError, ValueError, KeyError):
        return False


def _pause(stop: StopSignals) -> None:
    end = time.monotonic() + PAUSE_SECONDS
    while time.monotonic() < end and not stop.requested:
        time.sleep(0.2)
