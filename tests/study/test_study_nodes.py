"""Nodes: names, order of tables and layout keep them; what matters changes them; they are the distinct prefixes."""

from __future__ import annotations

import random
from copy import deepcopy
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from made_runs import write_corpus
from study.made_studies import BASE, LR, planned, stage, tables

from megatron.config.schema import RunConfig
from megatron.planner.resolve import resolve_run
from megatron.study.graph import Graph
from megatron.study.steps import TrainStep, planned_ledger, trained


def ends(graph: Graph) -> dict[str, str]:
    return {arm.name: arm.path[-1] for arm in graph.arms}


def study() -> dict[str, Any]:
    stages = {"init": stage(), "mixed": stage(mixture={"web": 1, "code": 1}), "cool": stage(mixture={"code": 1})}
    arms = {
        "plain": {"stages": ["init", "cool"]},
        "mixed": {"stages": ["init", "mixed", "cool"]},
        "branch": {"from": "mixed/mixed", "stages": ["init"]} | {"stages": [{"use": "init", "name": "again"}]},
    }
    return tables(arms, stages)


def test_renaming_everything_keeps_every_node(tmp_path: Path) -> None:
    before = planned(tmp_path, study()).graph
    words = study()
    words["stages"] = {f"x-{name}": table for name, table in words["stages"].items()}
    words["arms"] = {
        "p": {"stages": ["x-init", "x-cool"], "experiment": "E"},
        "m": {"stages": ["x-init", "x-mixed", "x-cool"]},
        "b": {"from": "m/x-mixed", "stages": [{"use": "x-init", "name": "over"}]},
    }
    words["study"] = {"name": "other", "output": "elsewhere", "baseline": "m"}
    assert list(planned(tmp_path, words).graph.nodes) == list(before.nodes)


def test_the_order_of_tables_keeps_every_node(tmp_path: Path) -> None:
    before = planned(tmp_path, study()).graph
    words = study()
    for table in ("stages", "arms"):
        words[table] = dict(reversed(words[table].items()))
    words["base"] = {**BASE, "sources": dict(reversed(BASE["sources"].items()))}
    after = planned(tmp_path, words).graph
    assert set(after.nodes) == set(before.nodes) and ends(after) == ends(before)


def test_a_preset_and_its_fields_are_one_model(tmp_path: Path) -> None:
    base = deepcopy(BASE)
    base["model"]["num_key_value_heads"] = 2  # the default, said
    assert set(planned(tmp_path, study() | {"base": base}).graph.nodes) == set(planned(tmp_path, study()).graph.nodes)


def test_a_branch_and_a_list_of_the_same_stages_are_one_node(tmp_path: Path) -> None:
    arms = {
        "a": {"stages": ["init", "mixed"]},
        "b": {"from": "a/init", "stages": ["mixed"]},
        "c": {"from": "a", "stages": ["cool"]},
        "d": {"stages": ["init", "mixed", "cool"]},
    }
    graph = planned(tmp_path, study() | {"arms": arms, "study": study()["study"] | {"baseline": "a"}}).graph
    assert len(graph.nodes) == 3 and ends(graph)["a"] == ends(graph)["b"] and ends(graph)["c"] == ends(graph)["d"]


def test_a_later_stage_is_no_part_of_a_node(tmp_path: Path) -> None:
    stages = {"init": stage(), "long": stage(steps=400, seq_length=64), "short": stage(steps=1)}
    arms = {"a": {"stages": ["init", "long"]}, "b": {"stages": ["init", "short"]}}
    graph = planned(tmp_path, tables(arms, stages)).graph
    assert len(graph.nodes) == 3


def test_seeds_are_nodes_of_their_own(tmp_path: Path) -> None:
    words = study()
    words["study"]["seeds"] = [1, 2, 3]
    graph = planned(tmp_path, words).graph
    one = planned(tmp_path, study()).graph
    assert len(graph.nodes) == 3 * len(one.nodes)
    assert graph.naive == 3 * one.naive and graph.trained == 3 * one.trained


# -- brute force: what runs really consume -----------------------------------------------------------------------------


def corpora(folder: Path) -> dict[str, Any]:
    return {
        name: {"data": [str(write_corpus(folder / name, 60, number))], "max_epochs": 50, "dry": "repeat", **group}
        for number, (name, group) in enumerate(
            {"web": {}, "python": {"group": "code"}, "rust": {"group": "code"}}.items()
        )
    }


MIXTURES = (
    {"mixture": {"web": 1}},
    {"mixture": {"web": 3, "python": 1}},
    {"mixture": {"python": Decimal("0.25"), "web": Decimal("0.75")}},  # the same, said otherwise
    {"phases": [{"mixture": {"web": 3, "python": 1}}, {"mixture": {"python": 2, "web": 6}}]},  # and once more
    {"mixture": {"code": 1}, "within": {"code": {"python": 1, "rust": 3}}},
    {"mixture": {"rust": Decimal("0.75"), "python": Decimal("0.25")}},
    {"mixture": {"web": 1}, "ramp_to": {"rust": 1}},
)
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"optimizer.weight_decay": Decimal("0.1")},  # the default
    {"optimizer.weight_decay": Decimal("0.3")},
    {"parallel.recompute": "full"},
    {"train.z_loss": Decimal("0.001")},
    {"checkpoint.keep": 9},
)


def random_study(draw: random.Random, sources: dict[str, Any]) -> dict[str, Any]:
    stages = {
        f"s{number}": draw.choice(MIXTURES)
        | {"steps": draw.choice([8, 16])}
        | {"lr": {"peak": draw.choice([Decimal("0.001"), Decimal("0.002")])}}
        | draw.choice([{}, {}, {"cursor": "restart"}, {"global_batch_size": 8}])
        for number in range(4)
    }
    arms = {
        f"a{number}": {"stages": draw.sample(list(stages), draw.choice([1, 2, 3])), "set": draw.choice(SETTINGS)}
        for number in range(10)
    }
    return tables(arms, stages, base={**BASE, "sources": sources})


def consumed(config: RunConfig) -> list[tuple[Any, ...]]:
    """For each training stage what its steps really were: samples, rates, and the settings of the update."""
    run = resolve_run(config)
    stream = run.stream()
    found = []
    for row in run.schedule.stages:
        steps = []
        for step in range(row.steps):
            samples = [(one.source, tuple(map(tuple, one.pieces))) for one in stream.next_batch()]
            consumed_tokens = row.start_token + (step + 1) * row.shapes.steps[0].batch_tokens
            steps.append((tuple(samples), run.lr.rate(consumed_tokens)))
        settings = (config.optimizer.weight_decay, config.train.z_loss, config.run.seed)
        found.append((tuple(steps), settings))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_nodes_are_the_distinct_prefixes_of_what_is_consumed(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    result = planned(tmp_path, random_study(draw, corpora(tmp_path)))
    prefixes: dict[tuple[Any, ...], str] = {}
    for arm in result.graph.arms:
        last = result.arms[arm.name].steps[-1]
        assert isinstance(last, TrainStep)
        rows = consumed(last.config)
        for length, node in enumerate(arm.path, 1):
            assert prefixes.setdefault(tuple(rows[:length]), node) == node
    assert len(prefixes) == len(result.graph.nodes) == len(set(prefixes.values()))
    assert len(prefixes) < sum(len(arm.path) for arm in result.graph.arms)  # something is shared at all


@pytest.mark.parametrize("seed", range(6))
def test_each_node_resumes_its_parent(tmp_path: Path, seed: int) -> None:
    """The config of a node, against the ledger that its parent's run leaves: what `train` would compare."""
    draw = random.Random(100 + seed)
    graph = planned(tmp_path, random_study(draw, corpora(tmp_path))).graph
    for node in graph.nodes.values():
        config = graph.run_config(node.id, "runs/made")
        assert isinstance(node.step, TrainStep) and len(config.stages) == len(trained(node.step))
        ledger = None
        if node.parents:
            ledger = planned_ledger(trained(graph.nodes[node.parents[0]].step))
        run = resolve_run(config, ledger=ledger)
        assert run.schedule.stages[-1].samples == node.step.stage.samples


def test_a_planned_ledger_is_the_ledger_of_the_run(tmp_path: Path) -> None:
    words = random_study(random.Random(5), corpora(tmp_path))
    arm = planned(tmp_path, words).arms["a1"]
    last = arm.steps[-1]
    assert isinstance(last, TrainStep)
    run = resolve_run(last.config)
    stream = run.stream()
    while not stream.finished:
        stream.next_batch()
    forecast = planned_ledger(trained(last))
    assert forecast is not None
    for then, now in zip(stream.ledger.stages, forecast.stages, strict=True):
        assert (then.weights, then.shapes, then.lr, then.caps, then.fim) == (
            now.weights,
            now.shapes,
            now.lr,
            now.caps,
            now.fim,
        )
        assert {n: u.tokens for n, u in then.use.items()} == {n: u.tokens for n, u in now.use.items()}
    used = {n: r.lifetime_tokens for n, r in stream.ledger.sources.items()}
    assert used == {n: r.lifetime_tokens for n, r in forecast.sources.items()}


def test_lr_words_of_a_node_go_on(tmp_path: Path) -> None:
    """A stage without lr goes on with the law of its own trunk."""
    law = {"peak": Decimal("0.001"), "shape": "cosine", "final": Decimal("0.0001"), "horizon": "8 steps"}
    stages = {"init": stage(lr=law), "on": {"steps": 4, "mixture": {"web": 1}}, "anew": stage(lr=LR)}
    arms = {
        "a": {"stages": ["init", "on"]},
        "b": {"from": "a/init", "stages": ["on"]},
        "c": {"stages": ["init", "anew"]},
    }
    graph = planned(tmp_path, tables(arms, stages)).graph
    assert len(graph.nodes) == 3
