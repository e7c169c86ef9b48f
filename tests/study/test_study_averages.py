"""Averages in a study: which checkpoints, what is kept for them, and their nodes made by the command lines alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from study.made_studies import BASE, planned, stage, tables
from tiny_run import curve_of, make_run, steps_in, train

from megatron.commands import average_checkpoints
from megatron.commands.frame import run_command
from megatron.config.errors import CheckpointError, ConfigError
from megatron.config.load import config_to_toml
from megatron.study.average_nodes import average_words, averaged_checkpoints, check_averaged, end_checkpoint
from megatron.study.graph import Graph
from megatron.study.node_folder import StudyFolder
from megatron.study.plan import PlannedStudy, study_plan
from megatron.study.steps import regular_steps

FRESH = {"optimizer": "fresh"}
LR = {"peak": Decimal("0.01"), "shape": "cosine", "final": Decimal("0.001"), "horizon": "30 steps"}
STAGES = {
    "init": stage(steps=6, mixture={"web": Decimal("0.5"), "code": Decimal("0.5")}, lr=LR),
    "web": {"steps": 7, "mixture": {"web": 1}},
    "code": {"steps": 7, "mixture": {"code": 1}},
    "mean": {"last": 3, "weights": [3, 2, 1]},
}
ARMS: dict[str, Any] = {
    "code": {"stages": ["init", "code"]},
    "web": {"from": "code/init", "stages": ["web"]},
    "late": {"from": "code", "stages": ["mean", {"use": "web", "name": "cool", "take": FRESH}]},
    "soup": {
        "stages": [
            {"name": "soup", "average": ["web", "code"], "weights": [Decimal("0.2"), Decimal("0.1")]},
            {"use": "code", "name": "cool", "take": FRESH},
        ]
    },
}
KEEP = BASE | {"checkpoint": {"every": 2, "keep": 1}}


def test_members_are_the_regular_checkpoints_however_a_run_was_stopped() -> None:
    assert regular_steps(6, 13, 2) == (13, 12, 10, 8)
    assert regular_steps(6, 12, 2) == (12, 10, 8), "a stage's beginning is another stage's end"
    assert regular_steps(0, 3, 5) == (3,)
    for start, end, every in ((0, 10, 3), (4, 30, 7), (5, 6, 1), (9, 27, 9)):
        saved = {step for step in range(start + 1, end + 1) if step % every == 0 or step == end}
        assert regular_steps(start, end, every) == tuple(sorted(saved, reverse=True))


def test_configs_keep_what_averages_need(tmp_path: Path) -> None:
    result = planned(tmp_path, tables(ARMS, STAGES, base=KEEP))
    graph = result.graph
    by_label = {node.label: node for node in graph.nodes.values()}
    code, web = by_label["code"], by_label["web"]
    assert graph.run_config(code.id, "out").checkpoint.keep_steps == [10, 12]
    assert graph.run_config(web.id, "out").checkpoint.keep_steps == []
    # also where the arm that averages is not asked for this time
    alone = planned(tmp_path, tables(ARMS, STAGES, base=KEEP), "code").graph
    assert "mean" not in {node.label for node in alone.nodes.values()}
    assert alone.run_config(code.id, "out").checkpoint.keep_steps == [10, 12]
    plan = study_plan(result)
    rows = {row["label"]: row for row in plan["nodes"]}
    checkpoint = (rows["web"]["disk_bytes"] - rows["code"]["disk_bytes"]) / -2
    assert checkpoint > 0 and rows["code"]["disk_bytes"] > 5 * checkpoint, "an end, a trunk's copy, 10 and 12, one more"
    assert rows["soup"]["disk_bytes"] == rows["mean"]["disk_bytes"] < 2 * checkpoint
    words = {arm["name"]: [one["words"] for one in arm["stages"]] for arm in plan["arms"]}
    assert words["late"][2] == "average of the last 3 of code (steps 13, 12, 10): 50 %, 33.3 %, 16.7 %"


def test_command_lines(tmp_path: Path) -> None:
    arms = ARMS | {
        "twin": {"stages": ["init", "code"]},
        "three": {"stages": [{"name": "three", "average": ["code", "web", "twin"], "weights": ["1", "0.5", "0.25"]}]},
        "deep": {"stages": [{"name": "deep", "average": ["late/mean", "soup/soup"]}]},
    }
    graph = planned(tmp_path, tables(arms, STAGES, base=KEEP)).graph
    study = StudyFolder(Path("S"))
    ids = {label: node.id for node in graph.nodes.values() for label in node.labels}
    code, web, mean = (study.node(ids[name]).path / "checkpoints" for name in ("code", "web", "mean"))
    assert average_words(graph, ids["mean"], study) == [
        *("average_checkpoints", "--output", f"{mean}/step-000000013"),
        *("--checkpoint", f"{code}/step-000000013", "--weight", "3"),
        *("--checkpoint", f"{code}/step-000000012", "--weight", "2"),
        *("--checkpoint", f"{code}/step-000000010", "--weight", "1"),
    ]
    assert averaged_checkpoints(graph, ids["soup"], study) == [
        (web / "step-000000013", Fraction(2, 3)),
        (code / "step-000000013", Fraction(1, 3)),
    ]
    # arms that are one node are one checkpoint, with the sum of their weights
    assert averaged_checkpoints(graph, ids["three"], study) == [
        (code / "step-000000013", Fraction(5, 7)),
        (web / "step-000000013", Fraction(2, 7)),
    ]
    assert averaged_checkpoints(graph, ids["deep"], study)[0] == (mean / "step-000000013", Fraction(1, 2))


def test_B1_an_average_of_one_node_and_members_that_are_gone(tmp_path: Path) -> None:
    arms = {
        "a": {"stages": ["init"]},
        "b": {"stages": ["init"]},
        "m": {"stages": [{"name": "m", "average": ["a", "b"]}]},
    }
    with pytest.raises(ConfigError, match="stage 'm' averages a/init, b/init, which are one and the same node"):
        planned(tmp_path, tables(arms, STAGES))
    result = planned(tmp_path, tables(ARMS, STAGES, base=KEEP))
    study = StudyFolder(tmp_path / "out")
    ids = {node.label: node.id for node in result.graph.nodes.values()}
    check_averaged(result.graph, ids["mean"], study)  # nothing is trained yet
    for step in (8, 13):
        study.node(ids["code"]).checkpoint(step).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has no step-000000012, step-000000010, which mean averages"):
        check_averaged(result.graph, ids["mean"], study)


# -- a whole study, by its command lines ------------------------------------------------------------------------------


def made(graph: Graph, study: StudyFolder) -> Iterator[tuple[str, Path]]:
    """Makes every node in order, as `study run` would; (label, its checkpoint)."""
    for name, node in graph.nodes.items():
        folder = study.node(name)
        folder.path.mkdir(parents=True)
        if node.kind == "average":
            check_averaged(graph, name, study)
            command, *words = average_words(graph, name, study)
            assert command == "average_checkpoints" and run_command(average_checkpoints.main, words) == 0
        else:
            folder.config.write_text(config_to_toml(graph.run_config(name, str(study.path))))
            parents = [str(end_checkpoint(graph, one, study)) for one in node.parents]
            words = ["--resume-from", parents[0]] if parents else []
            done = train(folder.config, *words)
            assert done.returncode == 0, (node.label, done.stderr)
        yield name, end_checkpoint(graph, name, study)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[PlannedStudy, StudyFolder]:
    folder = tmp_path_factory.mktemp("averages")
    make_run(folder)
    sources = {
        "web": {"data": [f"{folder}/data/prose"], "max_epochs": 9},
        "python": {"data": [f"{folder}/data/python"], "group": "code", "max_epochs": 9},
    }
    words = tables(ARMS, STAGES, base=KEEP | {"sources": sources})
    words["study"]["output"] = str(folder / "out")
    result, study = planned(folder, words), StudyFolder(folder / "out")
    for _, checkpoint in made(result.graph, study):
        assert checkpoint.is_dir()
    return result, study


def test_every_node_runs_and_averages_are_numpys(ran: tuple[PlannedStudy, StudyFolder]) -> None:
    result, study = ran
    graph = result.graph
    ids = {node.label if node.label != "cool" else f"cool-{node.arms[0]}": node.id for node in graph.nodes.values()}

    def weights(name: str, step: int) -> dict[str, np.ndarray[Any, Any]]:
        (file,) = (study.node(ids[name]).checkpoint(step) / "model").iterdir()
        return load_file(file)

    assert steps_in(study.node(ids["code"]).path) == [6, 8, 10, 12, 13], "keep = 1 beside what the mean needs"
    members = [weights("code", step) for step in (13, 12, 10)]
    for name, value in weights("mean", 13).items():
        one, other, third = (member[name].astype(np.float64) for member in members)
        assert np.allclose(value, (3 * one + 2 * other + third) / 6, rtol=2e-7, atol=0)
    for name, value in weights("soup", 13).items():
        wanted = (2 * weights("web", 13)[name].astype(np.float64) + weights("code", 13)[name].astype(np.float64)) / 3
        assert np.array_equal(value, wanted.astype(np.float32))
    # what follows goes on from the data position of the first member, whichever that is
    for arm, first in (("late", "code"), ("soup", "web")):
        state = json.loads((study.node(ids[f"cool-{arm}"]).checkpoint(20) / "state.json").read_text())
        assert [one["name"] for one in state["data"]["stages"]] == ["init", first, "cool"]
        assert state["taken"]["cool"] == FRESH and state["data"]["events"][0]["event"] == "averaged"
        assert [row[0] for row in curve_of(study.node(ids[f"cool-{arm}"]).path)] == list(range(14, 21))


def test_a_node_that_was_killed_is_made_again_by_the_same_words(ran: tuple[PlannedStudy, StudyFolder]) -> None:
    result, study = ran
    graph = result.graph
    name = next(node.id for node in graph.nodes.values() if node.label == "soup")
    output = end_checkpoint(graph, name, study)
    before = (output / "manifest.json").read_bytes()
    shutil.move(output, output.with_name(f".{output.name}.partial"))
    (output.with_name(f".{output.name}.partial") / "manifest.json").unlink()
    assert run_command(average_checkpoints.main, average_words(graph, name, study)[1:]) == 0
    assert (output / "manifest.json").read_bytes() == before, "and the same, byte for byte"
