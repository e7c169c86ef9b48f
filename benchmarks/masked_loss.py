"""An instruction stage, whose loss is on the targets that masks mark, against pre-training on the same samples, packed.

One process, one engine, one set of files; the two read their batches through their own loaders and take steps in
turns. Inputs are equal to the byte (the batch digests are compared); only targets differ. Medians over the rounds, of
the whole step (read, forward, backward, update) and of reading alone.

    python benchmarks/masked_loss.py                                  # the demo's model, fp32
    python benchmarks/masked_loss.py --precision bf16 --rounds 31 --json masked.json
    python benchmarks/masked_loss.py --marked 0.02                    # answers of a fiftieth of the tokens

On a shared machine read `cpu`, the processor time of a step, and take --threads 1. The load average of the machine is
printed before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config.load import config_from_tables
from megatron.config.model_shape import resolve_model
from megatron.config.schema import RunConfig
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.loader import Batch, BatchLoader
from megatron.data.loss_mask import LossMaskWriter
from megatron.data.native import backend_name
from megatron.engines.build import build_engine
from megatron.engines.kernel_choice import choose_kernels
from megatron.engines.precision import COMPUTE_DTYPES
from megatron.kernels.choice import Kernels
from megatron.planner.resolve import resolve_run

SIDES = ("pre-training", "instruction")
Rows = dict[str, dict[str, float]]


def write_chats(prefix: Path, tokens: int, vocabulary: int, marked: float) -> None:
    """Documents of 20 to 1,000 tokens, in one to four turns; of each turn the end is marked."""
    rng = np.random.default_rng(1)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.mask = LossMaskWriter(prefix)
        written = 0
        while written < tokens:
            bits = []
            for _ in range(int(rng.integers(1, 5))):
                length = int(np.exp(rng.uniform(np.log(20), np.log(250))))
                answer = int(length * marked * rng.uniform(0.2, 1.8))
                bits += [0] * (length - answer) + [1] * answer
            writer.add_document(rng.integers(0, vocabulary, len(bits)))
            writer.mask.add(np.array(bits, np.uint8))
            written += len(bits)


def config_of(folder: Path, side: str, arguments: argparse.Namespace) -> RunConfig:
    """The run of one side; the two differ in the objective alone."""
    steps = arguments.rounds + 2
    stage = {"name": side, "steps": steps, "mixture": {"chats": 1}, "lr": {"peak": 1e-4}}
    if side == "instruction":
        stage["objective"] = "instruction"
    tables: dict[str, Any] = {
        "run": {"name": "masked-loss", "output": str(folder / "run")},
        "tokenizer": {"path": "bytes"},
        "model": {"preset": arguments.preset, "seq_length": arguments.seq_length},
        "sources": {"chats": {"data": [str(folder / "chats")], "dry": "repeat"}},
        "data": {"cache": str(folder / "cache")},
        "train": {
            "global_batch_size": arguments.global_batch_size,
            "micro_batch_size": arguments.micro_batch_size,
            "precision": arguments.precision,
        },
        "validation": {"fraction": "0"},
        "stages": [stage],
    }
    return config_from_tables(tables)


def batches_of(config: RunConfig) -> Iterator[Batch]:
    """Batches read when they are asked for, in the calling thread."""
    resolved = resolve_run(config)
    with BatchLoader(resolved.stream(), resolved.sources, config.train.micro_batch_size, 0) as loader:
        yield from loader


def stepper(config: RunConfig, vocabulary: int) -> Callable[[Batch], float]:
    """The engine of a run on this machine; gives seconds that its step took."""
    shape = resolve_model(config.model, vocabulary)
    precision, train = config.train.precision, config.train
    rows = train.micro_batch_size, config.model.seq_length
    choice = choose_kernels(config.kernels, shape, COMPUTE_DTYPES[precision], rows)
    print(f"{shape.parameter_count() / 1e6:.2f}M parameters, {precision}; kernels: {choice.reason}")
    engine = build_engine(
        shape, config.optimizer, config.parallel, train, 0, precision, kernels=Kernels(**choice.kernels)
    )

    def step(batch: Batch) -> float:
        begin = time.perf_counter()
        if not engine.train_step(batch.microbatches, 1e-4).updated:
            raise SystemExit("the step made no update")
        return time.perf_counter() - begin

    return step


def measure(arguments: argparse.Namespace, folder: Path) -> Rows:
    """Both sides in turns; the one that begins changes from round to round, and two rounds are not counted."""
    write_chats(folder / "chats", arguments.tokens, arguments.vocabulary, arguments.marked)
    configs = {side: config_of(folder, side, arguments) for side in SIDES}
    loaders = {side: batches_of(config) for side, config in configs.items()}
    step = stepper(configs[SIDES[0]], arguments.vocabulary)
    seen: dict[str, dict[str, list[float]]] = {
        side: {"wall": [], "cpu": [], "read": [], "targets": []} for side in SIDES
    }
    for number in range(arguments.rounds + 2):
        digests = set()
        for side in SIDES if number % 2 else reversed(SIDES):
            begin, cpu = time.perf_counter(), time.process_time()
            batch = next(loaders[side])
            read = time.perf_counter() - begin
            step(batch)
            wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
            digests.add(batch.digest)
            if number >= 2:
                for key, value in (("wall", wall), ("cpu", cpu), ("read", read), ("targets", batch.valid_targets)):
                    seen[side][key].append(float(value))
        if len(digests) > 1:
            raise SystemExit("the two sides were given different inputs")
    medians = {side: {key: statistics.median(values) for key, values in rows.items()} for side, rows in seen.items()}
    return {side: row | {"best": min(seen[side]["wall"])} for side, row in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-demo")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--global-batch-size", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--marked", type=float, default=0.3, help="share of the tokens that is learned, about")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of the data set")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    loads.append(os.getloadavg()[0])
    tokens = arguments.global_batch_size * arguments.seq_length
    print(f"data: {backend_name()}; torch {torch.__version__}, {arguments.threads} threads of {os.cpu_count()} cores")
    print(f"{tokens} tokens a step, medians of {arguments.rounds} rounds in turns")
    print(f"{'':14}{'wall s':>9}{'tokens/s':>10}{'best s':>9}{'cpu s':>9}{'read ms':>9}{'targets':>9}")
    for side, row in rows.items():
        row["tokens_per_second"] = tokens / row["wall"]
        print(
            f"{side:14}{row['wall']:9.3f}{row['tokens_per_second']:10.0f}{row['best']:9.3f}{row['cpu']:9.3f}"
            f"{1000 * row['read']:9.2f}{row['targets']:9.0f}"
        )
    ratios = {key: rows["pre-training"][key] / rows["instruction"][key] for key in ("wall", "best", "cpu")}
    print(
        f"tokens a second of the instruction stage: {ratios['wall']:.3f} of pre-training's by the clock, "
        f"{ratios['best']:.3f} by the best step, {ratios['cpu']:.3f} by processor time; "
        f"load average {loads[0]:.1f} before, {loads[1]:.1f} after"
    )
    if arguments.json:
        words = {key: str(value) for key, value in vars(arguments).items()}
        record = {"arguments": words, "sides": rows, "ratios": ratios, "load_average": loads}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
