"""What is written is what can be read back: strict JSON, whole lines, nothing lost when a run is set back."""

from __future__ import annotations

import builtins
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.config.errors import StorageError, UnavailableError
from megatron.metrics.console import Console
from megatron.metrics.meters import Smoothed, StepClock
from megatron.metrics.sinks import JsonlSink, cut_after, flat_numbers


def strict(line: str) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(line, parse_constant=refuse)


def test_rows_are_strict_json_and_nan_is_null(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write({"step": 1, "loss": math.nan, "loss_by_source": {"code": math.inf, "text": 1.5}, "name": "größe"})
    sink.write({"step": 2, "loss": 0.1, "list": [1.0, math.nan]})
    sink.sync()
    sink.close()
    rows = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0] == {"step": 1, "loss": None, "loss_by_source": {"code": None, "text": 1.5}, "name": "größe"}
    assert rows[1] == {"step": 2, "loss": 0.1, "list": [1.0, None]}


def test_floats_survive_bit_for_bit(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(200) * 10.0 ** np.random.default_rng(1).integers(-200, 200, 200)
    sink = JsonlSink(tmp_path / "m.jsonl")
    for step, value in enumerate(values):
        sink.write({"step": step, "loss": float(value)})
    found = [strict(line)["loss"] for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert found == values.tolist()


def test_B1_rows_past_the_checkpoint_are_set_aside_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = ['{"step": 1}\n', '{"step": 2, "validation": {"code": 1}}\n']
    past = ['{"step": 3}\n', '{"step": 10}\n', '{"step": 4, "lo']
    path.write_text("".join(kept + past))
    assert cut_after(path, 2) == 3
    assert path.read_text() == "".join(kept)
    assert (tmp_path / "metrics.discarded.jsonl").read_text() == "".join(past) + "\n"
    assert cut_after(path, 2) == 0 and path.read_text() == "".join(kept)
    assert cut_after(path, 0) == 2 and path.read_text() == ""
    assert (tmp_path / "metrics.discarded.jsonl").read_text() == "".join(past) + "\n" + "".join(kept)
    assert cut_after(tmp_path / "none.jsonl", 0) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.discarded.jsonl", "metrics.jsonl"]


def test_B1_a_full_disk_is_a_storage_error() -> None:
    sink = JsonlSink(Path("/dev/full"))
    with pytest.raises(StorageError, match="/dev/full.*No space left") as error:
        sink.write({"step": 1})
    assert error.value.exit_code == 74


def test_flat_numbers() -> None:
    row = {"step": 3, "loss": math.nan, "by": {"a": 1, "b": {"c": 2.5}}, "name": "x", "skipped": True, "none": None}
    assert flat_numbers(row) == {"step": 3.0, "by/a": 1.0, "by/b/c": 2.5}


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_B1_a_sink_that_is_not_installed_is_said_and_refused(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.split(".")[0] == package or name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnavailableError, match=f"pip install {package}") as error:
        if package == "wandb":
            from megatron.metrics.wandb_sink import WandbSink

            WandbSink("project", "name", "id", {})
        else:
            from megatron.metrics.tensorboard_sink import TensorBoardSink

            TensorBoardSink(tmp_path, 0)
    assert error.value.exit_code == 6


def test_clock_gives_every_second_one_name() -> None:
    time = [0.0]
    clock = StepClock(lambda: time[0])

    def items() -> Any:
        for item in range(2):
            time[0] += 3
            yield item

    seen = []
    for item in clock.waiting("data", items()):
        seen.append(item)
        with clock.spending("engine"):
            time[0] += 10
        time[0] += 1
        laps = clock.lap()
        assert laps == {"data": 3, "engine": 10, "step": 14}
        with clock.spending("checkpoint"):
            time[0] += 100
        if item == 1:
            assert clock.lap() == {"checkpoint": 100, "step": 100}
        else:
            assert clock.lap()["step"] == 100
    assert seen == [0, 1]


def test_smoothed_starts_at_the_first_value() -> None:
    meter = Smoothed(10)
    assert meter.value is None and meter.add(5.0) == 5.0
    assert meter.add(15.0) == pytest.approx(6.0)


def row_of(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "training_stage": "balanced",
        "consumed_tokens": 100 * step,
        "tokens": 100,
        "loss": 2.5,
        "loss_by_source": {"code": 2.0, "text": None},
        "lr": 1e-3,
        "skipped": False,
        "step_seconds": 0.5,
    }


def test_console_says_lines_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(every=2, terminal=False)
    console.begin(1000, 0)
    for step in (1, 2, 3, 4):
        console.write(row_of(step))
    console.write({"step": 4, "validation": {"code": 1.25, "text": None}})
    console.write({**row_of(5), "skipped": True, "skip_reason": "loss is nan", "loss": math.nan})
    console.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "balanced step 1",
        "balanced step 2",
        "balanced step 4",
        "step 4",
        "step 5",
    ]
    assert lines[0] == "balanced step 1: loss 2.5000 (code 2.000), lr 0.001, 200 tokens/s, 00:00:04 left"
    assert lines[3] == "step 4: validation code 1.250" and "loss is nan" in lines[4]


def test_console_draws_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(every=2, terminal=True)
    console.begin(1000, 0)
    console.write(row_of(1))
    console.say("a line")
    console.close()
    captured = capsys.readouterr()
    assert "a line" in captured.out and "balanced" in captured.err and "loss 2.5000" in captured.err
