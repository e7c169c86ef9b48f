"""Part e: the demo's recipe trained on the GPU and on the CPU, and how far the loss curves part.

The recipe is examples/demo/tiny.toml: three training stages over code and prose, here this repository's own files by
their bytes. Every run is `tools/train.py` in a process of its own; all of them run at once.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from gpu_corpus import write_repository
from gpu_job import Context, Job
from gpu_results import Row
from gpu_setting import ROOT

TITLE = "one recipe on GPU and CPU"
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-3}
"""Of |loss - CPU's loss| / CPU's loss at any step. On one CPU another attention kernel moved these 30 steps' curve by
1e-8 in fp32 and by 1.4e-4 in bf16, and bf16 was 4e-4 from fp32: what is allowed is far above all of that, and far
below what a wrong kernel does."""
NOTES = (
    "examples/demo/tiny.toml over this repository's files, by bytes. apart: the largest |loss - that of the CPU| / "
    f"that of the CPU of any step, which may be {TOLERANCES['fp32']} in fp32 and {TOLERANCES['bf16']} in bf16; "
    "at step 1, before any update, it is rounding alone."
)
_KERNELS = ("norm", "rope", "activation", "cross_entropy")


@dataclass(frozen=True)
class Side:
    """A way to train. kernels: [kernels]; cpu: on the CPU though there is a GPU."""

    name: str
    cpu: bool
    kernels: Mapping[str, str]


CPU = Side("cpu", True, {})
TRITON = Side("triton", False, {**dict.fromkeys(_KERNELS, "triton"), "compile": "none"})
COMPILED = Side("compiled", False, {**dict.fromkeys(_KERNELS[:3], "compile"), "compile": "layers"})


def jobs(context: Context) -> Iterator[Job]:
    """Both precisions: one job, since their processes share the time."""
    yield Job("curves", lambda: _compared(context))


def _compared(context: Context) -> Sequence[Row]:
    sides = (CPU, TRITON) if context.dry else (CPU, TRITON, COMPILED)
    folder = context.work / "curves"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    write_repository(folder / "data")
    configs = {
        (precision, side.name): _config(context, folder, precision, side) for precision in TOLERANCES for side in sides
    }
    cpus = {(precision, side.name): side.cpu for precision in TOLERANCES for side in sides}
    if context.dry:
        seconds = {key: _train_here(config) for key, config in configs.items()}
    else:
        seconds = _train_beside(context, {key: (config, cpus[key]) for key, config in configs.items()})
    rows = []
    for precision in TOLERANCES:
        truth = _losses(folder, precision, CPU.name)
        for side in sides[1:]:
            rows.append(_row(precision, side.name, _losses(folder, precision, side.name), truth, seconds))
    return rows


def _config(context: Context, folder: Path, precision: str, side: Side) -> Path:
    """The recipe with its paths, tokenizer and precision replaced; a few small steps in a dry run."""
    tables = tomllib.loads((ROOT / "examples" / "demo" / "tiny.toml").read_text(encoding="utf-8"))
    name = f"{precision}-{side.name}"
    tables["run"] |= {"name": name, "output": str(folder / name)}
    tables["tokenizer"] = {"path": "bytes"}
    tables["data"] = {"cache": str(folder / f"cache-{name}")}
    tables["train"]["precision"] = precision
    tables["kernels"] = dict(side.kernels)
    for source, table in tables["sources"].items():
        table["data"] = [str(folder / "data" / source)]
    if context.dry:
        tables["model"] |= {"hidden_size": 16, "intermediate_size": 32, "seq_length": 8}
        tables["train"] |= {"global_batch_size": 4, "micro_batch_size": 2}
        tables["validation"] = {"fraction": 0}
        for stage in tables["stages"]:
            stage |= {"steps": 1}
            stage.get("lr", {}).pop("warmup", None)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(tables), encoding="utf-8")
    return path


def _train_here(config: Path) -> float:
    """In this process, through the same frame as the command: a dry run's, where loading torch would take longest."""
    from megatron.config.load import config_from_tables
    from megatron.trainer.resume import Start
    from megatron.trainer.session import run_training

    begin = time.perf_counter()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        code = run_training(config_from_tables(json.loads(config.read_text(encoding="utf-8"))), Start(False, None))
    if code:
        raise RuntimeError(f"training of {config.stem} ended with {code}")
    return time.perf_counter() - begin


def _train_beside(context: Context, configs: Mapping[Any, tuple[Path, bool]]) -> dict[Any, float]:
    """Each in a process of its own, all at once. RuntimeError with the end of its log where one fails."""
    processes = {key: _start(config, cpu) for key, (config, cpu) in configs.items()}
    begin, seconds = time.perf_counter(), {}
    try:
        for key, process in processes.items():
            process.wait(timeout=max(60.0, context.clock.left))
            seconds[key] = time.perf_counter() - begin
            if process.returncode:
                log = configs[key][0].with_suffix(".log").read_text(encoding="utf-8", errors="replace")
                raise RuntimeError(f"training of {configs[key][0].stem} ended with {process.returncode}: {log[-1500:]}")
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
    return seconds


def _start(config: Path, cpu: bool) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "4"} | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})
    program = (
        "import json, sys; sys.path[:0] = [sys.argv[1]]; from megatron.config.load import config_from_tables; "
        "from megatron.trainer.resume import Start; from megatron.trainer.session import run_training; "
        "sys.exit(run_training(config_from_tables(json.load(open(sys.argv[2]))), Start(False, None)))"
    )
    with open(config.with_suffix(".log"), "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", program, str(ROOT), str(config)], stdout=log, stderr=log, env=environment
        )


def _losses(folder: Path, precision: str, side: str) -> list[float]:
    lines = (folder / f"{precision}-{side}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def _row(
    precision: str, side: str, losses: Sequence[float], truth: Sequence[float], seconds: Mapping[Any, float]
) -> Row:
    apart = apart_of(losses, truth)
    at = max(range(len(apart)), key=lambda step: apart[step])
    row: Row = {
        "precision": precision,
        "kernels": side,
        "steps": len(truth),
        "apart": apart[at],
        "at step": at + 1,
        "at step 1": apart[0],
        "last loss": losses[-1],
        "CPU's last loss": truth[-1],
        "seconds": seconds[precision, side],
        "CPU's seconds": seconds[precision, CPU.name],
    }
    if not apart[at] <= TOLERANCES[precision]:
        row["failed"] = f"the curves are {apart[at]:.2%} apart, and may be {TOLERANCES[precision]:.2%}"
    return row


def apart_of(losses: Sequence[float], truth: Sequence[float]) -> list[float]:
    """Relative differences by step, infinite where one is no number. ValueError where the curves have not the same
    number of steps."""
    apart = [abs(a - b) / abs(b) for a, b in zip(losses, truth, strict=True)]
    return [step if math.isfinite(step) else math.inf for step in apart]
