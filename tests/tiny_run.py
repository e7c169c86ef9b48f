"""A run small enough to be trained many times in a test: two byte-level sources, three training stages, 24 steps."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import ranks  # noqa: F401 (its import tells the fork server what to load)

from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.tokenizers.byte_level import ByteTokenizer

ROOT = Path(__file__).resolve().parents[1]
_forked = multiprocessing.get_context("forkserver")
STEPS = 24

CONFIG = """
[run]
name = "tiny"
output = "{output}"
seed = 7

[tokenizer]
path = "bytes"

[model]
seq_length = 16
hidden_size = 16
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 32

[sources.python]
group = "code"
data = ["{data}/python"]
max_epochs = 4

[sources.prose]
group = "text"
data = ["{data}/prose"]
max_epochs = 4

[data]
cache = "{data}/cache"

[validation]
fraction = 0.1
every = 5
samples = 4

[train]
global_batch_size = 8
micro_batch_size = 4
precision = "fp32"

[[stages]]
name = "balanced"
steps = 8
mixture = {{ code = 0.5, text = 0.5 }}
lr = {{ warmup = "2 steps", peak = 1e-2, shape = "cosine", final = 1e-3, horizon = "30 steps" }}

[[stages]]
name = "text"
steps = 6
mixture = {{ code = 0.1, text = 0.9 }}

[[stages]]
name = "cooldown"
steps = 10
mixture = {{ python = 0.2, prose = 0.8 }}
lr = {{ start = "current", shape = "linear", final = 1e-5 }}

[checkpoint]
every = 3
keep = 2
"""


def write_corpus(prefix: Path, seed: int, documents: int = 60, highest: int = 255) -> None:
    """An indexed dataset of random bytes with the byte tokenizer's manifest; few letters a document, so learnable."""
    generator = np.random.default_rng(seed)
    tokenizer = ByteTokenizer()
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            letters = generator.integers(0, highest + 1, size=3)
            body = letters[generator.integers(0, 3, size=int(generator.integers(5, 120)))]
            writer.add_document(np.append(body, tokenizer.eod_id))
        writer.manifest_fields["tokenizer"] = {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        }


def make_run(folder: Path, name: str = "run", text: str = CONFIG) -> Path:
    """Corpora (once) and a config under `folder`; gives the config's path. The run writes to `folder/name`."""
    data = folder / "data"
    if not data.exists():
        write_corpus(data / "python", 1)
        write_corpus(data / "prose", 2)
    path = folder / f"{name}.toml"
    path.write_text(text.format(output=folder / name, data=data))
    return path


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def train(config: Path, *words: str) -> Done:
    """Trains in this process, through the same frame as the command line; loading torch once saves minutes."""
    from megatron.commands.frame import run_command
    from megatron.commands.train import main

    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = run_command(main, [str(config), *words])
    return Done(code, out.getvalue(), err.getvalue())


class Started:
    """Training in a process of its own."""

    def __init__(self, config: Path, words: tuple[str, ...]) -> None:
        self._process = _forked.Process(
            target=_train_in_a_process, args=([str(config), *words], config.with_suffix(".log")), daemon=True
        )
        self._process.start()

    def send_signal(self, number: int) -> None:
        """To the process."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self, seconds: float) -> int | None:
        """Its exit code; of one that a signal ended the signal's number, negative; None where it still runs."""
        self._process.join(seconds)
        return self._process.exitcode


def start(config: Path, *words: str) -> Started:
    """Starts training in a process of its own, forked from the server of `ranks`, which has torch loaded; end it with
    `stop`."""
    return Started(config, words)


def _train_in_a_process(argv: list[str], log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    from megatron.commands.frame import run_command
    from megatron.commands.train import main

    code = run_command(main, argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def stop(process: Started) -> None:
    """Ends a process for certain."""
    if process.wait(0) is None:
        process.send_signal(signal.SIGKILL)
    process.wait(30)


def rows_of(output: Path) -> list[dict[str, Any]]:
    """Training rows of metrics.jsonl, in the order of the file."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def validation_of(output: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, losses by source) of metrics.jsonl's validation rows."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["validation"]) for row in rows if "validation" in row]


def curve_of(output: Path) -> list[tuple[Any, ...]]:
    """What must be equal bit for bit between two runs: one tuple a step."""
    keys = ("step", "training_stage", "consumed_samples", "consumed_tokens", "loss", "grad_norm", "lr", "batch_digest")
    return [(*(row[key] for key in keys), json.dumps(row["loss_by_source"])) for row in rows_of(output)]


def exit_record(output: Path) -> dict[str, Any]:
    """exit.json."""
    record: dict[str, Any] = json.loads((output / "exit.json").read_text())
    return record


def steps_in(output: Path) -> list[int]:
    """Steps of the published checkpoints."""
    return sorted(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*"))
