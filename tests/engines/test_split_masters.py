"""Masters in two halves in an engine: the same run bit for bit as with whole ones, one checkpoint for both."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engines.made_rows import Micro, tiny_shape, two_rows
from torch import Tensor

from megatron.checkpoint.manager import CheckpointManager
from megatron.checkpoint.tensor_shards import WholeTensors
from megatron.config.errors import CheckpointError, ConfigError
from megatron.config.layout import resolve_layout
from megatron.config.layout_checks import BatchShape, check_layout
from megatron.config.schema import OptimizerSection, ParallelSection, TrainSection
from megatron.engines import held
from megatron.engines.build import build_engine
from megatron.engines.torch_engine import TorchEngine
from megatron.kernels.launch_triton import INTERPRETED
from megatron.planner.layout_plan import plan_layout

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="Triton was loaded for GPUs, and torch sees none"
)
SHAPE = tiny_shape(num_hidden_layers=1)
WORDS, LENGTH = 100, 8


def engine(master_weights: str, gradients: str = "fp32", seed: int = 3, clip: float = 0.3) -> TorchEngine:
    section = OptimizerSection(
        implementation="triton",
        master_weights=master_weights,  # type: ignore[arg-type]
        clip_grad_norm=clip,
    )
    train = TrainSection(global_batch_size=4, gradients=gradients)  # type: ignore[arg-type]
    made = build_engine(SHAPE, section, ParallelSection(), train, seed, "bf16")
    assert isinstance(made, TorchEngine)
    return made


def batch(step: int) -> list[Micro]:
    return [two_rows(2 * step, WORDS, LENGTH, 0.2), two_rows(2 * step + 1, WORDS, LENGTH, 0.2)]


def masters(of: TorchEngine) -> dict[str, Tensor]:
    return {name: shards[0].tensor.clone() for name, shards in of.model_state().items()}


def moments(of: TorchEngine) -> dict[str, Tensor]:
    return {name: shards[0].tensor.clone() for name, shards in of.optimizer_state().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("gradients", "on_device"), [("fp32", False), ("bf16", True)], ids=["waits", "launched"])
def test_a_run_is_the_same_bit_for_bit_however_masters_are_kept(gradients: str, on_device: bool) -> None:
    """Ten steps of two microbatches, clipped, the fifth not finite, an evaluation between."""
    split, whole = engine("split", gradients), engine("whole", gradients)
    for each in (split, whole):
        each._stays_on_device = on_device
    assert "two halves" in split.describe()["optimizer"]
    for step in range(10):
        if step == 5:
            for each in (split, whole):
                bad = masters(each)
                kept = bad["final_norm.weight"].clone()
                bad["final_norm.weight"][2] = math.inf
                each.load_model_state(WholeTensors(bad))
                result = each.train_step(batch(step), 1e-2)
                assert not result.updated and "not finite" in result.reason
                each.load_model_state(WholeTensors({**masters(each), "final_norm.weight": kept}))
            continue
        ours, theirs = (each.train_step(batch(step), 1e-3 * (1 + step)) for each in (split, whole))
        assert ours == theirs and ours.updated and ours.grad_norm > 0.3
        assert split.evaluate(batch(50)) == whole.evaluate(batch(50))
    assert same(masters(split), masters(whole)) and same(moments(split), moments(whole))
    assert {tensor.dtype for tensor in masters(split).values()} == {torch.float32}
    for item, copy in zip(split._weights.held, whole._weights.copies().values(), strict=True):
        assert item.local.dtype == torch.bfloat16 and item.local.numel() == copy.numel()
    for item in split._weights.held:
        assert torch.equal(item.local, whole._weights.copies()[item.name])


@pytest.mark.parametrize("before", ["whole", "split"])
def test_a_checkpoint_is_the_same_file_and_either_resumes_it(before: str, tmp_path: Path) -> None:
    after = {"whole": "split", "split": "whole"}[before]
    undisturbed, first, second = engine(before), engine(before), engine(after, seed=77)
    for step in range(3):
        undisturbed.train_step(batch(step), 1e-2)
        first.train_step(batch(step), 1e-2)
    for asynchronous in (False, True):
        manager = CheckpointManager(tmp_path / str(asynchronous))
        manager.save(3, first.model_state(), first.optimizer_state(), first.rng_state(), {}, asynchronous=asynchronous)
        manager.finish()
        found = manager.newest_whole(print)
        assert found is not None
        stored = found.model()
        assert {stored.dtype(name) for name in stored.names()} == {torch.float32}
        assert all(torch.equal(stored.read(n, (0,) * t.ndim, t.shape), t) for n, t in masters(undisturbed).items())
    second.load_model_state(found.model())
    second.load_optimizer_state(found.optimizer())
    for step in range(3, 6):
        assert second.train_step(batch(step), 1e-2) == undisturbed.train_step(batch(step), 1e-2)
    assert same(masters(second), masters(undisturbed)) and same(moments(second), moments(undisturbed))


def test_shards_are_joined_one_by_one_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[int] = []
    real = held.join_master

    def counting(high: Tensor, low: Tensor) -> Tensor:
        joined.append(high.numel())
        return real(high, low)

    monkeypatch.setattr(held, "join_master", counting)
    state = engine("split").model_state()
    assert len(state) == len(list(state)) > 10 and not joined, "names cost nothing"
    first, again = (state["final_norm.weight"][0].tensor for _ in range(2))
    assert joined == [32, 32] and first.data_ptr() != again.data_ptr()


def test_a_parameter_takes_twelve_bytes_and_its_gradient() -> None:
    split = engine("split", "bf16")
    split.train_step(batch(0), 1e-3)
    count = split.parameter_count()
    weights = split._weights
    elements = {
        "high": [item.local for item in weights.held],
        "low": [item.low for item in weights.held],
        "moments": [t for name, t in moments(split).items() if not name.endswith("/step")],
    }
    sizes = {key: sum(t.numel() * t.element_size() for t in group if t is not None) for key, group in elements.items()}
    assert sizes == {"high": 2 * count, "low": 2 * count, "moments": 8 * count}
    assert sum(p.numel() * p.element_size() for p in weights.modules[0].parameters()) == 2 * count
    held_by_model = {p.data_ptr() for p in weights.modules[0].parameters()}
    assert {item.local.data_ptr() for item in weights.held} == held_by_model, "the high halves are what computes"


@pytest.mark.parametrize("gradients", ["fp32", "bf16"])
def test_the_plan_counts_these_bytes(gradients: str) -> None:
    train = TrainSection(global_batch_size=4, precision="bf16", gradients=gradients)  # type: ignore[arg-type]
    found = {}
    for kept in ("whole", "split"):
        section = OptimizerSection(implementation="triton", master_weights=kept)  # type: ignore[arg-type]
        (row,) = plan_layout(ParallelSection(), SHAPE, train, section, [BatchShape(8, 4)], 1)["ranks"]
        found[kept] = row["bytes"]
    count, each = SHAPE.parameter_count(), {"fp32": 4, "bf16": 2}[gradients]
    tensors = len(list(engine("split").model_state()))
    assert found["split"]["step_total"] == (2 + 2 + 8 + each) * count + 4 * tensors
    assert found["whole"]["step_total"] - found["split"]["step_total"] == 2 * count


def test_states_that_do_not_fit_are_refused_and_change_nothing() -> None:
    ours = engine("split")
    before = masters(ours)
    name = "layers.0.attention.query.weight"
    for broken, words in (
        ({**before, name: before[name].double()}, "float64"),
        ({**before, name: before[name][1:]}, name),
    ):
        with pytest.raises(CheckpointError, match=words):
            ours.load_model_state(WholeTensors(broken))
    assert same(masters(ours), before)
    narrow = {key: value.bfloat16() for key, value in before.items()}
    ours.load_model_state(WholeTensors(narrow))
    assert same(masters(ours), {key: value.float() for key, value in narrow.items()})


@pytest.mark.parametrize(
    ("optimizer", "parallel", "precision", "processes", "words"),
    [
        ({"implementation": "torch"}, {}, "bf16", 1, "optimizer.implementation = torch"),
        ({"implementation": "apex"}, {}, "bf16", 1, "optimizer.implementation = apex"),
        ({}, {}, "fp32", 1, "precision fp32"),
        ({}, {}, "fp64", 1, "precision fp64"),
        ({}, {"data_shard": "full"}, "bf16", 2, "2 processes"),
        (
            {"name": "sgd", "implementation": "torch"},
            {},
            "bf16",
            1,
            "optimizer.name = sgd and optimizer.implementation",
        ),
        ({"implementation": "torch"}, {"engine": "deepspeed"}, "bf16", 1, "parallel.engine = deepspeed"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    optimizer: dict[str, Any], parallel: dict[str, Any], precision: str, processes: int, words: str
) -> None:
    chosen = OptimizerSection(**({"implementation": "triton", "master_weights": "split"} | optimizer))
    section, train = ParallelSection(**parallel), TrainSection(global_batch_size=4)
    layout, batches = resolve_layout(section, processes), [BatchShape(8, 4)]
    with pytest.raises(ConfigError, match=rf"optimizer\.master_weights = split does not go with .*{words}.* to whole"):
        check_layout(section, layout, SHAPE, train, chosen, batches, precision)


def test_what_can_be_is_not_refused() -> None:
    section = OptimizerSection(implementation="triton", master_weights="split")
    for precision in ("bf16", "auto"):
        layout = resolve_layout(ParallelSection(), 1)
        train = TrainSection(global_batch_size=4)
        check_layout(ParallelSection(), layout, SHAPE, train, section, [BatchShape(8, 4)], precision)
