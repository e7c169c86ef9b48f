"""The planner's bytes against the real tensors of every rank, over process groups that are only pretended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.config.layout import resolve_layout
from megatron.config.model_shape import resolve_model
from megatron.config.schema import ModelSection, OptimizerSection, ParallelSection
from megatron.planner.layout_bytes import rank_bytes

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from layout_1024 import bytes_of_rank, pretended_mesh

LLAMA = {"hidden_size": 48, "num_hidden_layers": 9, "num_attention_heads": 8, "num_key_value_heads": 2}
LLAMA |= {"intermediate_size": 104, "head_dim": 6}
NEOX = {"attention_bias": True, "mlp_bias": True, "gated_mlp": False, "norm": "layernorm", "hidden_act": "gelu"}
TIED = {"tie_word_embeddings": True}

# layout, processes, what is unlike LLAMA, optimizer, precision; sizes such that shards are uneven and some are empty
CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any], dict[str, Any], str]] = {
    "pp2 x dp3 x tp4, fewer key-value heads": ({"pipeline": 2, "tensor": 4, "data_shard": "full"}, 24, {}, {}, "bf16"),
    "interleaved, tied": (
        {"pipeline": 2, "schedule": "interleaved", "tensor": 2, "sequence": True},
        8,
        TIED,
        {},
        "fp32",
    ),
    "zbv, tied, uneven": ({"pipeline": 3, "schedule": "zbv", "data_shard": "optimizer"}, 15, TIED, {}, "fp64"),
    "hybrid, biases": ({"data_shard": "gradients", "data_replicate": 2, "tensor": 2}, 28, NEOX, {}, "bf16"),
    "context": ({"data_shard": "full", "context": 2, "context_method": "gather"}, 6, NEOX | TIED, {}, "bf16"),
    "context alone": ({"data_shard": "full", "context": 2, "context_method": "gather"}, 2, {}, {}, "bf16"),
    "many shards": ({"data_shard": "full"}, 60, {}, {"name": "sgd", "momentum": 0.9}, "fp32"),
    "muon": ({"pipeline": 2}, 4, {}, {"name": "muon"}, "fp32"),
    "sgd": ({"tensor": 2}, 2, {}, {"name": "sgd"}, "fp32"),
}


@pytest.mark.parametrize("name", CASES)
def test_planned_bytes_are_those_of_the_real_tensors_of_every_rank(name: str) -> None:
    parallel, processes, unlike, optimizer, precision = CASES[name]
    shape = resolve_model(ModelSection(seq_length=32, **(LLAMA | unlike)), 500)
    section, chosen = ParallelSection.model_validate(parallel), OptimizerSection.model_validate(optimizer)
    layout = resolve_layout(section, processes)
    seen = set()
    for rank in range(processes):
        place = layout.place_of(rank)
        shard = place.shard * layout.context + place.context if layout.shard > 1 else 0
        with pretended_mesh(layout, rank) as mesh:
            real = bytes_of_rank(shape, section, mesh, chosen, precision)
        assert real == rank_bytes(shape, section, layout, chosen, precision, place.pipeline, shard), place
        seen.add(real)
    if layout.shard > 1:
        assert len(seen) > 1, "the case was to have uneven shards"


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_the_benchmark_runs(repository: Path, schedule: str) -> None:
    argv = [sys.executable, "benchmarks/layout_1024.py", "--pipeline", "2", "--data", "32", "--tensor", "2"]
    done = subprocess.run([*argv, "--schedule", schedule], capture_output=True, text=True, timeout=240, cwd=repository)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every rank holds what the planner says" in done.stdout and "128 ranks in" in done.stdout
