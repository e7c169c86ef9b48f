"""The studies of paper B at toy size and for one GPU, planned: what is trained, what is shared, and what fits."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from decimal import Decimal
from pathlib import Path

import pytest
from study.made_studies import write

from megatron.config.errors import ConfigError
from megatron.config.load import config_to_toml
from megatron.planner.hardware import find_accelerator
from megatron.study.costs import node_times
from megatron.study.plan import PlannedStudy, plan_study, study_plan

REPOSITORY = Path(__file__).resolve().parents[2]
PAPER_B = REPOSITORY / "examples" / "studies" / "paper-b"
STEP = 8 * 512
DEFAULT_ARMS = ("text", "balanced", "balanced-to-text", "code-to-text", "*-cooldown-code", "share-*")
TOYS = ("toy.toml", "toy-quality.toml")
PROSE, PYTHON = 4_200_000, 3_700_000  # tokens; about what 16 MB of prose and 12 MB of Python come to


def by_size(folder: Path, name: str, **sizes: int) -> Path:
    """The study with sources of these sizes instead of files."""
    words = tomllib.loads((PAPER_B / name).read_text(encoding="utf-8"), parse_float=Decimal)
    for source, tokens in sizes.items():
        table = words["base"]["sources"][source]
        del table["data"]
        table["tokens"] = tokens
    words["base"]["model"]["vocab_size"] = 4096
    # which files are asked about is no part of a plan
    del words["results"]
    return write(folder, words, name)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return by_size(tmp_path_factory.mktemp("toy"), "toy.toml", text=PROSE, python=PYTHON)


def test_the_toy_trains_18_million_tokens_once(toy: Path) -> None:
    """First halves: text, balanced, code, a quarter of code; second halves and cooldowns: four each."""
    graph = plan_study(toy, DEFAULT_ARMS).graph
    assert graph.trained == (4 * 500 + 4 * 500 + 4 * 100) * STEP == 18_022_400
    # four arms of 1000 steps, four of 1100, four shares of 500
    assert graph.naive == (4 * 1000 + 4 * 1100 + 4 * 500) * STEP
    assert len(graph.nodes) == 12


def test_all_arms_have_paper_bs_law_of_sharing(toy: Path) -> None:
    """Cooldowns are a fifth of a half here as there: four arms with three ends each share as much as at 200B."""
    plan = study_plan(plan_study(toy))
    (row,) = [row for row in plan["experiments"] if row["experiment"] == "stages"]
    assert row["arms"] == 12
    assert row["trained"] * 5120 == row["naive"] * 1720
    assert [one for one in plan["lost"] if not one["asked"]] == []


def test_the_toys_arms_are_those_of_the_full_study(toy: Path) -> None:
    def arms(path: Path) -> dict[str, list[tuple[str, str]]]:
        rows = study_plan(plan_study(path))["arms"]
        words = {row["name"]: [(one["label"], one["words"]) for one in row["stages"]] for row in rows}
        return {name: stages for name, stages in words.items() if not name.startswith("quality")}

    ours, theirs = arms(toy), arms(PAPER_B / "full.toml")
    assert set(ours) == set(theirs) - {"share-75", "share-90"}
    for name, stages in ours.items():
        assert [label for label, _ in stages] == [label for label, _ in theirs[name]], name
        # the same share of text at each stage but the cooldown's, whose text is another source there
        for (label, here), (_, there) in zip(stages, theirs[name], strict=True):
            assert label.startswith("cooldown") or share_of_text(here) == share_of_text(there), (name, here, there)


def share_of_text(words: str) -> str:
    return next((part for part in words.split(", ") if part.startswith("text ")), "text 0 %")


def test_shares_0_50_and_100_are_first_halves_of_arms(toy: Path) -> None:
    graph = plan_study(toy, DEFAULT_ARMS).graph
    paths = {arm.name: arm.path for arm in graph.arms}
    for share, arm in (("share-0", "text"), ("share-50", "balanced"), ("share-100", "code-to-text")):
        assert paths[share] == paths[arm][:1]
    assert paths["balanced-to-text"][:1] == paths["balanced"][:1]


def test_each_seed_trains_its_own_nodes(toy: Path) -> None:
    assert plan_study(toy, DEFAULT_ARMS, [1, 2, 3]).graph.trained == 3 * 18_022_400


def test_prose_is_repeated_at_most_four_times(tmp_path: Path, toy: Path) -> None:
    """The text arm takes 1000 steps of prose, and 80 in its cooldown: little more than one epoch of what was found.
    Where a machine has less than a quarter, nothing is trained."""
    (row,) = [row for row in study_plan(plan_study(toy, DEFAULT_ARMS))["warnings"] if "more than once" in row["text"]]
    assert "text for 1.05 epochs" in row["text"] and "python" not in row["text"]
    little = by_size(tmp_path, "toy.toml", text=1_000_000, python=PYTHON)
    with pytest.raises(ConfigError, match=r"source 'text' runs dry: .* max_epochs is 4"):
        plan_study(little, ["text*"])


def test_both_toys_train_the_same_model_alike() -> None:
    """What `quality` says of a kind of code is said of the model, tokenizer and optimizer of the other study."""
    toy, quality = (tomllib.loads((PAPER_B / name).read_text(encoding="utf-8")) for name in TOYS)
    sources = quality["base"].pop("sources")
    assert toy["base"].pop("sources").keys() == sources.keys() - {"headers", "documented"}
    assert toy["base"] == quality["base"]
    # "auto" would take what was quicker on the day
    assert toy["base"]["train"]["precision"] == "bf16"


def test_the_quality_toy_has_the_papers_shares(tmp_path: Path) -> None:
    path = by_size(tmp_path, "toy-quality.toml", text=PROSE, python=PYTHON, headers=1_300_000, documented=1_100_000)
    plan = study_plan(plan_study(path))
    assert {row["name"]: row["stages"][0]["words"] for row in plan["arms"]} == {
        "quality-python": "python 100 %",
        "quality-headers": "python 80 %, headers 20 %",
        "quality-documented": "python 85 %, documented 15 %",
    }
    assert plan["trained"] == 3 * 500 * STEP


@pytest.fixture(scope="module")
def one_gpu() -> PlannedStudy:
    return plan_study(PAPER_B / "one-gpu.toml")


def test_one_gpu_has_all_arms_of_the_full_study(one_gpu: PlannedStudy) -> None:
    """Half of 1.25B, cooldowns of 0.25B: 8.6 halves of 25.6 naive as at 200B, and six more halves for the others."""
    full = study_plan(plan_study(PAPER_B / "full.toml"))
    plan = study_plan(one_gpu)
    words = {row["name"]: [stage["words"] for stage in row["stages"]] for row in plan["arms"]}
    assert words == {row["name"]: [stage["words"] for stage in row["stages"]] for row in full["arms"]}
    (row,) = [row for row in plan["experiments"] if row["experiment"] == "stages"]
    batch = 128 * 2048
    assert abs(row["trained"] - 10.75e9) < 15 * batch / 2 and abs(row["naive"] - 32e9) < 36 * batch / 2
    assert abs(plan["trained"] - (10.75e9 + 6 * 1.25e9)) < 21 * batch / 2
    assert [one for one in plan["lost"] if not one["asked"]] == []


def test_one_gpu_fits_an_h200_and_a_day(one_gpu: PlannedStudy, tmp_path: Path) -> None:
    """By the planner's memory and time of a node's run, as `plan --hardware h200` prints them."""
    (node,) = [node for node in one_gpu.graph.nodes.values() if node.label == "text-on"]
    config = tmp_path / "node.toml"
    config.write_text(config_to_toml(one_gpu.graph.run_config(node.id, "runs/x")), encoding="utf-8")
    command = [sys.executable, "-m", "megatron.commands.cli", "plan", str(config), "--json"]
    command += ["--hardware", "h200", "--processes", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hardware"]["layout"]["fits"]
    times, notes = node_times(one_gpu.graph, find_accelerator("h200"), 1)
    assert not notes and sum(one.gpu_hours for one in times.values()) < 24
