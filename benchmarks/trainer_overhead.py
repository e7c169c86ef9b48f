"""How much of a step is not forward, backward and optimizer, on a model of the demo's shape.

Two figures, from one process and the same batches: the share of a run's wall time outside Engine.train_step, as the
run itself records it (waiting for data, digests, logging, the loop); and the whole trainer's step against a bare loop
that calls Engine.train_step on batches made beforehand, which also shows what the loader's thread takes from the
engine. Medians; the acceptance bound is 3 %.

    python benchmarks/trainer_overhead.py [--steps N] [--layers L] [--global-batch-size B]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config.load import load_config
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.metrics.console import Console
from megatron.tokenizers.byte_level import ByteTokenizer
from megatron.trainer.build import build
from megatron.trainer.loop import train
from megatron.trainer.resume import Start
from megatron.trainer.run_folder import RunFolder
from megatron.trainer.state import TrainerState

BOUND = 0.03

CONFIG = """
[run]
name = "overhead"
output = "{folder}/{name}"
[tokenizer]
path = "bytes"
[model]
vocab_size = 4096
seq_length = 512
hidden_size = 256
num_hidden_layers = {layers}
num_attention_heads = 8
num_key_value_heads = 4
intermediate_size = 704
tie_word_embeddings = true
[sources.code]
data = ["{folder}/code"]
max_epochs = 1000
[sources.text]
data = ["{folder}/text"]
max_epochs = 1000
[train]
global_batch_size = {batch}
micro_batch_size = 8
precision = "auto"
[[stages]]
name = "only"
steps = {steps}
mixture = {{ code = 0.3, text = 0.7 }}
lr = {{ peak = 1e-3 }}
[checkpoint]
every = 1000000
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--global-batch-size", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(("code", "text")):
            write_corpus(Path(folder) / name, seed)
        text = CONFIG.format(
            folder=folder, name="run", layers=args.layers, batch=args.global_batch_size, steps=args.steps
        )
        (Path(folder) / "run.toml").write_text(text)
        bare, whole, share = measure(Path(folder))
    print(f"bare Engine.train_step        {1e3 * bare:8.1f} ms a step")
    print(f"the trainer                   {1e3 * whole:8.1f} ms a step, {whole / bare - 1:+.1%}")
    print(f"outside Engine.train_step     {share:8.2%} of a step (bound {BOUND:.0%})")
    return int(share > BOUND)


def measure(folder: Path) -> tuple[float, float, float]:
    """Median seconds of a bare step and of the trainer's, and the share of the trainer's outside the engine.

    Bare and whole steps alternate on one engine, so that a slow minute of the machine hits both.
    """
    config = load_config(folder / "run.toml")
    run_folder = RunFolder(config.run.output)
    run_folder.open()
    built = build(config, Start(), False, run_folder, TrainerState(), Console(10**9, terminal=False), lambda: False)
    assert built is not None
    bare: list[float] = []

    def bare_step(step: object) -> None:
        """The last hook: repeats the engine's step on the batch just trained on, outside the trainer's clock."""
        begin = time.perf_counter()
        built.run.engine.train_step(step.batch.microbatches, 1e-3)  # type: ignore[attr-defined]
        bare.append(time.perf_counter() - begin)
        built.run.clock.lap()

    built.run.hooks.append(bare_step)
    train(built.run)
    built.close()
    run_folder.close()
    rows = [json.loads(line) for line in run_folder.metrics.read_text().splitlines()]
    rows = [row for row in rows if "validation" not in row][2:]
    whole = statistics.median(row["step_seconds"] for row in rows)
    share = 1 - statistics.median(row["engine_seconds"] / row["step_seconds"] for row in rows)
    return statistics.median(bare[2:]), whole, share


def write_corpus(prefix: Path, seed: int) -> None:
    """A million random bytes in documents of about 2,000."""
    generator = np.random.default_rng(seed)
    tokenizer = ByteTokenizer()
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(500):
            body = generator.integers(0, 256, size=int(generator.integers(100, 4000)))
            writer.add_document(np.append(body, tokenizer.eod_id))


if __name__ == "__main__":
    sys.exit(main())
