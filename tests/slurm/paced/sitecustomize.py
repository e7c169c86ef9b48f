"""Read by every Python of a test's SLURM jobs, which have this folder in PYTHONPATH: gives training steps a least
duration, so that an event can come between two of them, plants faults in ranks of one node, and replaces the harness.

TEST_STEP_SECONDS: a step's least duration, by starts of the job, "2:0.5"; the last holds for all later ones.
TEST_FAULT: "NODE:STEP:kill" or "NODE:STEP:raise", in the last rank of that node when it is about to take that step,
counted from the start of the process.
TEST_STAND_IN: a program that is started in place of `stagemix evaluate` where one evaluates for a run.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from types import ModuleType
from typing import Any


class _Loader(importlib.abc.Loader):
    def __init__(self, real: importlib.abc.Loader) -> None:
        self._real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        _PATCHES[module.__name__](module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in _PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _slow_down(module: Any) -> None:
    build_engine = module.build_engine

    def build(*arguments: Any, **named: Any) -> Any:
        engine = build_engine(*arguments, **named)
        launch, steps = engine.launch_step, [0]

        def paced(*batch: Any) -> Any:
            steps[0] += 1
            _act(steps[0])
            time.sleep(_pace())
            return launch(*batch)

        engine.launch_step = paced
        return engine

    module.build_engine = build


def _pace() -> float:
    paces, start = os.environ.get("TEST_STEP_SECONDS", "0").split(":"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return float(paces[min(int(start), len(paces) - 1)])


def _act(step: int) -> None:
    if not (fault := os.environ.get("TEST_FAULT")):
        return
    node, number, kind = fault.split(":")
    last = str(int(os.environ.get("SLURM_NTASKS_PER_NODE", "1")) - 1)
    if (
        node
        and node == os.environ.get("SLURMD_NODENAME")
        and last == os.environ["SLURM_LOCALID"]
        and step == int(number)
    ):
        if kind == "raise":
            raise ValueError("planted in one rank")
        os.kill(os.getpid(), signal.SIGKILL)


def _stand_in(module: Any) -> None:
    if program := os.environ.get("TEST_STAND_IN"):
        module.stagemix = lambda command: [sys.executable, program, command]


_PATCHES = {"megatron.trainer.build": _slow_down, "megatron.evaluation.side_run": _stand_in}


def install() -> None:
    """Patches the modules, those that are not loaded yet when they are."""
    for name, patch in _PATCHES.items():
        if name in sys.modules:
            patch(sys.modules[name])
    sys.meta_path.insert(0, _Finder())


if "SLURM_STEP_ID" in os.environ:
    install()
