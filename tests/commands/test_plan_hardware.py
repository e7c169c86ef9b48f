"""`stagemix plan --hardware`: what it prints for people and programs, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_runs import run_tables

from megatron.commands import plan
from megatron.commands.frame import run_command
from megatron.config.load import config_from_tables, config_to_toml

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "recipes" / "paper_b_balanced_to_text.toml"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A Llama of 3B without a parallel table: over 8 devices it fits none of them."""
    tables = run_tables(
        tmp_path,
        {"code": {"tokens": "20B", "group": "code"}, "text": {"tokens": "80B"}},
        [
            {"name": "one", "steps": 300, "mixture": {"code": 0.5, "text": 0.5}},
            {"name": "two", "steps": 100, "mixture": {"text": 1}},
        ],
        model={"preset": "llama-3b", "seq_length": 4096, "vocab_size": 32000},
        train={"global_batch_size": 64, "micro_batch_size": 2, "precision": "bf16"},
        tokenizer={"path": str(tmp_path / "not-there.model")},
    )
    file = tmp_path / "run.toml"
    file.write_text(config_to_toml(config_from_tables(tables)))
    return file


def planned(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert plan.main([*map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def without(figures: dict[str, Any]) -> dict[str, Any]:
    """What must be the same, whatever the config was before."""
    return {key: value for key, value in figures.items() if key not in ("set", "leave_out", "changes")}


def test_every_set_line_gives_the_figures_it_stands_beside(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [config_file, "--nodes", 2, "--hardware", "a100-40"]
    part = planned(capsys, *base, "--search", 12)["hardware"]
    assert len(part["search"]["best"]) == 12 and not part["layout"]["fits"]
    for row in [*part["search"]["best"], part["nearest"]]:
        words = [word for one in row["set"] for word in ("--set", one)]
        again = planned(capsys, *base, *words)
        found = again["hardware"]["layout"]
        assert not again["layout"]["refusals"] and found["fits"] and found["set"] == []
        step = row["step"]["total"] if "step" in row else row["step_seconds"]
        assert (found["words"], found["needed_bytes"], found["step"]["total"]) == (
            row["words"], row["needed_bytes"], step,
        )  # fmt: skip
        assert again["hardware"]["nearest"] is None
    assert without(part["nearest"]) == without(
        planned(capsys, *base, *[w for one in part["nearest"]["set"] for w in ("--set", one)])["hardware"]["layout"]
    )


def test_parts_add_up(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--set", "parallel.pipeline=4", "--set", "parallel.data_shard=optimizer", "--disk-bandwidth", 10)
    part = planned(capsys, config_file, "--processes", 32, "--hardware", "h200", *words)["hardware"]
    now, disk = part["layout"], part["disk"]
    assert part["nodes"] == 4 and part["partial_node"] == 0
    for rank in now["memory"]["ranks"]:
        kinds = ("parameters", "gradients", "optimizer", "gathered", "accumulated", "receive")
        kinds += ("activations", "logits", "workspace", "framework")
        assert sum(rank[kind] for kind in kinds) == rank["total"]
    assert now["needed_bytes"] == max(rank["total"] for rank in now["memory"]["ranks"])
    assert now["fits"] == (now["needed_bytes"] <= part["capacity_bytes"])
    spent = ("products", "attention", "memory_bound", "recompute", "bubble", "communication", "optimizer", "launch")
    assert sum(now["step"][kind] for kind in spent) == pytest.approx(now["step"]["total"])
    assert now["step"]["communication"] == pytest.approx(sum(now["step"]["exposed"].values()))
    run = now["run"]
    assert run["hours"] == pytest.approx(sum(stage["hours"] for stage in run["stages"]))
    assert run["gpu_hours"] == pytest.approx(32 * run["hours"])
    assert run["stages"][0]["hours"] * 3600 > 300 * now["step"]["total"]
    assert disk["checkpoint_bytes"] == disk["model_bytes"] + disk["optimizer_bytes"]
    assert disk["save_seconds"] == pytest.approx(disk["checkpoint_bytes"] / 10e9)
    assert disk["data_bytes"] > 2 * 100e9


def test_the_json_keys_are_those_of_the_help(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value).union(*(keys(one) for one in value.values()))
        return set().union(*(keys(one) for one in value)) if isinstance(value, list) else set()

    part = planned(capsys, config_file, "--nodes", 1, "--hardware", "h100", "--search", 2)["hardware"]
    documented = plan.EPILOG[plan.EPILOG.index("--hardware adds") :]
    top = [*part, *part["layout"], *part["search"], *part["disk"]]
    own = {"model_bytes", "optimizer_bytes", "asynchronous", "messages"}
    assert [key for key in top if f'"{key}"' not in documented and key not in own] == []
    assert {"words", "set", "fits", "moment", "hours", "hidden"} <= keys(part)


@pytest.mark.parametrize("where", [("--processes", "64"), ("--processes", "12"), ("--nodes", "1", "--search", "5")])
def test_it_reads_well_at_80_columns(where: tuple[str, ...], stagemix_command: list[str]) -> None:
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "80"}
    argv = [*stagemix_command, "plan", str(RECIPE), "--hardware", "h100", *where, "--width", "80"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    shown = done.stdout[done.stdout.index("\nOn ") :]
    assert [line for line in shown.splitlines() if len(line.rstrip()) > 80] == []
    for words in ("GPU-hours", "a checkpoint", "Exact:", "docs/planner.md"):
        assert words in shown


def test_the_page_has_a_hardware_section(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    assert plan.main([str(config_file), "--nodes", "2", "--hardware", "h100", "--search", "--html", str(page)]) == 0
    shown, text = capsys.readouterr().out, page.read_text()
    for words in ("<h2>Hardware</h2>", "master weights", "The fastest layouts that fit", "GPU-hours"):
        assert words in text
    assert "does not fit" in text and "does not fit" in shown
    assert plan.main([str(config_file), "--html", str(page)]) == 0
    assert "<h2>Hardware</h2>" not in page.read_text()


def test_a_plan_without_hardware_loads_nothing_of_it(config_file: Path) -> None:
    code = (
        "import sys; from megatron.commands.plan import main; main([sys.argv[1]]); "
        "names = {'megatron.planner.' + name for name in ('search', 'step_time', 'rank_memory', 'hardware', 'disk')}; "
        "sys.exit(' '.join((names | {'torch'}) & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(config_file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--hardware", "h10"), 2, "did you mean 'h100'"),
        (("--hardware", "gone.toml"), 2, "gone.toml"),
        (("--search",), 2, "--search needs --hardware"),
        (("--nodes", "2"), 2, "--nodes needs --hardware"),
        (("--hardware", "h100", "--search"), 2, "--processes or --nodes"),
        (("--hardware", "h100", "--nodes", "2", "--processes", "16"), 2, "leave one out"),
        (("--hardware", "h100", "--nodes", "0"), 2, "at least one"),
        (("--hardware", "h100", "--nodes", "1", "--search", "0"), 2, "at least one layout"),
        (("--hardware", "h100", "--memory-margin", "1"), 2, "from 0 to below 1"),
        (("--hardware", "h100", "--disk-bandwidth", "0"), 2, "above 0"),
        (("--hardware", "h100", "--disk-bandwidth", "nan"), 2, "above 0"),
        (("--hardware", "h100", "--efficiency", "nowhere"), 3, "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_is_refused(
    config_file: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, said: str
) -> None:
    assert run_command(plan.main, [str(config_file), *words]) == code
    assert said in capsys.readouterr().err


def test_the_vocabulary_must_be_known(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_file.write_text(config_file.read_text().replace("vocab_size = 32000\n", ""))
    assert plan.main([str(config_file), "--processes", "8"]) == 0
    capsys.readouterr()
    assert run_command(plan.main, [str(config_file), "--hardware", "h100"]) == 2
    assert "model.vocab_size" in capsys.readouterr().err


def test_processes_that_no_layout_of_the_config_has(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --hardware an error; with it the layout that would do."""
    words = [str(config_file), "--processes", "8", "--set", "parallel.tensor=3"]
    assert run_command(plan.main, words) == 2
    capsys.readouterr()
    part = planned(capsys, *words, "--hardware", "h100")["hardware"]
    assert part["layout"] is None and part["refusals"] and part["nearest"]["fits"]


@pytest.mark.parametrize("hardware", ["a100", "b200"])
def test_one_process_and_what_would_be_needed(
    config_file: Path, capsys: pytest.CaptureFixture[str], hardware: str
) -> None:
    part = planned(capsys, config_file, "--processes", 1, "--hardware", hardware)["hardware"]
    assert part["nodes"] == 1 and part["layout"]["communication"] == [] and part["layout"]["bubble"] == 0
    if hardware == "b200":
        assert part["search"] is None
    if part["search"] is not None and not part["search"]["best"]:
        assert part["search"]["misses"] and part["search"]["fewest_processes"] > 1


def test_deepspeed_is_said_to_be_estimated(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--set", "parallel.engine=deepspeed", "--set", "parallel.data_shard=full")
    part = planned(capsys, config_file, "--nodes", 2, "--hardware", "h100", *words, "--search", 3)["hardware"]
    assert any("DeepSpeed" in note for note in part["layout"]["notes"])
    assert part["search"]["best"]


def test_a_device_of_ones_own(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.toml"
    file.write_text('like = "h100"\nmemory_bytes = 40_000_000_000\nprocesses_per_node = 4\n')
    part = planned(capsys, config_file, "--nodes", 3, "--hardware", file, "--memory-margin", 0)["hardware"]
    assert part["processes"] == 12 and part["capacity_bytes"] == 40_000_000_000
    assert part["accelerator"]["name"] == "small"
