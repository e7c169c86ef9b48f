"""Ways for one rank of a job to go wrong, for tests: `start_ranks(…, fault=at(step, rank, act))`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any


def at(step: int, rank: int, act: Callable[[], None]) -> Callable[[int], None]:
    """A fault that acts in one rank when it is about to take a step."""
    return partial(_in_step, step, rank, act)


def _in_step(number: int, rank: int, act: Callable[[], None], mine: int) -> None:
    if mine != rank:
        return
    import megatron.trainer.build as module

    build_engine = module.build_engine

    def build(*arguments: Any) -> Any:
        engine = build_engine(*arguments)
        step, steps = engine.launch_step, [0]

        def counted(*batch: Any) -> Any:
            steps[0] += 1
            if steps[0] == number:
                act()
            return step(*batch)

        engine.launch_step = counted
        return engine

    module.build_engine = build


def raises() -> None:
    raise ValueError("planted in one rank")


def refuses() -> None:
    from megatron.config.errors import DataError

    raise DataError("planted.bin: cannot be read: look at the disk")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped() -> None:
    time.sleep(1.5)  # the others hear once a second where it is
    os.kill(os.getpid(), signal.SIGSTOP)


def asleep() -> None:
    time.sleep(600)


def asked_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
