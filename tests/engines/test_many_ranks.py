"""The torch engine on many ranks: what the equality of loss curves does not show."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from engines.made_rows import engine_here, microbatches, tiny_shape
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.checkpoint.tensor_shards import WholeTensors
from megatron.engines.base import StepResult

ADAMW = {"clip_grad_norm": 0.5}
SGD = {"name": "sgd", "clip_grad_norm": 0.0}


class CountCollectives(TorchDispatchMode):
    """Counts what goes through torch.distributed, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.calls[function._opname.strip("_")] += 1
        return function(*args, **(kwargs or {}))


def steps(world_size: int, parallel: dict[str, Any], optimizer: dict[str, Any], precision: str) -> list[StepResult]:
    """Steps of changing length, number of microbatches and rows, with looks at held-out rows between them."""
    engine, mesh = engine_here(world_size, parallel, optimizer, precision)
    rank, size = mesh.data.rank, mesh.data.size
    results = []
    for step, (length, rows, each) in enumerate([(16, 8, 2), (32, 8, 2), (32, 16, 2), (16, 8, 1), (16, 8, 2)]):
        results.append(engine.train_step(microbatches(step, rank, size, length, rows, each), 1e-2))
        held_out = engine.evaluate(microbatches(100 + step, rows=5))
        total, count = (sum(values) for values in zip(*held_out.values(), strict=True))
        results.append(StepResult(total, held_out, 1.0, int(count), True))
    return results


def worst(first: list[StepResult], second: list[StepResult]) -> float:
    """The largest relative difference of losses, norms and losses by source."""
    found = 0.0
    for ours, theirs in zip(first, second, strict=True):
        assert ours.valid_targets == theirs.valid_targets and ours.updated == theirs.updated
        assert ours.loss_by_source.keys() == theirs.loss_by_source.keys()
        pairs = [(ours.loss, theirs.loss), (ours.grad_norm, theirs.grad_norm)]
        for source, (total, count) in ours.loss_by_source.items():
            assert theirs.loss_by_source[source][1] == count
            pairs.append((total, theirs.loss_by_source[source][0]))
        found = max(found, *(abs(a - b) / abs(a) for a, b in pairs))
    return found


LAYOUTS = [
    (2, {"data_shard": "gradients"}),
    (2, {"pipeline": 2}),
    (2, {"pipeline": 2, "schedule": "zbv"}),
    (4, {"tensor": 2, "sequence": True, "pipeline": 2, "schedule": "interleaved"}),
]


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS, ids=lambda value: str(value))
def test_T1_changing_shapes_and_evaluation_between_steps(world_size: int, parallel: dict[str, Any]) -> None:
    alone = steps(1, {}, ADAMW, "fp64")
    for results in run_ranks(world_size, steps, world_size, parallel, ADAMW, "fp64"):
        assert worst(alone, results) < 1e-11


def test_bf16_has_float32_masters_and_follows_one_process() -> None:
    alone = steps(1, {}, SGD, "bf16")
    for results in run_ranks(4, steps, 4, {"tensor": 2, "sequence": True, "data_shard": "full"}, SGD, "bf16"):
        assert worst(alone, results) < 3e-2


def shards(world_size: int, parallel: dict[str, Any], shape: Any) -> list[tuple[str, Any, Any, Any]]:
    engine, mesh = engine_here(world_size, parallel, ADAMW, "fp32", shape)
    engine.train_step(microbatches(0, mesh.data.rank, mesh.data.size), 1e-2)
    found = []
    for state in (engine.model_state(), engine.optimizer_state()):
        for name, parts in state.items():
            found += [(name, part.shape, part.offset, part.tensor.clone()) for part in parts]
    return found


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (4, {"data_shard": "full"}),
        (4, {"data_shard": "optimizer", "data_replicate": 2}),
        (4, {"tensor": 2, "data_shard": "full"}),
        (4, {"tensor": 4, "sequence": True}),
        (4, {"pipeline": 2, "schedule": "zbv", "context": 2}),
    ],
    ids=str,
)
def test_shards_of_all_ranks_cover_every_tensor_once(world_size: int, parallel: dict[str, Any]) -> None:
    # Widths that no number of ranks divides: shards of unequal size, and empty ones.
    shape = tiny_shape(hidden_size=20, head_dim=6, num_key_value_heads=1, attention_bias=True, intermediate_size=36)
    (alone,) = [shards(1, {}, shape)]
    whole = {name: tensor for name, _, _, tensor in alone}
    built = {name: torch.full_like(tensor, math.nan) for name, tensor in whole.items()}
    for name, shape_of_whole, offset, part in sum(run_ranks(world_size, shards, world_size, parallel, shape), []):
        assert tuple(shape_of_whole) == tuple(whole[name].shape)
        box = tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))
        assert bool(built[name][box].isnan().all()), f"{name} {offset} is written twice"
        built[name][box] = part
    for name, tensor in whole.items():
        assert not bool(built[name].isnan().any()), f"a part of {name} is not written"
        torch.testing.assert_close(built[name], tensor, atol=2e-3 if "/" not in name else 1e-4, rtol=1e-3)


def reductions(parallel: dict[str, Any]) -> tuple[int, int]:
    """Calls that reduce gradients and that gather weights in the second step of four microbatches."""
    engine, mesh = engine_here(2, parallel, SGD, "fp32")
    counts = []
    for step in range(2):
        with CountCollectives() as mode:
            engine.train_step(microbatches(step, mesh.data.rank, 2, rows=16), 1e-3)
        counts.append(mode.calls)
    reduced = counts[1]["reduce_scatter_base"] + counts[1]["reduce_scatter"]
    return reduced, counts[1]["allgather_base"] + counts[1]["allgather"]


def test_accumulation_communicates_no_more_than_the_shards_ask() -> None:
    groups = 8 + 1  # the layers, and what is left around them
    assert set(run_ranks(2, reductions, {"data_shard": "optimizer"})) == {(groups, groups)}
    assert set(run_ranks(2, reductions, {"data_shard": "gradients"})) == {(4 * groups, groups)}
    ((reduced, gathered),) = set(run_ranks(2, reductions, {"data_shard": "full"}))
    assert reduced == 4 * groups and gathered > 4 * groups


def broken_step(world_size: int, parallel: dict[str, Any]) -> list[Any]:
    engine, mesh = engine_here(world_size, parallel, ADAMW, "fp32")
    mine = mesh.data.rank, mesh.data.size
    engine.train_step(microbatches(0, *mine), 1e-2)
    kept = {name: part[0].tensor.clone() for name, part in engine.model_state().items()}
    moments = {name: part[0].tensor.clone() for name, part in engine.optimizer_state().items()}
    if mesh.rank == world_size - 1:
        for parts in engine.model_state().values():
            parts[0].tensor.view(-1)[0] = math.nan
            break
        else:
            engine._weights.held[0].local.view(-1)[0] = math.nan  # type: ignore[attr-defined]
        engine._weights.refresh()  # type: ignore[attr-defined]
    result = engine.train_step(microbatches(1, *mine), 1e-2)
    after = {name: part[0].tensor for name, part in engine.optimizer_state().items()}
    same = all(torch.equal(moments[name], after[name]) for name in moments)
    now = {name: part[0].tensor for name, part in engine.model_state().items()}
    changed = [name for name in kept if not torch.equal(kept[name], now[name])]
    return [result.updated, result.reason, same, len(changed)]


@pytest.mark.parametrize("parallel", [{"data_shard": "full"}, {"pipeline": 2}, {"tensor": 2}], ids=str)
def test_what_is_not_finite_on_one_rank_stops_the_update_on_all(parallel: dict[str, Any]) -> None:
    for updated, reason, same, changed in run_ranks(2, broken_step, 2, parallel):
        assert not updated and "not finite" in reason and same and changed <= 1


def moved(world_size: int, parallel: dict[str, Any], weights: dict[str, Any], moments: dict[str, Any]) -> Any:
    engine, mesh = engine_here(world_size, parallel, ADAMW, "fp64", seed=77)
    engine.load_model_state(WholeTensors(weights))
    engine.load_optimizer_state(WholeTensors(moments))
    mine = mesh.data.rank, mesh.data.size
    return [engine.train_step(microbatches(step, *mine), 1e-2) for step in range(3, 6)]


def test_T2_a_state_goes_on_at_another_layout() -> None:
    engine, _ = engine_here(1, {}, ADAMW, "fp64")
    for step in range(3):
        engine.train_step(microbatches(step), 1e-2)
    weights = {name: parts[0].tensor.clone() for name, parts in engine.model_state().items()}
    moments = {name: parts[0].tensor.clone() for name, parts in engine.optimizer_state().items()}
    expected = [engine.train_step(microbatches(step), 1e-2) for step in range(3, 6)]
    parallel = {"pipeline": 2, "schedule": "zbv", "data_shard": "optimizer"}
    for results in run_ranks(4, moved, 4, parallel, weights, moments):
        assert worst(expected, results) < 1e-11
