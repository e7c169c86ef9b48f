"""A step beyond its bounds changes nothing, on every engine and layout, on all ranks alike; within them, nothing is
other than without."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from deepspeed_runs import ADAMW, SGD, differences, engine_on, gathered, microbatches, steps_of
from ranks import run_ranks

from megatron.config.layout import resolve_layout
from megatron.config.schema import OptimizerSection, ParallelSection
from megatron.engines.base import Bounds, Engine, StepResult
from megatron.parallel.mesh import Mesh, close_mesh, launched, mesh_of_group, one_process_mesh, open_mesh

pytestmark = pytest.mark.timeout(300)
Facts = dict[str, Any]


def state_of(engine: Engine, mesh: Mesh) -> dict[str, Any]:
    optimizer = gathered(engine.optimizer_state(), mesh)
    return {**gathered(engine.model_state(), mesh), **{f"optimizer {name}": value for name, value in optimizer.items()}}


def facts_of(engines: Iterator[Engine], mesh: Mesh, optimizer: OptimizerSection, lr: float = 0.01) -> Facts:
    """Three engines: one is given steps beyond their bounds between good ones, one never sees those, and one has bounds
    that never bite."""
    bounded, plain, wide = engines
    rank, size = mesh.data.rank, mesh.data.size
    facts: Facts = {"dropped": [], "changed": [], "words": []}

    def step(engine: Engine, number: int, bounds: Bounds | None = None) -> StepResult:
        return engine.train_step(microbatches(number, rank, size), lr, bounds)

    for engine in (bounded, plain, wide):
        steps_of(engine, mesh, optimizer, range(2))
    seen = step(wide, 7, Bounds(1e9, 1e9))
    facts["numbers"] = seen.loss, seen.grad_norm
    for engine in (bounded, plain):
        step(engine, 7)
    for number, bounds in (
        (2, Bounds(loss=1.0, loss_words="0.9 + 6 x 0.1")),
        (3, Bounds(grad_norm=1e-3)),
        (4, Bounds(loss=-math.inf, grad_norm=-math.inf)),
    ):
        before = state_of(bounded, mesh)
        result = step(bounded, number, bounds)
        facts["dropped"].append((result.updated, result.spike, result.reason))
        facts["words"].append((result.loss, result.grad_norm))
        facts["changed"] += differences(before, state_of(bounded, mesh))
        # the same batch without bounds, on an engine that is set back afterwards by never being used for more
        after, reference = step(bounded, number + 10), step(plain, number + 10)
        facts["changed"] += [f"step {number + 10}"] * (after != reference)
    facts["changed"] += differences(state_of(bounded, mesh), state_of(plain, mesh))
    third = [step(wide, number, Bounds(1e9, 1e9)) for number in (12, 13, 14)]
    facts["changed"] += ["wide"] * (not all(result.updated for result in third))
    facts["changed"] += differences(state_of(wide, mesh), state_of(plain, mesh))
    return facts


def check(facts: Facts) -> None:
    assert [(updated, spike) for updated, spike, _ in facts["dropped"]] == [(False, True)] * 3, facts["dropped"]
    loss, norm, both = (reason for _, _, reason in facts["dropped"])
    assert loss.startswith("spike: loss 4.") and loss.endswith("above 1 (0.9 + 6 x 0.1)") and "norm" not in loss
    assert norm.startswith("spike: gradient norm ") and norm.endswith("above 0.001") and "loss" not in norm
    assert "loss" in both and "gradient norm" in both
    assert all(math.isfinite(number) and number > 0 for pair in facts["words"] for number in pair)
    assert facts["changed"] == []


@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_process(optimizer: OptimizerSection, precision: str) -> None:
    mesh = one_process_mesh()
    check(facts_of((engine_on(mesh, ParallelSection(), optimizer, precision) for _ in range(3)), mesh, optimizer))


def test_a_step_that_waits_for_no_numbers() -> None:
    """What GPUs do: the comparison is a tensor, and the host learns of it with the step's numbers."""
    mesh = one_process_mesh()

    def engines() -> Iterator[Engine]:
        for _ in range(3):
            made = engine_on(mesh, ParallelSection(), ADAMW)
            made._stays_on_device = True  # type: ignore[attr-defined]
            yield made

    check(facts_of(engines(), mesh, ADAMW))


def test_the_bound_itself_is_within() -> None:
    mesh = one_process_mesh()
    first, again = (engine_on(mesh, ParallelSection(), ADAMW) for _ in range(2))
    seen = first.train_step(microbatches(0), 0.01)
    assert again.train_step(microbatches(0), 0.01, Bounds(math.nextafter(seen.loss, 9), seen.grad_norm)) == seen
    below = math.nextafter(seen.grad_norm, 0)
    assert again.train_step(microbatches(0), 0.0, Bounds(grad_norm=below)).spike is not None


def test_what_is_not_finite_is_no_spike() -> None:
    mesh = one_process_mesh()
    engine = engine_on(mesh, ParallelSection(), ADAMW)
    forward = engine._run  # type: ignore[attr-defined]
    engine._run = lambda *a: [part + float("inf") for part in forward(*a)]  # type: ignore[attr-defined]
    result = engine.train_step(microbatches(0), 0.01, Bounds(1.0, 1.0))
    assert not result.updated and not result.spike and "not finite" in result.reason


LAYOUTS: dict[str, tuple[ParallelSection, str]] = {
    "dp2": (ParallelSection(), "fp32"),
    "dp2 full": (ParallelSection(data_shard="full"), "fp32"),
    "tp2 sequence": (ParallelSection(tensor=2, sequence=True), "fp32"),
    "pp2": (ParallelSection(pipeline=2), "fp32"),
    "deepspeed zero 0": (ParallelSection(engine="deepspeed"), "fp32"),
    "deepspeed zero 1": (ParallelSection(engine="deepspeed", data_shard="optimizer"), "fp32"),
    "deepspeed zero 2": (ParallelSection(engine="deepspeed", data_shard="gradients"), "fp32"),
    "deepspeed zero 3": (ParallelSection(engine="deepspeed", data_shard="full"), "fp32"),
    "deepspeed zero 1, bf16": (ParallelSection(engine="deepspeed", data_shard="optimizer"), "bf16"),
    "deepspeed zero 2, bf16": (ParallelSection(engine="deepspeed", data_shard="gradients"), "bf16"),
    "deepspeed zero 3, bf16": (ParallelSection(engine="deepspeed", data_shard="full"), "bf16"),
    "deepspeed zero 1, pp2": (ParallelSection(engine="deepspeed", data_shard="optimizer", pipeline=2), "fp32"),
    "deepspeed zero 0, tp2": (ParallelSection(engine="deepspeed", tensor=2), "fp32"),
}


def group_of(name: str) -> str:
    """Layouts that can be tried in one process after another: DeepSpeed keeps one layout for a process's life."""
    if not name.startswith("deepspeed"):
        return "torch"
    return name if name.endswith(("pp2", "tp2")) else "deepspeed"


def on_two_ranks(group: str) -> dict[str, Facts]:
    found: dict[str, Facts] = {}
    mesh = None
    for name, (parallel, precision) in LAYOUTS.items():
        if group_of(name) != group:
            continue
        layout = resolve_layout(parallel, 2)
        mesh = open_mesh(layout, launched(), 60) if mesh is None else mesh_of_group(layout, mesh.device, mesh.limit)
        found[name] = facts_of((engine_on(mesh, parallel, ADAMW, precision) for _ in range(3)), mesh, ADAMW)
    close_mesh()
    return found


@pytest.mark.parametrize("group", dict.fromkeys(map(group_of, LAYOUTS)))
def test_T1_all_ranks_alike(group: str) -> None:
    ranks = run_ranks(2, on_two_ranks, group, timeout=280)
    for name in ranks[0]:
        assert all(rank[name] == ranks[0][name] for rank in ranks), name
        check(ranks[0][name])
