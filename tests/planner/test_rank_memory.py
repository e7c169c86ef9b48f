"""The planner's memory of a rank: against torch's own orders of actions, real tensors, and the peaks of real steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from planner.live_allocations import Run, step_peaks
from torch_schedules import actions_of

from megatron.config.layout import Layout, resolve_layout
from megatron.config.layout_checks import BatchShape
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.partition import stage_numbers
from megatron.config.schema import KernelsSection, ModelSection, OptimizerSection, ParallelSection, TrainSection
from megatron.planner import rank_memory as planner
from megatron.planner import state_bytes as state
from megatron.planner.in_flight import microbatches_in_flight
from megatron.planner.layout_bytes import rank_bytes, step_bytes
from megatron.planner.rank_memory import RankMemory, communicating_groups, rank_memory
from megatron.planner.state_bytes import state_bytes

SMALL: dict[str, Any] = {
    "seq_length": 64,
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 352,
    "document_mask": False,
}
LLAMA_70B: dict[str, Any] = {
    "seq_length": 8192,
    "vocab_size": 128256,
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 28672,
}


def shape_of(fields: dict[str, Any]) -> ModelShape:
    return resolve_model(ModelSection(**fields), 1)


def memory(
    fields: dict[str, Any],
    world: int,
    parallel: dict[str, Any],
    rank: int = 0,
    batch: int = 64,
    train: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    kernels: KernelsSection | None = None,
) -> RankMemory:
    section = ParallelSection(**parallel)
    given = {"global_batch_size": batch, "precision": "bf16"} | (train or {})
    return rank_memory(
        shape_of(fields),
        section,
        resolve_layout(section, world),
        TrainSection(**given),
        OptimizerSection(**(optimizer or {})),
        BatchShape(fields["seq_length"], batch),
        rank,
        kernels,
    )


@pytest.mark.parametrize("pipeline", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("schedule", "virtual"), [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero-bubble", 1), ("zbv", 1)]
)
def test_microbatches_in_flight_are_those_of_torchs_order(schedule: str, virtual: int, pipeline: int) -> None:
    section = ParallelSection(pipeline=pipeline, schedule=schedule, virtual=max(2, virtual))  # type: ignore[arg-type]
    for microbatches in (pipeline, pipeline + 1, 2 * pipeline - 1, 2 * pipeline, 4 * pipeline, 6 * pipeline + 1):
        if schedule in ("interleaved", "zero-bubble") and microbatches % (microbatches // pipeline):
            continue
        orders = actions_of(schedule, pipeline, virtual, microbatches)
        section = ParallelSection(pipeline=pipeline, schedule=schedule, virtual=virtual)  # type: ignore[arg-type]
        for rank in range(pipeline):
            planned = microbatches_in_flight(schedule, pipeline, virtual, rank, microbatches)
            assert {(*m.held, *m.pending) for m in planned} == fullest(orders[rank], stage_numbers(section, rank))


def fullest(actions: Sequence[tuple[int, str, int]], numbers: Sequence[int]) -> set[tuple[int, ...]]:
    """By brute force: what is held after each action, and of that what no other moment exceeds."""
    ran: dict[str, set[tuple[int, int]]] = {kind: set() for kind in "FIWB"}
    seen = set()
    for stage, kind, number in actions:
        ran[kind].add((stage, number))
        held = ran["F"] - ran["W"] - ran["B"]
        pending = ran["I"] - ran["W"]
        seen.add(tuple(sum(s == stage for s, _ in part) for part in (held, pending) for stage in numbers))
    return {v for v in seen if not any(v != w and all(a <= b for a, b in zip(v, w, strict=True)) for w in seen)}


@pytest.mark.parametrize("shard", ["none", "optimizer", "gradients", "full"])
@pytest.mark.parametrize("optimizer", [{}, {"name": "sgd", "momentum": 0.9}, {"name": "muon"}], ids=str)
@pytest.mark.parametrize("axes", [(1, 1, 8), (4, 1, 8), (1, 2, 8), (2, 4, 32)])
def test_state_is_that_of_all_tensors_one_by_one(
    axes: tuple[int, int, int], shard: str, optimizer: dict[str, Any]
) -> None:
    """`layout_bytes` lists every tensor, and is itself compared with modules; here one layer is counted for all."""
    tensor, pipeline, world = axes
    parallel = {"tensor": tensor, "pipeline": pipeline, "data_shard": shard}
    section, chosen = ParallelSection(**parallel), OptimizerSection(**optimizer)
    shape, train = shape_of(SMALL), TrainSection(global_batch_size=64, precision="bf16")
    layout = resolve_layout(section, world)
    for rank in range(pipeline):
        found = state_bytes(shape, section, layout, train, chosen, rank)
        held, running = (
            rank_bytes(shape, section, layout, chosen, "bf16", rank),
            step_bytes(shape, section, layout, "bf16", rank),
        )
        assert (found.parameters, found.gradients, found.optimizer) == (held.parameters, held.gradients, held.optimizer)
        assert (found.gathered, found.accumulated) == (running.gathered, running.accumulated)


RUNS = {
    "one process": (Run(1, SMALL, {}, {}), 0.01),
    "one process in bf16, all kernels of one row": (Run(1, SMALL, {}, {}, "bf16", {"attention": "sdpa"}), 0.01),
    "recompute full": (Run(1, SMALL, {"recompute": "full"}, {}), 0.05),
    "gradients dominate": (Run(1, SMALL | {"seq_length": 8}, {}, {}, "bf16", rows=1), 0.03),
    "tensor 2": (Run(2, SMALL, {"tensor": 2}, {}), 0.05),
    "optimizer sharded": (Run(2, SMALL, {"data_shard": "optimizer"}, {}, "bf16"), 0.02),
    "pipeline": (Run(2, SMALL, {"pipeline": 2}, {}, microbatches=4), 0.04),
    "pipeline, many microbatches": (Run(2, SMALL, {"pipeline": 2}, {}, microbatches=24), 0.04),
    "zero-bubble": (Run(2, SMALL, {"pipeline": 2, "schedule": "zero-bubble"}, {}, microbatches=16), 0.04),
    "interleaved": (Run(2, SMALL, {"pipeline": 2, "schedule": "interleaved"}, {}, microbatches=16), 0.04),
    "zbv": (Run(2, SMALL, {"pipeline": 2, "schedule": "zbv"}, {}, microbatches=16), 0.10),
}


@pytest.mark.parametrize("name", RUNS)
def test_total_is_the_peak_of_a_real_step(name: str) -> None:
    run, tolerance = RUNS[name]
    layout, peaks = resolve_layout(run.section, run.world), step_peaks(run)
    for rank, measured in enumerate(peaks):
        place = layout.place_of(rank)
        if place.tensor or place.context or place.shard:
            continue  # the first of the data ranks holds most
        kernels = KernelsSection(attention=(run.kernels or {}).get("attention", "auto"))
        batch = BatchShape(run.shape.max_position_embeddings, run.train.global_batch_size)
        optimizer = OptimizerSection(**run.optimizer)
        found = rank_memory(
            run.shape, run.section, layout, run.train, optimizer, batch, place.pipeline, kernels, device="cpu"
        )
        error = found.total / measured - 1
        print(f"{name}, rank {rank}: {found.moment}, planned {found.total:,}, measured {measured:,}: {error:+.2%}")
        assert abs(error) < tolerance, found


def test_what_saves_memory_saves_it() -> None:
    plain = memory(LLAMA_70B, 64, {"tensor": 8, "pipeline": 8})
    for better in (
        {"sequence": True},
        {"sequence": True, "recompute": "full"},
        {"recompute": "selective", "recompute_policy": "operations"},
        {"recompute": "full", "recompute_layers": 2},
    ):
        assert memory(LLAMA_70B, 64, {"tensor": 8, "pipeline": 8} | better).total < plain.total
    none, sharded, full = (
        memory(LLAMA_70B, 64, {"tensor": 8, "data_shard": shard}).total for shard in ("none", "optimizer", "full")
    )
    assert full < sharded < none
    ranks = [memory(LLAMA_70B, 64, {"tensor": 8, "pipeline": 8}, rank).activations for rank in range(8)]
    assert ranks[1:7] == sorted(ranks[1:7], reverse=True)  # 1f1b: p - rank microbatches


def test_longer_rows_and_more_of_them_cost_in_proportion() -> None:
    one = memory(LLAMA_70B, 64, {"tensor": 8, "sequence": True, "data_shard": "full"})
    two = memory(LLAMA_70B, 64, {"tensor": 8, "sequence": True, "data_shard": "full"}, train={"micro_batch_size": 2})
    assert (one.parameters, one.optimizer, one.gathered) == (two.parameters, two.optimizer, two.gathered)
    assert two.activations == 2 * one.activations


def test_a_context_rank_keeps_its_part() -> None:
    parallel = {"tensor": 8, "sequence": True, "data_shard": "full"}
    one, two = (memory(LLAMA_70B, 64, parallel | {"context": size}).activations for size in (1, 2))
    # The kernel's output and the projection's input are two tensors where heads have been exchanged.
    query = 8192 * 8192 // 8 // 2 * 2
    assert 0 < two - one / 2 <= 80 * 2 * query


def test_one_process_variants() -> None:
    plain = memory(SMALL, 1, {})
    split = memory(SMALL, 1, {}, optimizer={"implementation": "triton", "master_weights": "split"})
    narrow = memory(SMALL, 1, {}, train={"gradients": "bf16"})
    count = shape_of(SMALL).parameter_count()
    assert (plain.gathered, split.gathered) == (2 * count, 0)
    assert narrow.gradients == 2 * count
    casts = memory(SMALL, 1, {}, kernels=KernelsSection(fp8=True)).gathered - plain.gathered
    matrices = 4 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 352)
    assert casts == 2 * matrices + 4 * 7 * 4  # 8 bits as they are and transposed, and a scale each


def test_offload_moves_state_to_the_host() -> None:
    parallel = {"engine": "deepspeed", "data_shard": "optimizer"}
    kept = memory(SMALL, 2, parallel)
    moved = memory(SMALL, 2, parallel | {"offload": "optimizer"})
    assert kept.host == 0 and moved.optimizer == 0
    assert moved.total < kept.total
    assert moved.host >= kept.optimizer + kept.parameters


def test_every_field_is_in_the_total_and_allowances_are_apart() -> None:
    found = memory(LLAMA_70B, 64, {"tensor": 8, "pipeline": 2, "data_shard": "full"})
    words = found.to_json()
    sizes = [size for name, size in words.items() if name not in ("total", "host", "moment")]
    assert sum(sizes) == words["total"] == found.total  # type: ignore[arg-type]
    assert replace(found, host=1 << 40).total == found.total
    bare = found.device_bytes(groups=0, fragmentation=0)
    assert bare == found.total + planner.CONTEXT_BYTES
    assert found.device_bytes(groups=2, fragmentation=0) - bare == 2 * planner.COMMUNICATOR_BYTES
    assert found.device_bytes(fragmentation=0.1) > found.device_bytes(fragmentation=0.0)
    assert communicating_groups(Layout()) == 0
    assert communicating_groups(Layout(pipeline=2, shard=2, tensor=2)) == 4


def test_a_published_layout_fits_the_gpus_that_ran_it() -> None:
    """Llama 3 405B's pretraining (arXiv 2407.21783, table 4): 16 pipeline, 8 tensor, 128 data ranks of H100s of 80 GB
    (81,559 MiB), rows of 8192, 16 of them a data rank and step, without recompute. A plan that says otherwise is wrong.
    Theirs was interleaved; ours here is 1f1b, which holds less."""
    fields = LLAMA_70B | {
        "hidden_size": 16384,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "intermediate_size": 53248,
    }
    parallel = {"tensor": 8, "sequence": True, "pipeline": 16, "data_shard": "optimizer"}
    found = memory(fields, 16384, parallel, batch=2048)
    print(f"405B on 16,384: {found.total / 2**30:.1f} GiB, {found}")
    assert found.total < 81559 << 20


def test_constants_are_those_of_the_engines() -> None:
    from megatron.engines import deepspeed_config, torch_engine

    assert state.ZERO_STAGES == deepspeed_config.ZERO_STAGES
    assert (state._WIDENED, state._BUCKET) == (torch_engine._WIDENED, deepspeed_config._LARGEST_BUCKET)
