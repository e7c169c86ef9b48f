"""Export of a checkpoint of about a billion parameters against a plain copy of the same bytes on the same disk.

Both in one run, taking turns, medians; both begin with nothing of their source in the page cache (as far as the kernel
follows posix_fadvise), and both end when every byte is on the disk (fsync). The copy is `shutil.copyfile` of the
exported files of tensors. The export verifies the checkpoint's SHA-256, looks at every value, keeps a checksum of every
tensor for a later start, and writes and publishes the whole folder, without the proof. `command` is a new process with
all its imports; `export` is what it does after them. Memory is VmHWM, the most that was resident at any time.

    python benchmarks/export.py --folder /tmp/bench                  # 1.24 B parameters in bf16: 2.5 GB three times
    python benchmarks/export.py --preset llama-160m --rounds 1       # a trial
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.checkpoint.imported import write_imported
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection
from megatron.engines.model_parts import whole_parameters
from megatron.hf.continued_config import continued_config

ROOT = Path(__file__).resolve().parents[1]
WORDS = 128_256
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CHILD = """
import json, sys, time
from pathlib import Path
from megatron.hf.checkpoint_source import open_source
from megatron.hf.export import Writing, export_checkpoint
began, cpu = time.perf_counter(), time.process_time()
source = open_source(Path(sys.argv[1]), later=True)
writing = Writing(int(sys.argv[4]), int(sys.argv[5]) or None)
export_checkpoint(source, Path(sys.argv[2]), dtype=sys.argv[3], proven=False, writing=writing)
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
status = Path("/proc/self/status").read_text()
words = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith("Vm")}
print(json.dumps({"seconds": seconds, "cpu": cpu, "VmHWM": int(words["VmHWM"]) * 1024}))
"""
NOTHING = "import megatron.hf.export, pathlib; print(pathlib.Path('/proc/self/status').read_text())"


class RandomTensors:
    """A TensorSource of random values, which are the same few megabytes again and again."""

    def __init__(self, shape: ModelShape, dtype: torch.dtype) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in whole_parameters(shape).items()}
        self._dtype = dtype
        self._values = (0.02 * torch.randn(1 << 23, generator=torch.Generator().manual_seed(0))).to(dtype)

    def names(self) -> Iterable[str]:
        """Every parameter."""
        return self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Of all."""
        return self._dtype

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A box."""
        size = prod(shape)
        return self._values[:size].reshape(tuple(shape))

    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max(map(prod, self._shapes.values())) * self._dtype.itemsize


def make_checkpoint(folder: Path, preset: str, dtype: str) -> tuple[Path, ModelShape, int]:
    """A random checkpoint in `folder`; also its shape, and the bytes of its largest tensor."""
    shape = resolve_model(ModelSection(preset=preset, seq_length=2048), WORDS)
    source = RandomTensors(shape, DTYPES[dtype])
    path = folder / "checkpoint"
    write_imported(path, source, shape.to_json(), [], continued_config(shape, "random", "random", path, None), {})
    return path, shape, source.largest()


def forget(folder: Path) -> None:
    """Asks the kernel to drop the folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed_export(checkpoint: Path, output: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of the command and of the export in it, and its memory."""
    forget(checkpoint)
    shutil.rmtree(output, ignore_errors=True)
    words = [str(checkpoint), str(output), arguments.dtype, str(arguments.max_shard_size), str(arguments.workers)]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *words], check=True, capture_output=True, text=True, env=environment()
    )
    command = time.perf_counter() - began
    return {"command": command, **json.loads(done.stdout)}


def timed_copy(source: Path, target: Path) -> float:
    """Seconds to copy the files of tensors and have them on the disk."""
    forget(source)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    began = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        shutil.copyfile(path, target / path.name)
        descriptor = os.open(target / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - began


def environment() -> dict[str, str]:
    """So that the child finds this tree."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def idle_memory() -> int:
    """VmHWM of a process that has only imported what an export needs."""
    done = subprocess.run(
        [sys.executable, "-c", NOTHING], check=True, capture_output=True, text=True, env=environment()
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def report(rounds: list[dict[str, float]], copies: list[float], size: int, largest: int, idle: int) -> str:
    """The table."""
    export, command = (statistics.median(entry[key] for entry in rounds) for key in ("seconds", "command"))
    copy = statistics.median(copies)
    memory = max(entry["VmHWM"] for entry in rounds)
    rows = [
        ("plain copy, fsync", copy, 1.0),
        ("export", export, copy / export),
        ("command, with its imports", command, copy / command),
    ]
    lines = ["| | seconds | GB/s | ratio to the copy |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {taken:.2f} | {size / 1e9 / taken:.2f} | {ratio:.2f} |" for name, taken, ratio in rows]
    bound = 2 * largest + 500 * 10**6
    cpu = statistics.median(entry["cpu"] for entry in rounds)
    lines += [
        "",
        f"Processor time of the export {cpu:.2f} s, on all its threads.",
        f"Peak resident memory {memory / 1e6:.0f} MB ({idle / 1e6:.0f} MB of it Python, torch and other libraries); "
        f"largest tensor {largest / 1e6:.0f} MB, bound 2 x that + 500 MB = {bound / 1e6:.0f} MB.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Makes the checkpoint, times both, prints the table, cleans up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--preset", default="llama-1b")
    parser.add_argument("--stored", choices=list(DTYPES), default="bfloat16", help="dtype of the checkpoint")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="dtype of the export")
    parser.add_argument("--max-shard-size", type=int, default=5 * 10**9)
    parser.add_argument("--workers", type=int, default=0, help="0: as the command chooses")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="export-bench-", dir=arguments.folder) as scratch:
        folder = Path(scratch)
        checkpoint, shape, largest = make_checkpoint(folder, arguments.preset, arguments.stored)
        idle = idle_memory()
        rounds, copies = [], []
        for _ in range(arguments.rounds):
            rounds.append(timed_export(checkpoint, folder / "export", arguments))
            copies.append(timed_copy(folder / "export", folder / "copy"))
            shutil.rmtree(folder / "copy")
        size = sum(path.stat().st_size for path in (folder / "export").glob("*.safetensors"))
    count = shape.parameter_count() / 1e9
    print(f"{count:.2f} B parameters, {arguments.stored} to {arguments.dtype}, {size / 1e9:.2f} GB")
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, {platform.platform()}"
    )
    print(report(rounds, copies, size, largest, idle))


if __name__ == "__main__":
    main()
