"""What tests of streaming share: checkpoints of made models, cut over ranks, and exports by real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from checkpoint.cut_tensors import cut

from megatron.checkpoint.manager import CheckpointManager, open_checkpoint
from megatron.checkpoint.tensor_shards import TensorShard

ROOT = Path(__file__).resolve().parents[2]


def recut(checkpoint: Path, folder: Path, way: str = "grid", ranks: int = 4) -> Path:
    """The same checkpoint, its tensors cut as so many ranks hold them; in `folder`."""
    found = open_checkpoint(checkpoint)
    tensors = found.model().all()
    shards: dict[str, list[TensorShard]] = {}
    for rank in range(ranks):
        for name, parts in cut(tensors, way, rank, ranks).items():
            shards.setdefault(name, []).extend(parts)
    files: dict[str, bytes | Path] = {
        path.relative_to(checkpoint).as_posix(): path
        for path in [checkpoint / "config.toml", *(checkpoint / "tokenizer").glob("*")]
    }
    return CheckpointManager(folder).save(0, shards, {}, {}, found.state, files)


def run(
    *words: str | Path, before: Callable[[], None] | None = None, limit: float = 120
) -> subprocess.CompletedProcess[str]:
    """A tool of this tree by its file name and arguments, as a user would start it. before: called in the process."""
    name, *rest = map(str, words)
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{name}.py"), *rest],
        capture_output=True,
        text=True,
        timeout=limit,
        preexec_fn=before,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def python(program: str, *words: str | Path, limit: float = 120) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=limit,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
