"""`train` as a user meets it: real processes, killed, signalled, resumed, and handed bad input."""

from __future__ import annotations

import errno
import json
import random
import resource
import shutil
import signal
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import tiny_run
from tiny_run import STEPS, curve_of, exit_record, make_run, rows_of, steps_in, train, validation_of

from megatron.commands import train as train_command
from megatron.commands.frame import run_command

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpora, a config `run.toml` and its run, trained in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = train(make_run(folder))
    assert done.returncode == 0, done.stderr
    assert "run tiny begins at step 0" in done.stdout and "precision fp32" in done.stdout
    assert "resolved config, kept in" in done.stdout and 'name = "tiny"' in done.stdout
    return folder


def wait_for_step(output: Path, step: int, seconds: float = 60) -> None:
    """Until metrics.jsonl has a row of that step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        path = output / "metrics.jsonl"
        if path.exists() and f'"step": {step},'.encode() in path.read_bytes():
            return
        time.sleep(0.002)
    raise AssertionError(f"{output}: never reached step {step}")


def test_a_run_leaves_what_the_contract_names(undisturbed: Path) -> None:
    output = undisturbed / "run"
    rows = rows_of(output)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["training_stage"] for row in rows] == ["balanced"] * 8 + ["text"] * 6 + ["cooldown"] * 10
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(sum(row["samples_by_source"].values()) == 8 for row in rows)
    assert [step for step, _ in validation_of(output)] == [5, 8, 10, 14, 15, 20, 24]
    assert all(losses.keys() == {"python", "prose"} for _, losses in validation_of(output))
    assert steps_in(output) == [8, 14, 18, 21, 24], "those at stage ends, and the newest two of the others"
    record = exit_record(output)
    assert (record["code"], record["step"], record["consumed_samples"]) == (0, STEPS, STEPS * 8)
    newest = output / "checkpoints" / f"step-{STEPS:09d}"
    state = json.loads((newest / "state.json").read_text())
    assert {
        "format",
        "step",
        "consumed_samples",
        "consumed_tokens",
        "data",
        "schedule",
        "precision",
        "lr",
        "run_id",
    } <= {*state}
    assert (newest / "config.toml").read_bytes() == (output / "config.toml").read_bytes()
    assert state["data"]["consumed_samples"] == state["consumed_samples"] == STEPS * 8


class _Abandoned(StringIO):
    """What a pipe is once its reader has gone (`| head`): the third write fails."""

    def write(self, text: str) -> int:
        if self.tell() > 100:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


def test_B1_exit_json_has_the_code_of_a_run_whose_reader_went_away(tmp_path: Path) -> None:
    with redirect_stdout(_Abandoned()):
        code = run_command(train_command.main, [str(make_run(tmp_path))])
    record = exit_record(tmp_path / "run")
    assert code == record["code"] == 141 and record["reason"].startswith("BrokenPipeError")


def test_a_complete_run_says_so(undisturbed: Path) -> None:
    before = (undisturbed / "run" / "metrics.jsonl").read_bytes()
    done = train(undisturbed / "run.toml")
    assert done.returncode == 0 and "is complete" in done.stdout
    assert exit_record(undisturbed / "run")["code"] == 0
    assert (undisturbed / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 9))])
def test_T2_killed_three_times_at_random_equals_the_undisturbed_run(
    undisturbed: Path, tmp_path: Path, seed: int
) -> None:
    choose = random.Random(seed)
    shutil.copytree(undisturbed / "data", tmp_path / "data")
    config = make_run(tmp_path)
    output = tmp_path / "run"
    goal = 0
    for _ in range(3):
        goal = min(goal + choose.randint(1, 7), STEPS - 1)
        process = tiny_run.start(config)
        try:
            wait_for_step(output, goal)
            time.sleep(choose.random() * 0.02)
        finally:
            tiny_run.stop(process)
    done = train(config)
    assert done.returncode == 0, done.stderr
    assert curve_of(output) == curve_of(undisturbed / "run")
    assert validation_of(output) == validation_of(undisturbed / "run")
    for part in ("model/model-00000-of-00001-00000", "optimizer/optimizer-00000-of-00001-00000", "rng"):
        name = f"checkpoints/step-{STEPS:09d}/{part}.safetensors"
        assert (output / name).read_bytes() == (undisturbed / "run" / name).read_bytes(), part


def test_T2_each_signal_saves_and_a_resume_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed / "data", tmp_path / "data")
    config = make_run(tmp_path)
    output = tmp_path / "run"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        already = max(steps_in(output), default=0)
        process = tiny_run.start(config)
        try:
            wait_for_step(output, already + 2)
            process.send_signal(number)
            assert process.wait(60) == 75
        finally:
            tiny_run.stop(process)
        record = exit_record(output)
        assert (record["code"], record["reason"]) == (75, number.name)
        assert record["step"] == max(steps_in(output)) == rows_of(output)[-1]["step"] < STEPS
    assert train(config).returncode == 0
    assert curve_of(output) == curve_of(undisturbed / "run")


def test_T2_other_microbatches_and_prefetch_see_the_same_batches(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed / "data", tmp_path / "data")
    config = make_run(tmp_path)
    assert train(config, "--set", "train.micro_batch_size=2", "--set", "data.prefetch=0").returncode == 0
    digests = [row["batch_digest"] for row in rows_of(tmp_path / "run")]
    assert digests == [row["batch_digest"] for row in rows_of(undisturbed / "run")]
    losses = [row["loss"] for row in rows_of(tmp_path / "run")]
    assert losses == pytest.approx([row["loss"] for row in rows_of(undisturbed / "run")], rel=1e-4)


@pytest.fixture
def half(undisturbed: Path, tmp_path: Path) -> Path:
    """The undisturbed run, as if killed after step 18 was saved: config at the returned path."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    for step in (21, 24):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:09d}")
    return make_run(tmp_path)


def test_C1_a_damaged_newest_checkpoint_is_passed_over_loudly(undisturbed: Path, half: Path) -> None:
    output = half.parent / "run"
    weights = output / "checkpoints" / "step-000000018" / "model" / "model-00000-of-00001-00000.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    done = train(half)
    assert done.returncode == 0, done.stderr
    assert f"damaged checkpoint passed over: {weights}: expected sha256" in done.stdout
    assert "goes on from" in done.stdout and "step-000000014" in done.stdout
    assert curve_of(output) == curve_of(undisturbed / "run")


def test_C1_a_damaged_checkpoint_asked_for_by_name_is_refused(half: Path) -> None:
    folder = half.parent / "run" / "checkpoints" / "step-000000018"
    (folder / "rng.safetensors").unlink()
    before = (half.parent / "run" / "metrics.jsonl").read_bytes()
    done = train(half, "--resume-from", str(folder))
    assert done.returncode == 4 and "rng.safetensors: expected" in done.stderr
    assert "name another, or leave it out" in done.stderr
    assert exit_record(half.parent / "run")["code"] == 4
    assert (half.parent / "run" / "metrics.jsonl").read_bytes() == before


def test_C1_none_whole_is_exit_4_and_nothing_is_moved(half: Path) -> None:
    output = half.parent / "run"
    for path in (output / "checkpoints").glob("step-*/state.json"):
        path.unlink()
    before = (output / "metrics.jsonl").read_bytes()
    done = train(half)
    assert done.returncode == 4 and "none of its 3 checkpoints is whole" in done.stderr
    assert (output / "metrics.jsonl").read_bytes() == before


def test_resume_from_an_older_checkpoint_sets_newer_ones_aside(undisturbed: Path, half: Path) -> None:
    output = half.parent / "run"
    all_rows = (output / "metrics.jsonl").read_text().splitlines()
    process = train(half, "--resume-from", str(output / "checkpoints" / "step-000000008"))
    assert process.returncode == 0, process.stderr
    assert curve_of(output) == curve_of(undisturbed / "run")
    assert sorted(path.name[:14] for path in (output / "checkpoints" / "discarded").iterdir()) == [
        "step-000000014",
        "step-000000018",
    ]
    discarded = (output / "metrics.discarded.jsonl").read_text().splitlines()
    kept = (output / "metrics.jsonl").read_text().splitlines()[: len(all_rows) - len(discarded)]
    assert kept + discarded == all_rows


def test_a_branch_from_another_runs_checkpoint(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed / "data", tmp_path / "data")
    config = make_run(tmp_path, "branch")
    origin = undisturbed / "run" / "checkpoints" / "step-000000014"
    assert train(config, "--resume-from", str(origin)).returncode == 0
    assert curve_of(tmp_path / "branch") == curve_of(undisturbed / "run")[14:]
    assert steps_in(tmp_path / "branch")[0] == 14
    done = train(config, "--resume-from", str(origin))
    assert done.returncode == 2 and "is not of this run" in done.stderr


def test_B1_fresh_refuses_an_occupied_folder(undisturbed: Path) -> None:
    before = curve_of(undisturbed / "run")
    done = train(undisturbed / "run.toml", "--fresh")
    assert done.returncode == 2 and "--fresh" in done.stderr and "already holds a run" in done.stderr
    assert curve_of(undisturbed / "run") == before


def test_M5_a_changed_past_is_exit_5_and_a_changed_future_is_work(half: Path) -> None:
    output = half.parent / "run"
    before = (output / "metrics.jsonl").read_bytes()
    for change, words in {
        "stages.balanced.mixture.code=0.6": "weights",
        "run.seed=8": "run.seed",
        "model.hidden_size=32": "hidden_size was 16 and is now 32",
    }.items():
        done = train(half, "--set", change)
        assert done.returncode == 5 and words in done.stderr, (change, done.stderr)
        assert exit_record(output)["code"] == 5
    assert (output / "metrics.jsonl").read_bytes() == before
    longer = ("--set", "stages.cooldown.steps=12")
    done = train(half, *longer)
    assert done.returncode == 5 and "horizon 1280" in done.stderr and "--allow-lr-change" in done.stderr
    done = train(half, *longer, "--allow-lr-change")
    assert done.returncode == 0, done.stderr
    assert len(rows_of(output)) == 26


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("run.nam=1", 2, "did you mean"),
        ("train.micro_batch_size=3", 2, "set train.global_batch_size to 6 or 9"),
        ("sources.python.data=['nowhere/python']", 3, "nowhere/python"),
        ("tokenizer.path='nowhere.model'", 3, "nowhere.model"),
        ("parallel.tensor=2", 2, "1 processes are not a multiple of pipeline 1 x context 1 x tensor 2 = 2"),
        ("parallel.schedule='zbv'", 2, "parallel.schedule = zbv needs a pipeline"),
        ("log.wandb_project='p'", 6, "pip install wandb"),
        ("stages.balanced.take.weights='nowhere'", 2, "stage 'balanced': take.weights"),
    ],
)
def test_B1_bad_input_is_named_and_nothing_is_left(tmp_path: Path, change: str, code: int, words: str) -> None:
    done = train(make_run(tmp_path), "--set", change)
    assert done.returncode == code and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not rows_of(tmp_path / "run")
    if (tmp_path / "run").exists():
        assert exit_record(tmp_path / "run")["code"] == code


def test_B1_data_of_another_tokenizer_or_beyond_the_vocabulary(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    manifest = tmp_path / "data" / "python.json"
    record = json.loads(manifest.read_text())
    record["tokenizer"].update(name="other", fingerprint="f" * 64)
    manifest.write_text(json.dumps(record))
    done = train(config)
    assert done.returncode == 3 and "other" in done.stderr and "ffffffffffff" in done.stderr
    shutil.rmtree(tmp_path / "data")
    tiny_run.write_corpus(tmp_path / "data" / "prose", 2)
    tiny_run.write_corpus(tmp_path / "data" / "python", 1, highest=300)
    done = train(config)
    assert done.returncode == 3 and "python.bin: document 2, position 12: token id" in done.stderr


def test_B1_non_finite_losses_end_the_run_with_8_and_keep_the_good_state(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    words = ["--set", "stages.text.lr.start=1e30", "--set", "optimizer.name=sgd", "--set", "train.max_non_finite=3"]
    done = train(config, *words)
    assert done.returncode == 8 and "3 steps in a row without an update" in done.stderr, done.stderr
    output = tmp_path / "run"
    rows = rows_of(output)
    assert [row["skipped"] for row in rows[-4:]] == [False, True, True, True]
    assert None in (rows[-1]["loss"], rows[-1]["grad_norm"]) and rows[-1]["skipped_total"] == 3
    assert exit_record(output)["code"] == 8
    assert 8 in steps_in(output) and max(steps_in(output)) <= rows[-4]["step"]


def test_two_processes_never_train_in_one_folder(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    first = tiny_run.start(config, "--set", "stages.cooldown.steps=60")
    try:
        wait_for_step(tmp_path / "run", 1)
        second = train(config)
        assert second.returncode == 2 and "another process is training there" in second.stderr
    finally:
        tiny_run.stop(first)


def test_stages_take_over_weights_and_optimizer(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed / "data", tmp_path / "data")
    origin = undisturbed / "run" / "checkpoints" / "step-000000008"
    config = make_run(tmp_path)
    reference = curve_of(undisturbed / "run")

    def curve(*changes: str) -> list[tuple[object, ...]]:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        done = train(config, *(word for change in changes for word in ("--set", change)))
        assert done.returncode == 0, done.stderr
        return curve_of(tmp_path / "run")

    same = curve(f"stages.text.take.weights='{origin}'", f"stages.text.take.optimizer='{undisturbed / 'run'}'")
    assert same[:9] == reference[:9] and same[9] != reference[9], "another optimizer shows one step later"
    assert curve(f"stages.text.take.weights='{origin}'", f"stages.text.take.optimizer='{origin}'") == reference
    fresh = curve("stages.text.take.weights='fresh'")
    assert fresh[:8] == reference[:8] and fresh[8] != reference[8]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000000024" / "state.json").read_text())
    assert state["taken"] == {"text": {"weights": "fresh"}}
    reset = curve("stages.text.take.optimizer='fresh'")
    assert reset[:9] == reference[:9] and reset[9] != reference[9]


def test_a_stage_takes_weights_from_a_hugging_face_folder(undisturbed: Path, tmp_path: Path) -> None:
    from megatron.hf.checkpoint_source import open_source
    from megatron.hf.export import export_checkpoint

    shutil.copytree(undisturbed / "data", tmp_path / "data")
    source = open_source(undisturbed / "run" / "checkpoints" / "step-000000008")
    export_checkpoint(source, tmp_path / "exported", proven=False)
    config = make_run(tmp_path)
    done = train(config, "--set", f"stages.text.take.weights='{tmp_path / 'exported'}'")
    assert done.returncode == 0, done.stderr
    assert "weights from" in done.stdout
    found, reference = curve_of(tmp_path / "run"), curve_of(undisturbed / "run")
    assert found[:8] == reference[:8]
    assert [row[4] for row in found] == pytest.approx([row[4] for row in reference], rel=1e-5)


def test_B1_a_full_disk_while_saving_is_74_and_old_checkpoints_live(undisturbed: Path, half: Path) -> None:
    output = half.parent / "run"
    before = {path: path.read_bytes() for path in (output / "checkpoints").rglob("*") if path.is_file()}
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        done = train(half)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert done.returncode == 74 and "step-000000021" in done.stderr and "File too large" in done.stderr, done.stderr
    assert exit_record(output)["code"] == 74
    assert {path: path.read_bytes() for path in (output / "checkpoints").rglob("*") if path.is_file()} == before
    assert train(half).returncode == 0
    assert curve_of(output) == curve_of(undisturbed / "run")


def test_help_is_for_a_stranger(stagemix_command: list[str]) -> None:
    import subprocess

    done = subprocess.run([*stagemix_command, "train", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for word in ("--resume-from", "--fresh", "exit codes", "75", "examples:", "torchrun", "srun", "deepspeed"):
        assert word in done.stdout
