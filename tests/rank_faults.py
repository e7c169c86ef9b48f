"""Ways for one rank of a job to go wrong, for tests: `start_ranks(…, fault=at(step, rank, act))`."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
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


def all_of(*faults: Callable[[int], None]) -> Callable[[int], None]:
    """Several faults in one job."""
    return partial(_all_of, faults)


def _all_of(faults: tuple[Callable[[int], None], ...], rank: int) -> None:
    for fault in faults:
        fault(rank)


def on_nodes(rank: int) -> None:
    """Each rank is the only one of a node of SLURM's, "node0", "node1", …"""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "SLURM_STEP_ID": "0", "SLURMD_NODENAME": f"node{rank}"}


def switched(path: Path) -> Callable[[], None]:
    """A switch file is made, and seen, while a step runs."""
    return partial(_switched, path)


def _switched(path: Path) -> None:
    from megatron.trainer.switches import Switches

    path.touch()
    switches = next(one for one in gc.get_objects() if isinstance(one, Switches))
    while path.name not in switches.asked:
        time.sleep(0.02)


def while_saving(act: Callable[[], None], rank: int = 0, step: int = 0) -> Callable[[int], None]:
    """A fault that acts in one rank while it writes the checkpoint of a step (0: of any)."""
    return partial(_while_saving, act, rank, step)


def _while_saving(act: Callable[[], None], rank: int, step: int, mine: int) -> None:
    if mine != rank:
        return
    import megatron.checkpoint.manager as module

    write = module.write_shards

    def acting(storage: Any, aside: Path, *arguments: Any) -> Any:
        if step == 0 or f"{step:09d}" in aside.name:
            act()
        return write(storage, aside, *arguments)

    module.write_shards = acting
