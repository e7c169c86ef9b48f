"""The driver of `make demo` on steps of its own: order, skipping, failing, stopping. And the example configs parse."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron.config.load import load_config


@pytest.fixture(scope="module")
def driver() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "demo" / "run.py"
    spec = importlib.util.spec_from_file_location("demo_driver", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_driver"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


Make = Callable[..., Any]


@pytest.fixture
def step(driver: ModuleType, tmp_path: Path) -> Make:
    """A step that appends its name to a log, writes its output and exits with `code`."""

    def make(name: str, code: int = 0, inputs: str = "") -> Any:
        output = tmp_path / f"{name}.out"
        program = (
            f"open({str(tmp_path / 'log')!r}, 'a').write('{name} '); "
            f"open({str(output)!r}, 'w').write('x'); raise SystemExit({code})"
        )
        return driver.Step(name, "title", lambda: [[sys.executable, "-c", program]], (output,), inputs)

    return make


def log(folder: Path) -> str:
    return (folder / "log").read_text(encoding="utf-8")


def test_steps_run_in_order_and_are_skipped_when_finished(driver: ModuleType, step: Make, tmp_path: Path) -> None:
    code, seconds = driver.run_steps([step("a"), step("b")], tmp_path)
    assert (code, list(seconds)) == (0, ["a", "b"])
    again, recorded = driver.run_steps([step("a"), step("b")], tmp_path)
    assert (again, recorded) == (0, seconds)
    assert log(tmp_path) == "a b "


def test_a_changed_input_runs_that_step_and_those_after_it(driver: ModuleType, step: Make, tmp_path: Path) -> None:
    driver.run_steps([step("a"), step("b"), step("c")], tmp_path)
    driver.run_steps([step("a"), step("b", inputs="new config"), step("c")], tmp_path)
    assert log(tmp_path) == "a b c b c "


def test_a_missing_output_runs_the_step_again(driver: ModuleType, step: Make, tmp_path: Path) -> None:
    driver.run_steps([step("a"), step("b")], tmp_path)
    (tmp_path / "b.out").unlink()
    driver.run_steps([step("a"), step("b")], tmp_path)
    assert log(tmp_path) == "a b b "


def test_a_failing_step_gives_its_own_code_and_says_how_to_go_on(
    driver: ModuleType, step: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = driver.run_steps([step("a"), step("b", code=5), step("c")], tmp_path)
    assert code == 5
    message = capsys.readouterr().err
    assert "step 2 (b) ended with exit code 5" in message
    assert "--fresh" in message
    assert log(tmp_path) == "a b "
    assert driver.run_steps([step("a"), step("b"), step("c")], tmp_path)[0] == 0
    assert log(tmp_path) == "a b b c "


def test_a_stopped_step_is_no_error(
    driver: ModuleType, step: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert driver.run_steps([step("a"), step("b", code=75)], tmp_path)[0] == 75
    message = capsys.readouterr().err
    assert "stopped in step 2 (b)" in message and "error" not in message and "--fresh" not in message


def test_a_step_that_knows_what_is_done_runs_each_time(driver: ModuleType, step: Make, tmp_path: Path) -> None:
    steps = [step("a"), dataclasses.replace(step("b"), always=True, clears=False)]
    driver.run_steps(steps, tmp_path)
    driver.run_steps(steps, tmp_path)
    assert log(tmp_path) == "a b b "


def test_a_stop_reaches_the_running_command_which_may_save(driver: ModuleType, tmp_path: Path) -> None:
    """SIGTERM to the driver is passed on, and the driver waits for the command's own exit code."""
    ready = tmp_path / "ready"
    program = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)"
    )

    def stop() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    assert driver.run([sys.executable, "-c", program]) == 75
    thread.join(timeout=10)
    assert driver.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 128 + 9


def test_stage_ends_are_the_checkpoints_kept_for_ever(driver: ModuleType, tmp_path: Path) -> None:
    rows = [(10, "balanced", False), (14, "balanced", True), (20, "text", False), (24, "text", True), (30, "end", True)]
    for number, stage, keep in rows:
        folder = tmp_path / f"step-{number:09d}"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"keep_forever": keep}), encoding="utf-8")
        (folder / "state.json").write_text(json.dumps({"training_stage": stage}), encoding="utf-8")
    ends = driver.stage_ends(tmp_path)
    assert {stage: path.name[-2:] for stage, path in ends.items()} == {"balanced": "14", "text": "24", "end": "30"}
    assert list(ends) == ["balanced", "text", "end"]


def test_a_folder_of_somebody_else_is_left_alone(repository: Path, tmp_path: Path) -> None:
    """Not even --fresh deletes a folder that the demo did not make."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.tex").write_text("ten years", encoding="utf-8")
    command = [sys.executable, str(repository / "examples" / "demo" / "run.py"), "--fresh"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "was not made by this demo" in done.stderr
    assert (tmp_path / "demo" / "thesis.tex").read_text(encoding="utf-8") == "ten years"


def test_every_scale_writes_where_its_config_says(driver: ModuleType) -> None:
    for scale in driver.SCALES.values():
        config = load_config(scale.config)
        assert config.run.output == str(scale.folder / "run")
        assert config.tokenizer.path == str(scale.folder / "tokenizer.model")
        for name, source in config.sources.items():
            assert source.data == [str(scale.folder / "data" / name)]
        assert [stage.name for stage in config.stages] == ["balanced", "text", "cooldown"]


def test_example_configs_are_valid(repository: Path) -> None:
    # files of another kind: studies are planned by tests/study, a site's options read by test_slurm_files.py
    others = [repository / "examples" / name for name in ("studies", "slurm/site.toml")]
    found = sorted((repository / "examples").rglob("*.toml"))
    examples = [path for path in found if not any(path == other or other in path.parents for other in others)]
    assert len(examples) >= 4
    for path in examples:
        load_config(path)
