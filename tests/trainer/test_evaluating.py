"""Evaluation of a run's checkpoints while it trains: it changes nothing of the run, loses nothing, leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf.made_checkpoint import library_code, library_prose
from rank_jobs import RankJob, start_ranks, train_ranks
from tiny_run import CONFIG, curve_of, exit_record, make_run, steps_in, train
from trainer.stand_in import StandIn

from megatron.commands.evaluate import main as evaluate
from megatron.commands.frame import run_command
from megatron.commands.report import gather
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.metrics.report import render_report
from megatron.tokenizers.byte_level import ByteTokenizer

pytestmark = pytest.mark.timeout(300)
ENDS = [8, 14, 24]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpora and a run without evaluation."""
    folder = tmp_path_factory.mktemp("plain")
    done = train(make_run(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path).use(monkeypatch)


@pytest.fixture
def made(plain: Path, tmp_path: Path) -> Callable[..., Path]:
    """Gives configs over the same corpora, which write to tmp_path/run."""
    shutil.copytree(plain / "data", tmp_path / "data")

    def make(*lines: str) -> Path:
        return make_run(tmp_path, text="\n".join([CONFIG, "[evaluation]", 'tasks = ["quiz"]', *lines]))

    return make


def evaluated(output: Path) -> list[int]:
    """Steps with a result."""
    return sorted(int(path.stem.removeprefix("step-")) for path in (output / "evaluations").glob("step-*[0-9].json"))


def rows(output: Path) -> list[dict[str, Any]]:
    """Evaluation rows of metrics.jsonl."""
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "evaluation" in row]


def left_behind(output: Path) -> list[str]:
    """Requests, claims and scratch that are still there."""
    folder = output / "evaluations"
    return sorted(path.name for part in ("requests", "working") for path in (folder / part).glob("*"))


def wait_for(there: Callable[[], Any], job: RankJob, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end and job.processes[0].is_alive(), job.text()
        time.sleep(0.02)


def test_T2_training_that_waits_for_evaluations_is_the_same_training(
    plain: Path, tmp_path: Path, made: Callable[..., Path], stand_in: StandIn
) -> None:
    done = train(made('where = "here"', "every = 6"))
    assert done.returncode == 0, done.stderr
    output = tmp_path / "run"
    assert curve_of(output) == curve_of(plain / "run") and steps_in(output) == steps_in(plain / "run")
    assert evaluated(output) == stand_in.steps == [6, 8, 12, 14, 18, 24]
    found = rows(output)
    assert [(row["step"], row["evaluated_step"]) for row in found] == [(n, n) for n in evaluated(output)]
    assert [row["evaluation"] for row in found] == [{"quiz": {"acc": row["step"] / 100}} for row in found]
    assert {row["evaluated_stage"] for row in found} == {"balanced", "text", "cooldown"}
    assert found[0]["evaluation_stderr"] == {"quiz": {"acc": 0.01}} and found[0]["evaluated_tokens"] == 6 * 8 * 16
    assert left_behind(output) == [] and "quiz acc 0.060 ± 0.010" in done.stdout
    shown = render_report(gather(output, []))
    assert "cooldown, step 24" in shown and "24.0% ± 1.0" in shown and "Tasks while it trained" in shown


def test_checkpoints_beside_training_are_held_until_they_are_evaluated(
    plain: Path, tmp_path: Path, made: Callable[..., Path], stand_in: StandIn
) -> None:
    stand_in.becomes("time.sleep(0.3)")
    done = train(
        made("every = 3", "backlog = 20"), "--set", "checkpoint.keep=1", "--set", "checkpoint.asynchronous=true"
    )
    assert done.returncode == 0, done.stderr
    output = tmp_path / "run"
    assert evaluated(output) == sorted({*range(3, 25, 3), *ENDS}), done.stdout
    assert curve_of(output) == curve_of(plain / "run")
    assert steps_in(output) == [8, 14, 21, 24], "none is held any longer"
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps), "steps of rows never fall back"
    assert left_behind(output) == []


def test_what_nobody_evaluates_does_not_fill_the_disk(tmp_path: Path, made: Callable[..., Path]) -> None:
    done = train(made('where = "queue"', "every = 3", "backlog = 2"), "--set", "checkpoint.keep=1")
    assert done.returncode == 0, done.stderr
    assert steps_in(tmp_path / "run") == [3, 6, 8, 14, 21, 24]
    assert "step 9 is not evaluated: 2 checkpoints wait for it already (evaluation.backlog)" in done.stdout


def test_failures_are_on_record_and_tried_again_at_the_next_start(
    tmp_path: Path, made: Callable[..., Path], stand_in: StandIn
) -> None:
    stand_in.becomes('print("a word"); sys.exit("error: no such task") if step == 14 else None')
    config, output = made('where = "here"'), tmp_path / "run"
    done = train(config)
    assert done.returncode == 0 and evaluated(output) == [8, 24]
    assert done.stdout.count("step 14 could not be evaluated (exit code 1): no such task") == 1
    failure = json.loads((output / "evaluations" / "step-000000014.failed.json").read_text())
    assert failure["code"] == 1 and failure["last_lines"] == ["a word", "error: no such task"]
    assert "Step 14 could not be evaluated (exit code 1): no such task" in render_report(gather(output, []))
    stand_in.becomes("")
    again = train(config)
    assert again.returncode == 0 and "is complete" in again.stdout
    assert evaluated(output) == ENDS and stand_in.steps == [8, 14, 24, 14], "what is done is not done again"
    assert rows(output)[-1]["evaluated_step"] == 14 and rows(output)[-1]["step"] == 24
    assert not (output / "evaluations" / "step-000000014.failed.json").exists()


def test_a_required_evaluation_that_fails_ends_the_run_with_its_code(
    tmp_path: Path, made: Callable[..., Path], stand_in: StandIn
) -> None:
    stand_in.becomes("sys.exit(3)")
    config, output = made('where = "here"', "required = true"), tmp_path / "run"
    done = train(config)
    assert done.returncode == 3 and "evaluation.required" in done.stderr
    assert exit_record(output)["step"] == 8 and steps_in(output)[-1] == 8
    stand_in.becomes("")
    assert train(config).returncode == 0 and evaluated(output) == ENDS


def test_a_stop_by_signal_ends_the_evaluation_and_the_next_start_takes_it_up(
    tmp_path: Path, made: Callable[..., Path]
) -> None:
    stand_in = StandIn(tmp_path, "time.sleep(0 if step == 8 else 600)")
    config, output = made(), tmp_path / "run"
    job = start_ranks(1, config, fault=stand_in)
    wait_for(lambda: len(stand_in.steps) == 2, job)
    job.send(0, signal.SIGTERM)
    assert job.wait(60)[0] in (75, 0), job.text()
    assert evaluated(output) == [8] and "step-000000014.json" in left_behind(output)
    assert all(name.endswith(".json") for name in left_behind(output)), "no claim, no scratch"
    stand_in.becomes("")
    train_ranks(1, config, fault=stand_in)
    assert evaluated(output) == ENDS and stand_in.steps.count(8) == 1
    assert left_behind(output) == []


def test_after_kill_9_nothing_runs_on_and_the_next_start_clears_what_lies_there(
    plain: Path, tmp_path: Path, made: Callable[..., Path]
) -> None:
    pid = tmp_path / "pid"
    stand_in = StandIn(tmp_path, f"import os; Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(600)")
    config, output = made('where = "here"'), tmp_path / "run"
    job = start_ranks(1, config, fault=stand_in)
    wait_for(pid.exists, job)
    job.kill()
    names = left_behind(output)
    assert any("claim" in name for name in names) and any(name.startswith("step-000000008-") for name in names)
    end = time.monotonic() + 30
    while _runs(int(pid.read_text())):
        assert time.monotonic() < end, "the evaluation outlives its run"
        time.sleep(0.05)
    stand_in.becomes("")
    train_ranks(1, config, fault=stand_in)
    assert evaluated(output) == ENDS and left_behind(output) == []
    assert curve_of(output) == curve_of(plain / "run")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_the_harness_itself_gives_what_the_command_gives(tmp_path: Path) -> None:
    code = library_code(40)
    for name, texts in (("python", code), ("prose", library_prose(code))):
        write_texts(tmp_path / "data" / name, [text[:2000] for text in texts])
    text = CONFIG.replace("seq_length = 16", "seq_length = 256").replace("fraction = 0.1", "fraction = 0.3")
    lines = ['suite = "heldout"', 'where = "here"', "at_stage_ends = false", "every = 24", "questions = 4", "limit = 4"]
    config = make_run(tmp_path, text="\n".join([text, "[evaluation]", *lines, "passages = 400", 'dtype = "float32"']))
    done = train(config)
    assert done.returncode == 0 and evaluated(tmp_path / "run") == [24], done.stdout
    checkpoint, direct = tmp_path / "run" / "checkpoints" / "step-000000024", tmp_path / "direct.json"
    words = ["--suite", "heldout", "--config", str(config), "--questions", "4", "--limit", "4", "--passages", "400"]
    words += ["--dtype", "float32", "--model", str(checkpoint), "--output", str(direct)]
    assert run_command(evaluate, words) == 0
    ours = json.loads((tmp_path / "run" / "evaluations" / "step-000000024.json").read_text())
    assert ours["models"][0]["results"] == json.loads(direct.read_text())["models"][0]["results"]
    assert set(rows(tmp_path / "run")[0]["evaluation"]) == set(ours["tasks"])


def write_texts(prefix: Path, texts: list[str]) -> None:
    """An indexed dataset of the byte tokenizer."""
    tokenizer = ByteTokenizer()
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for text in texts:
            writer.add_document([*tokenizer.encode(text), tokenizer.eod_id])
        writer.manifest_fields["tokenizer"] = {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        }


class WithPhases:
    """A fault that notes every progress that a rank tells the watchdog of."""

    def __init__(self, stand_in: StandIn, notes: Path) -> None:
        self.stand_in, self.notes = stand_in, notes

    def __call__(self, rank: int) -> None:
        self.stand_in(rank)
        from megatron.parallel.health import Health

        at, path = Health.at, self.notes.with_name(f"{self.notes.name}-{rank}")

        def noted(self: Health, phase: str, step: int | None = None) -> None:
            with open(path, "a") as file:
                file.write(f"{phase}\n")
            at(self, phase, step)

        Health.at = noted  # type: ignore[method-assign]


def test_all_ranks_wait_for_an_evaluation_and_the_watchdog_hears_of_it(
    plain: Path, tmp_path: Path, made: Callable[..., Path]
) -> None:
    stand_in, notes = StandIn(tmp_path, "time.sleep(2.5 if step == 14 else 0)"), tmp_path / "phases"
    config, output = made('where = "here"'), tmp_path / "run"
    train_ranks(2, config, fault=WithPhases(stand_in, notes))
    assert evaluated(output) == stand_in.steps == ENDS
    told = [notes.with_name(f"phases-{rank}").read_text().count("evaluates a checkpoint\n") for rank in range(2)]
    assert min(told) >= 3, "once for each evaluation would not do for a long one"
    digests = [row[7] for row in curve_of(output)]
    assert digests == [row[7] for row in curve_of(plain / "run")]


def test_a_side_job_serves_a_queue(
    tmp_path: Path, made: Callable[..., Path], stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    config, output = made('where = "queue"'), tmp_path / "run"
    done = train(config)
    assert done.returncode == 0 and "--once" in done.stdout and stand_in.steps == []
    assert run_command(evaluate, ["--serve", str(output)]) == 0, "ends by itself, as the run is complete"
    assert evaluated(output) == stand_in.steps == ENDS and left_behind(output) == []
    assert "step 8 (balanced): begins" in capsys.readouterr().out
    assert "24.0% ± 1.0" in render_report(gather(output, [])), "the report needs no further start of the run"
    assert rows(output) == []
    assert train(config).returncode == 0
    assert [row["evaluated_step"] for row in rows(output)] == ENDS
    assert run_command(evaluate, ["--serve", str(output), "--once"]) == 0 and stand_in.steps == ENDS


def test_results_beyond_the_step_that_a_run_goes_back_to_are_set_aside(
    tmp_path: Path, made: Callable[..., Path], stand_in: StandIn
) -> None:
    config, output = made('where = "here"'), tmp_path / "run"
    assert train(config).returncode == 0
    done = train(config, "--resume-from", str(output / "checkpoints" / "step-000000014"))
    assert done.returncode == 0, done.stderr
    assert stand_in.steps == [*ENDS, 24] and evaluated(output) == ENDS
    assert [path.name[:14] for path in (output / "evaluations" / "discarded").iterdir()] == ["step-000000024"]
    assert [row["evaluated_step"] for row in rows(output)] == ENDS


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["every = 4"], "set evaluation.every to 3 or 6, or checkpoint.every to a divisor of 4"),
        (["every = 1"], "set evaluation.every to 3, or"),
        (["required = true"], 'where is "beside"'),
        (['suite = "heldout"'], "one task a source"),
        (['data = "d"'], "name it, evaluation.suite"),
        (["at_stage_ends = false"], "for no checkpoint"),
        (['include_path = "gone"'], "evaluation.include_path gone: no such folder"),
        (['suite = "stage-studi"'], "did you mean stage-study?"),
        (["evry = 3"], "every"),
    ],
)
def test_B1_wrong_keys_are_refused(made: Callable[..., Path], lines: list[str], words: str) -> None:
    done = train(made(*lines))
    assert done.returncode == 2 and words in done.stderr


def test_B1_when_without_what_is_refused(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain / "data", tmp_path / "data")
    done = train(make_run(tmp_path, text=CONFIG + "[evaluation]\nevery = 3\n"))
    assert done.returncode == 2 and "set evaluation.suite" in done.stderr
    text = CONFIG.replace("fraction = 0.1", "fraction = 0") + '[evaluation]\nsuite = "heldout"\n'
    done = train(make_run(tmp_path, text=text))
    assert done.returncode == 2 and "validation.fraction is 0" in done.stderr


def test_B1_folders_that_are_no_run_are_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([str(tmp_path / "gone")], [str(tmp_path)]):
        assert run_command(evaluate, ["--serve", *words]) == 2
    (tmp_path / "config.toml").write_text("")
    assert run_command(evaluate, ["--serve", str(tmp_path), "--suite", "heldout"]) == 2
    assert "leave --suite out" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["config.toml"]
