"""`make study-toy` at its tiny scale, as a user runs it: corpora to report; run again, nothing is left to train."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

ENDS = {
    *("text", "balanced", "balanced-to-text", "code-to-text"),
    *("text-cooldown-code", "balanced-cooldown-code", "balanced-to-text-cooldown-code", "code-to-text-cooldown-code"),
    *("share-0", "share-25", "share-50", "share-100"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toy")


def run_toy(repository: Path, folder: Path, *words: str) -> str:
    command = [sys.executable, str(repository / "examples" / "studies" / "run_toy.py"), "--scale", "tiny", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def nodes(study: Path) -> list[Path]:
    return sorted(path for path in (study / "nodes").iterdir() if (path / "node.json").exists())


def steps_trained(node: Path) -> list[int]:
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (node / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [row["step"] for row in rows if "loss" in row]


def test_one_command_trains_each_node_once_and_ends_in_a_report(repository: Path, folder: Path) -> None:
    first = run_toy(repository, folder)
    study = folder / "study-toy-tiny" / "study"
    assert f"Open {study.relative_to(folder) / 'report' / 'index.html'}" in first
    assert len(nodes(study)) == 12

    # 10 steps in each half, 2 in a cooldown, each trained once and in order
    trained = {path.name: steps_trained(path) for path in nodes(study)}
    assert sum(map(len, trained.values())) == 8 * 10 + 4 * 2
    assert all(steps == list(range(steps[0], steps[0] + len(steps))) for steps in trained.values())

    results = [json.loads((path / "results.json").read_text(encoding="utf-8")) for path in nodes(study)]
    assert {arm for result in results for arm in result["arms"]} >= ENDS
    for result in results:
        assert set(result["loss"]) == {"text", "python"}
        assert {one["suite"] for one in result["metrics"]} == {"loss", "heldout", "puzzles"}
    report = (study / "report" / "index.html").read_text(encoding="utf-8")
    for outside in ('src="http', "src='http", '<link rel="stylesheet" href="http'):
        assert outside not in report, "the report is not self-contained"
    table = (study / "report" / "report.md").read_text(encoding="utf-8")
    assert "note: Score" not in first and "is no figure of any node" not in first
    assert all(arm in table for arm in ENDS)

    before = {path: path.read_bytes() for path in study.glob("nodes/*/metrics.jsonl")}
    again = run_toy(repository, folder)
    assert again.count("finished before") == 3  # gather, tokenizer, data; the study finds by itself that all is done
    assert {path: path.read_bytes() for path in study.glob("nodes/*/metrics.jsonl")} == before
    assert (study / "report" / "report.md").read_text(encoding="utf-8") == table


def test_a_second_study_leaves_the_first_as_it_is(repository: Path, folder: Path) -> None:
    toy = folder / "study-toy-tiny"
    before = {path: path.read_bytes() for path in (toy / "data").iterdir()}
    run_toy(repository, folder, "--study", "quality")
    assert len(nodes(toy / "quality")) == 3
    assert {path: path.read_bytes() for path in before} == before
    results = json.loads((nodes(toy / "quality")[0] / "results.json").read_text(encoding="utf-8"))
    assert set(results["loss"]) == {"text", "python", "headers", "documented"}
