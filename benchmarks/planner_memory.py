"""The memory that the planner predicts of a rank, against the fullest moment of a real optimizer step of that layout.

Real processes on gloo run megatron's engines on one core each. Measured is every allocation of torch's CPU allocator,
as its profiler records them during the third step, on top of the tensors that were there before it; a share of gloo's
asynchronous buffers is freed a little sooner or later from run to run.

    python benchmarks/planner_memory.py [NAME …] [--list]
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from planner.live_allocations import Run, step_peaks

from megatron.config.layout import resolve_layout
from megatron.config.layout_checks import BatchShape
from megatron.config.schema import KernelsSection, OptimizerSection
from megatron.planner.rank_memory import RankMemory, rank_memory

MODEL: dict[str, Any] = {
    "seq_length": 128,
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 704,
    "document_mask": False,
}
WORDS = MODEL | {"vocab_size": 16000}
GPT = MODEL | {
    "preset": "gpt2",
    "num_key_value_heads": 8,
    "intermediate_size": 1024,
    "max_position_embeddings": 128,
    "hidden_dropout": 0.1,
}
DEEP = MODEL | {"num_hidden_layers": 12, "qk_norm": "head", "norm_place": "both"}


def _pipeline(**rest: Any) -> Run:
    return Run(2, MODEL, {"pipeline": 2} | rest, {}, microbatches=4)


RUNS: dict[str, Run] = {
    "one process, fp32": Run(1, MODEL, {}, {}),
    "one process, bf16": Run(1, MODEL, {}, {}, "bf16"),
    "bf16 gradients": Run(1, MODEL, {}, {}, "bf16", gradients="bf16"),
    "gradients added in products": Run(1, MODEL, {}, {}, "bf16", {"weight_gradients": "fused"}),
    "fp8 products": Run(1, MODEL, {}, {}, "bf16", {"fp8": True}),
    "Muon": Run(1, MODEL, {}, {"name": "muon"}),
    "16,000 words, bf16": Run(1, WORDS, {}, {}, "bf16", rows=16),
    "GPT-2, dropout, unfused": Run(1, GPT, {}, {}, "bf16", {"attention": "unfused"}),
    "12 layers, both norms, sdpa": Run(1, DEEP, {}, {}, "bf16", {"attention": "sdpa"}),
    "recompute full": Run(1, DEEP, {"recompute": "full"}, {}),
    "recompute attention": Run(1, MODEL, {"recompute": "selective"}, {}),
    "recompute operations": Run(
        1, MODEL, {"recompute": "selective", "recompute_policy": "operations"}, {}, "fp32", {"attention": "sdpa"}
    ),
    "data 2": Run(2, MODEL, {}, {}, "bf16"),
    "data 2, optimizer sharded": Run(2, MODEL, {"data_shard": "optimizer"}, {}, "bf16"),
    "data 2, gradients sharded": Run(2, MODEL, {"data_shard": "gradients"}, {}, "bf16"),
    "data 2, fully sharded": Run(2, DEEP, {"data_shard": "full"}, {}, "bf16"),
    "tensor 2": Run(2, MODEL, {"tensor": 2}, {}),
    "tensor 2 with sequence": Run(2, MODEL, {"tensor": 2, "sequence": True}, {}),
    "context 2": Run(2, MODEL, {"context": 2}, {}),
    "context 2, keys gathered": Run(2, MODEL, {"context": 2, "context_method": "gather"}, {}),
    "pipeline 2, 1f1b": _pipeline(),
    "pipeline 2, interleaved": _pipeline(schedule="interleaved"),
    "pipeline 2, zero-bubble": _pipeline(schedule="zero-bubble"),
    "pipeline 2, zbv": _pipeline(schedule="zbv"),
    "pipeline 2, recompute full": _pipeline(recompute="full"),
    "DeepSpeed, ZeRO 0": Run(2, MODEL, {"engine": "deepspeed"}, {}, "bf16"),
    "DeepSpeed, ZeRO 1": Run(2, MODEL, {"engine": "deepspeed", "data_shard": "optimizer"}, {}, "bf16"),
    "DeepSpeed, ZeRO 2": Run(2, MODEL, {"engine": "deepspeed", "data_shard": "gradients"}, {}, "bf16"),
    "DeepSpeed, ZeRO 3": Run(2, MODEL, {"engine": "deepspeed", "data_shard": "full"}, {}, "bf16"),
}


def planned(run: Run, pipeline_rank: int) -> RankMemory:
    """The planner's answer for the first data rank at a place of the pipeline, on CPUs."""
    given = {name: value for name, value in (run.kernels or {}).items() if name in KernelsSection.model_fields}
    return rank_memory(
        run.shape,
        run.section,
        resolve_layout(run.section, run.world),
        run.train,
        OptimizerSection(**run.optimizer),
        BatchShape(run.shape.max_position_embeddings, run.train.global_batch_size),
        pipeline_rank,
        KernelsSection(**given),
        device="cpu",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="layouts whose names begin so (default: all)")
    parser.add_argument("--list", action="store_true", help="their names")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    chosen = {name: run for name, run in RUNS.items() if not args.names or name.startswith(tuple(args.names))}
    if args.list or not chosen:
        print("\n".join(RUNS))
        return 0 if chosen else 2
    print(f"torch {torch.__version__}; MB of 10^6 bytes\n")
    print("| layout | rank | fullest at | predicted | measured | error | weights, gradients, optimizer | activations |")
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    errors: list[float] = []
    for name, run in chosen.items():
        errors += show(name, run)
    print(f"\n{len(errors)} ranks, largest error {max(errors, key=abs):+.1%}, mean of sizes "
          f"{sum(map(abs, errors)) / len(errors):.1%}")  # fmt: skip
    return 0


def show(name: str, run: Run) -> list[float]:
    """Prints a line for each place of the pipeline, the fullest of its ranks measured; their errors."""
    layout = resolve_layout(run.section, run.world)
    places = [layout.place_of(rank).pipeline for rank in range(run.world)]
    peaks = step_peaks(run, timeout=300)
    errors = []
    for rank in range(layout.pipeline):
        measured = max(peak for peak, place in zip(peaks, places, strict=True) if place == rank)
        found = planned(run, rank)
        errors.append(found.total / measured - 1)
        state = replace(found, receive=0, activations=0, logits=0, workspace=0).total
        print(
            f"| {name} | {rank} | {found.moment} | {found.total / 1e6:.2f} | {measured / 1e6:.2f} | {errors[-1]:+.1%} "
            f"| {state / 1e6:.2f} | {(found.activations + found.logits) / 1e6:.2f} |",
            flush=True,
        )
    return errors


if __name__ == "__main__":
    raise SystemExit(main())
