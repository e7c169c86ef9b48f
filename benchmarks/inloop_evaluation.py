"""What evaluation while a run trains costs: perplexity by source against training's forward pass, and what a step takes
with and without a process that evaluates beside it.

Perplexity: tokens a second of `Engine.evaluate` on held-out batches, as the run makes them, against the forward pass
alone of `Engine.train_step` on training batches, over the same engine in turns; medians; the bound is 0.9x. Both have
micro-batches of the same size. Beside: the trainer's step while a niced process evaluates, against steps without.

    python benchmarks/inloop_evaluation.py
    python benchmarks/inloop_evaluation.py --layers 6 --width 256 --rounds 9 --beside --json inloop.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from trainer_overhead import write_corpus

from megatron.config.load import load_config
from megatron.metrics.console import Console
from megatron.trainer.build import Built, build
from megatron.trainer.pace import Pace
from megatron.trainer.resume import Start
from megatron.trainer.run_folder import RunFolder
from megatron.trainer.signals import StopSignals
from megatron.trainer.state import TrainerState
from megatron.trainer.stopping import Stopping

BOUND = 0.9

CONFIG = """
[run]
name = "in-loop"
output = "{folder}/run"
[tokenizer]
path = "bytes"
[model]
vocab_size = 4096
seq_length = {length}
hidden_size = {width}
num_hidden_layers = {layers}
num_attention_heads = {heads}
intermediate_size = {inner}
tie_word_embeddings = true
[sources.code]
data = ["{folder}/code"]
max_epochs = 1000
[sources.text]
data = ["{folder}/text"]
max_epochs = 1000
[validation]
fraction = 0.2
samples = {samples}
[train]
global_batch_size = {batch}
micro_batch_size = {micro}
precision = "{precision}"
[[stages]]
name = "only"
steps = 1000
mixture = {{ code = 0.3, text = 0.7 }}
lr = {{ peak = 1e-3 }}
[checkpoint]
every = 1000000
"""


def main() -> int:
    """Prints the medians and the ratio; 1 where the bound is missed."""
    args = arguments()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(("code", "text")):
            write_corpus(Path(folder) / name, seed)
        text = CONFIG.format(
            folder=folder,
            length=args.length,
            width=args.width,
            layers=args.layers,
            heads=args.width // 32,
            inner=args.width * 11 // 4,
            batch=args.batch,
            micro=args.micro_batch_size,
            samples=args.samples,
            precision=args.precision,
        )
        (Path(folder) / "run.toml").write_text(text)
        found = measure(Path(folder), args)
    print(f"{found['parameters'] / 1e6:.1f} M parameters, {found['precision']}, {found['device']}")
    print(f"training's forward pass   {found['forward']:10.0f} tokens/s")
    print(f"perplexity by source      {found['perplexity']:10.0f} tokens/s, {found['ratio']:.2f}x (bound {BOUND})")
    if "beside" in found:
        print(f"a step with a busy process of niceness 10 beside it: {found['beside']:.2f}x of a step without")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(found["ratio"] < BOUND)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--samples", type=int, default=16, help="held-out sequences of each of the two sources")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--beside", action="store_true", help="measure steps beside a busy process, too")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Medians of both sides, taken in turns on one engine."""
    run = RunFolder(folder / "run")
    run.open()
    config = load_config(folder / "run.toml")
    built = build(
        config,
        Start(),
        False,
        run,
        TrainerState(),
        Console(10**9, terminal=False),
        Stopping(StopSignals(lambda number: None), Pace()),
    )
    assert built is not None
    engine: Any = built.run.engine
    validate = next(hook for hook in built.run.hooks if type(hook).__name__ == "Validate")
    held_out = validate._microbatches
    batch = next(iter(built.loader)).microbatches
    device = engine._mesh.device
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    engine.train_step(batch, 1e-3)

    def forward() -> None:
        for microbatch in batch:
            engine._run(engine._place(microbatch), 1.0)
        engine._weights.looked()

    sides = {"forward": (forward, batch), "perplexity": (lambda: engine.evaluate(held_out), held_out)}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(args.rounds + 2):
        for name, (work, rows) in sides.items():
            seconds = timed(work, finish)
            if number >= 2:
                taken[name].append(sum(m.tokens.numel() for m in rows) / seconds)
    found: dict[str, Any] = {name: statistics.median(values) for name, values in taken.items()}
    found |= {"ratio": found["perplexity"] / found["forward"], "parameters": engine.parameter_count()}
    found |= {"device": engine.describe()["device"], "precision": engine.describe()["precision"], "rounds": args.rounds}
    if args.beside:
        found["beside"] = beside(engine, batch, args.rounds, finish)
    close(built, run)
    return found


def beside(engine: Any, batch: Sequence[Any], rounds: int, finish: Callable[[], None]) -> float:
    """Seconds of a step while a process of niceness 10 multiplies matrices with one thread, over those without."""
    busy = "import os, torch; os.nice(10); torch.set_num_threads(1); x = torch.randn(512, 512)\nwhile True: x @ x"
    with_it: list[float] = []
    without: list[float] = []
    for _ in range(rounds):
        without.append(timed(lambda: engine.train_step(batch, 1e-3), finish))
        child = subprocess.Popen([sys.executable, "-c", busy], env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            time.sleep(4)  # until it has loaded torch
            with_it.append(timed(lambda: engine.train_step(batch, 1e-3), finish))
        finally:
            child.kill()
            child.wait()
    return statistics.median(with_it) / statistics.median(without)


def timed(work: Callable[[], object], finish: Callable[[], None]) -> float:
    """Seconds of a call."""
    finish()
    began = time.perf_counter()
    work()
    finish()
    return time.perf_counter() - began


def close(built: Built, run: RunFolder) -> None:
    """Ends what was opened."""
    built.close()
    run.close()


if __name__ == "__main__":
    sys.exit(main())
