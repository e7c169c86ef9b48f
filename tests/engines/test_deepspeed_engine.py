"""The deepspeed engine against the torch engine on one process, at every ZeRO stage; its states, alone and exchanged.

Starting ranks and importing deepspeed is what costs, so that one start of two ranks runs every case of data parallel.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from deepspeed_runs import (
    ADAMW,
    BITING,
    SGD,
    SHAPE,
    differences,
    engine_on,
    gathered,
    microbatches,
    steps_of,
)
from ranks import run_ranks
from torch import Tensor

from megatron.checkpoint.tensor_shards import WholeTensors
from megatron.config.layout import resolve_layout
from megatron.config.schema import ParallelSection
from megatron.engines.base import Engine, StepResult
from megatron.kernels.cross_entropy import IGNORED
from megatron.parallel.mesh import Mesh, close_mesh, launched, one_process_mesh, open_mesh

SHARDS = ("none", "optimizer", "gradients", "full")
OPTIMIZERS = {"sgd": SGD, "sgd, biting bound": BITING, "adamw": ADAMW}
STEPS, HALF = 10, 5
Cases = dict[Any, Any]


def section(shard: str = "optimizer", **keys: Any) -> ParallelSection:
    return ParallelSection(engine="deepspeed", data_shard=shard, **keys)  # type: ignore[arg-type]


def load(engine: Engine, state: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]) -> None:
    engine.load_model_state(WholeTensors(state[0]))
    engine.load_optimizer_state(WholeTensors(state[1]))


def both(engine: Engine, mesh: Mesh) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return gathered(engine.model_state(), mesh), gathered(engine.optimizer_state(), mesh)


def curves(mesh: Mesh, cases: Cases) -> None:
    """Every stage and optimizer; AdamW is taken apart half-way, and goes on in another stage and in a fresh engine."""
    for number, shard in enumerate(SHARDS):
        for name, optimizer in OPTIMIZERS.items():
            engine = engine_on(mesh, section(shard), optimizer)
            assert not engine.optimizer_state()
            first = steps_of(engine, mesh, optimizer, range(HALF))
            state = both(engine, mesh)
            rest = steps_of(engine, mesh, optimizer, range(HALF, STEPS))
            cases["curve", shard, name] = first + rest
            cases["state", shard, name] = state
            if name == "sgd, biting bound":
                continue
            again = engine_on(mesh, section(shard), optimizer)
            steps_of(again, mesh, optimizer, range(50, 52))
            load(again, state)
            cases["resume", shard, name] = rest, steps_of(again, mesh, optimizer, range(HALF, STEPS))
            cases["resumed state", shard, name] = both(engine, mesh), both(again, mesh)
            if name == "sgd":
                continue
            other = SHARDS[(number + 1) % len(SHARDS)]
            switched = engine_on(mesh, section(other), optimizer)
            load(switched, state)
            cases["switch", shard, name] = rest, steps_of(switched, mesh, optimizer, range(HALF, STEPS))


def brain_floats(mesh: Mesh, cases: Cases) -> None:
    """bf16: close to fp32, masters in float32 with all their bits, resumed bit for bit."""
    for shard in SHARDS:
        engine = engine_on(mesh, section(shard), ADAMW, "bf16")
        cases["bf16 start", shard] = both(engine, mesh)[0]
        cases["bf16", shard] = steps_of(engine, mesh, ADAMW, range(HALF))
        state = both(engine, mesh)
        rest = steps_of(engine, mesh, ADAMW, range(HALF, HALF + 3))
        again = engine_on(mesh, section(shard), ADAMW, "bf16")
        load(again, state)
        cases["resume bf16", shard] = rest, steps_of(again, mesh, ADAMW, range(HALF, HALF + 3))
        cases["resumed state bf16", shard] = both(engine, mesh), both(again, mesh)


def broken_steps(mesh: Mesh, cases: Cases) -> None:
    """A weight that is not finite under one data rank's rows only; a loss that is not, with gradients that are."""
    for shard in SHARDS:
        for precision in ("fp32", "bf16"):
            engine, untouched = (engine_on(mesh, section(shard), ADAMW, precision) for _ in range(2))
            steps_of(engine, mesh, ADAMW, range(2))
            steps_of(untouched, mesh, ADAMW, range(2))
            before = both(engine, mesh)
            batch = [microbatches(2, rank, mesh.data.size) for rank in range(mesh.data.size)]
            words = [set(torch.cat([m.tokens.flatten() for m in part]).tolist()) for part in batch]
            word = min(words[1] - words[0])
            bad = dict(before[0])
            bad["embedding.weight"] = bad["embedding.weight"].clone()
            bad["embedding.weight"][word, 3] = float("inf")
            engine.load_model_state(WholeTensors(bad))
            cases["broken weight", shard, precision] = (
                steps_of(engine, mesh, ADAMW, [2]),
                bad,
                before[1],
                both(engine, mesh),
            )
            engine.load_model_state(WholeTensors(before[0]))
            forward = engine._run  # type: ignore[attr-defined]
            engine._run = lambda *a, forward=forward: [t + float("inf") for t in forward(*a)]  # type: ignore[attr-defined]
            cases["broken loss", shard, precision] = steps_of(engine, mesh, ADAMW, [2]), *before, both(engine, mesh)
            engine._run = forward  # type: ignore[attr-defined]
            repaired = steps_of(engine, mesh, ADAMW, range(2, 5)), both(engine, mesh)
            expected = steps_of(untouched, mesh, ADAMW, range(2, 5)), both(untouched, mesh)
            cases["repaired", shard, precision] = repaired, expected


def small_promises(mesh: Mesh, cases: Cases) -> None:
    for shard in SHARDS:
        engine, fresh = engine_on(mesh, section(shard), ADAMW), engine_on(mesh, section(shard), ADAMW)
        steps_of(engine, mesh, ADAMW, range(2))
        before, random = both(engine, mesh), torch.get_rng_state()
        batch = [m for step in (7, 8) for m in microbatches(step)][:7]  # does not divide over two ranks
        cases["evaluate", shard] = engine.evaluate(batch), engine.evaluate(batch)
        cases["evaluated state", shard] = before, both(engine, mesh), bool(torch.equal(random, torch.get_rng_state()))
        engine.reset_optimizer()
        assert not engine.optimizer_state()
        fresh.load_model_state(WholeTensors(before[0]))
        cases["reset", shard] = steps_of(engine, mesh, ADAMW, [3]), steps_of(fresh, mesh, ADAMW, [3])
        empty = microbatches(0, mesh.data.rank, mesh.data.size)
        for micro in empty:
            micro.targets.fill_(IGNORED)
        before = both(engine, mesh)
        cases["nothing valid", shard] = engine.train_step(empty, 1.0), before, both(engine, mesh)
        cases["describe", shard] = engine.describe(), engine.parameter_count()


def two_data_ranks() -> Cases:
    mesh = open_mesh(resolve_layout(section(), 2), launched(), 60)
    cases: Cases = {}
    for part in (curves, brain_floats, broken_steps, small_promises):
        part(mesh, cases)
    close_mesh()
    return cases


@pytest.fixture(scope="module")
def ranks() -> list[Cases]:
    return run_ranks(2, two_data_ranks, timeout=300)


@pytest.fixture(scope="module")
def alone() -> Cases:
    """The torch engine on one process."""
    mesh = one_process_mesh()
    found: Cases = {}
    for name, optimizer in OPTIMIZERS.items():
        engine = engine_on(mesh, ParallelSection(), optimizer)
        found[name] = steps_of(engine, mesh, optimizer, range(STEPS))
    return found


def assert_close(ours: list[StepResult], theirs: list[StepResult], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.updated and other.updated and one.valid_targets == other.valid_targets
        assert one.loss == pytest.approx(other.loss, rel=tolerance)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=tolerance)
        assert one.loss_by_source.keys() == other.loss_by_source.keys()
        for source, (loss, count) in one.loss_by_source.items():
            assert count == other.loss_by_source[source][1]
            assert loss == pytest.approx(other.loss_by_source[source][0], rel=tolerance)


def assert_same_states(first: Any, second: Any) -> None:
    for one, other in zip(first, second, strict=True):
        assert not differences(one, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shard", SHARDS)
def test_T1_curve_is_that_of_one_process(ranks: list[Cases], alone: Cases, shard: str, name: str) -> None:
    bound = OPTIMIZERS[name].clip_grad_norm
    if bound and name != "adamw":
        assert {step.grad_norm > bound for step in alone[name]} == {True, False}, "the bound is to bite on some steps"
    for rank in ranks:
        assert_close(rank["curve", shard, name], alone[name], 1e-4 if name == "adamw" else 1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("shard", SHARDS)
def test_T2_resume_on_the_same_layout_is_bit_for_bit(ranks: list[Cases], shard: str, name: str) -> None:
    for rank in ranks:
        undisturbed, resumed = rank["resume", shard, name]
        assert undisturbed == resumed
        assert_same_states(*rank["resumed state", shard, name])


@pytest.mark.parametrize("name", ["adamw"])
@pytest.mark.parametrize("shard", SHARDS)
def test_T2_resume_at_another_stage_and_in_the_torch_engine_goes_on(
    ranks: list[Cases], alone: Cases, shard: str, name: str
) -> None:
    tolerance = 1e-4 if name == "adamw" else 1e-5
    assert_close(*ranks[0]["switch", shard, name], tolerance)
    mesh = one_process_mesh()
    engine = engine_on(mesh, ParallelSection(), OPTIMIZERS[name])
    load(engine, ranks[0]["state", shard, name])
    assert_close(steps_of(engine, mesh, OPTIMIZERS[name], range(HALF, STEPS)), alone[name][HALF:], tolerance)


@pytest.mark.parametrize("shard", SHARDS)
def test_bf16_has_float32_masters(ranks: list[Cases], alone: Cases, shard: str) -> None:
    mesh = one_process_mesh()
    start = gathered(engine_on(mesh, ParallelSection(), ADAMW).model_state(), mesh)
    assert not differences(ranks[0]["bf16 start", shard], start)
    for ours, theirs in zip(ranks[0]["bf16", shard], alone["adamw"], strict=False):
        assert ours.updated
        assert ours.loss == pytest.approx(theirs.loss, rel=2e-3)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=3e-2)
    undisturbed, resumed = ranks[0]["resume bf16", shard]
    assert undisturbed == resumed
    assert_same_states(*ranks[0]["resumed state bf16", shard])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shard", SHARDS)
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(ranks: list[Cases], shard: str, precision: str) -> None:
    for rank in ranks:
        for case in ("broken weight", "broken loss"):
            (result,), weights, moments, (now, state) = rank[case, shard, precision]
            assert not result.updated and "not finite" in result.reason, case
            assert not differences(weights, now) and not differences(moments, state), case
        repaired, expected = rank["repaired", shard, precision]
        assert repaired[0] == expected[0]
        assert_same_states(repaired[1], expected[1])


@pytest.mark.parametrize("shard", SHARDS)
def test_small_promises(ranks: list[Cases], shard: str) -> None:
    mesh = one_process_mesh()
    for rank in ranks:
        first, second = rank["evaluate", shard]
        assert first == second
        before, after, random_untouched = rank["evaluated state", shard]
        assert random_untouched
        assert_same_states(before, after)
        engine = engine_on(mesh, ParallelSection(), ADAMW)
        engine.load_model_state(WholeTensors(before[0]))
        expected = engine.evaluate([m for step in (7, 8) for m in microbatches(step)][:7])
        assert first == {source: pytest.approx(value, rel=1e-5) for source, value in expected.items()}
        reset, fresh = rank["reset", shard]
        assert reset == fresh
        result, before, after = rank["nothing valid", shard]
        assert not result.updated and "no target" in result.reason
        assert_same_states(before, after)
        words, count = rank["describe", shard]
        assert f"ZeRO-{SHARDS.index(shard)}" in words["engine"] and count == engine.parameter_count()


LAYOUTS = {
    "tensor with sequence, ZeRO 2": (4, section("gradients", tensor=2, sequence=True)),
    "tensor, ZeRO 3": (4, section("full", tensor=2)),
    "pipeline, ZeRO 0": (4, section("none", pipeline=2)),
    "pipeline, ZeRO 1": (4, section("optimizer", pipeline=2)),
    "tensor x pipeline, ZeRO 1": (4, section("optimizer", tensor=2, sequence=True, pipeline=2)),
    "context, ZeRO 3": (4, section("full", context=2)),
}
TIED = replace(SHAPE, tie_word_embeddings=True)


def other_axes(parallel: ParallelSection) -> Any:
    mesh = open_mesh(resolve_layout(parallel, 4), launched(), 60)
    engine = engine_on(mesh, parallel, BITING, shape=TIED)
    first = steps_of(engine, mesh, BITING, range(3))
    state = both(engine, mesh)
    results = first + steps_of(engine, mesh, BITING, range(3, STEPS)), state, engine.evaluate(microbatches(3))
    close_mesh()
    return results


@pytest.mark.parametrize("name", LAYOUTS)
def test_T1_other_axes_with_a_tied_head(name: str) -> None:
    size, parallel = LAYOUTS[name]
    mesh = one_process_mesh()
    engine = engine_on(mesh, ParallelSection(), BITING, shape=TIED)
    expected = steps_of(engine, mesh, BITING, range(STEPS))
    assert {step.grad_norm > BITING.clip_grad_norm for step in expected} == {True, False}
    evaluated = engine.evaluate(microbatches(3))
    for results, state, losses in run_ranks(size, other_axes, parallel, timeout=200):
        assert_close(results, expected, 1e-5)
        assert losses == {source: pytest.approx(value, rel=1e-5) for source, value in evaluated.items()}
        engine.load_model_state(WholeTensors(state[0]))
        assert_close(steps_of(engine, mesh, BITING, range(3, STEPS)), expected[3:], 1e-5)


def offloaded() -> Any:
    mesh = open_mesh(resolve_layout(section(), 2), launched(), 60)
    found = {}
    for shard in SHARDS[1:]:
        parallel = section(shard, offload="optimizer")
        engine, again = engine_on(mesh, parallel, ADAMW), engine_on(mesh, parallel, ADAMW)
        first = steps_of(engine, mesh, ADAMW, range(HALF))
        load(again, both(engine, mesh))
        rest, resumed = (steps_of(e, mesh, ADAMW, range(HALF, STEPS)) for e in (engine, again))
        found[shard] = first + rest, rest, resumed, both(engine, mesh), both(again, mesh)
    close_mesh()
    return found


@pytest.mark.soak  # compiling DeepSpeed's CPU Adam takes a minute or more, once a machine
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_optimizer_on_the_host(alone: Cases) -> None:
    for rank in run_ranks(2, offloaded, timeout=900):
        for curve, rest, resumed, state, state_again in rank.values():
            assert_close(curve, alone["adamw"], 1e-4)
            assert rest == resumed
            assert_same_states(state, state_again)
