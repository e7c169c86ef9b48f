"""T2, C1, M2 and the end of every job, over whole lives of a run: ranks are killed, stopped and asked to stop at random
moments, and the run is started again, at the same layout or another, until it is complete.

A life that fails says its seed and tells its story. STAGEMIX_KILL_SEED=N draws other lives, STAGEMIX_KILL_FIRST=K
begins with the K-th (seed 1000 N + K), STAGEMIX_KILLS is how many events `make soak` waits for.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from kills.laws import Truth, rows_in, validations_in
from kills.life import RUN, Layout, Life, Script, words_of
from kills.tally import Tally
from rank_jobs import train_ranks
from tiny_run import make_run

pytestmark = pytest.mark.long

ONE = Layout("one process", 1)
DATA = Layout("dp2", 2)
SHARD = Layout("full shard 2", 2, (("data_shard", "'full'"),))
TENSOR = Layout("tp2", 2, (("tensor", "2"),))
PIPELINE = Layout("pp2", 2, (("pipeline", "2"),))
FOUR = Layout("tp2 x dp2", 4, (("tensor", "2"),))
ZERO = Layout("deepspeed ZeRO-1 dp2", 2, (("engine", "'deepspeed'"), ("data_shard", "'optimizer'")))
ZERO_FOUR = Layout("deepspeed tp2 x ZeRO-1 dp2", 4, (*ZERO.keys, ("tensor", "2")))

SCRIPTS = (
    Script("one process", (ONE,)),
    Script("two data ranks", (DATA,), torchrun=0.2),
    Script("tp2 x dp2", (FOUR,), torchrun=0.1),
    Script("layouts change", (ONE, DATA, SHARD, TENSOR, PIPELINE, FOUR), torchrun=0.1),
    Script("engines change", (ONE, TENSOR, ZERO, ZERO_FOUR, SHARD)),
)
QUICK = Script("quick", (ONE, DATA, TENSOR, FOUR), alone=0.0)
SEED = int(os.environ.get("STAGEMIX_KILL_SEED", "7"))
FIRST = int(os.environ.get("STAGEMIX_KILL_FIRST", "0"))
TOLERANCE = 1e-4
"""Law T1, fp32 with AdamW."""


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """A folder with corpora and the undisturbed run of one process, in which every step was saved."""
    folder = tmp_path_factory.mktemp("truth")
    config = make_run(folder)
    shutil.copytree(folder / "data", folder / "corpora")  # without the indexes that the run makes
    train_ranks(1, config, *words_of({**RUN, "checkpoint.every": 1, "checkpoint.keep": 1000}))
    return folder, Truth.of(folder / "run")


def live(truth: tuple[Path, Truth], folder: Path, script: Script, seed: int, kills: int) -> Life:
    """A whole life in a folder of its own, with indexes still to be made."""
    folder.mkdir()
    shutil.copytree(truth[0] / "corpora", folder / "data")
    life = Life(make_run(folder), folder / "run", script, seed, kills, truth[1])
    life.live()
    assert not life.tally.faults and not life.tally.hangs, f"seed {seed}\n" + "\n".join(life.story)
    if len(script.layouts) == 1:
        same_as_undisturbed(life, truth, folder, script.layouts[0])
    else:
        assert life.tally.worst_error < TOLERANCE, f"seed {seed}: {life.tally.worst_error}"
    return life


def same_as_undisturbed(life: Life, truth: tuple[Path, Truth], folder: Path, layout: Layout) -> None:
    """The same layout to the end: every loss and norm, and the final files, to the bit."""
    whole = folder / "undisturbed.toml"
    whole.write_text((folder / "run.toml").read_text().replace(str(folder / "run"), str(folder / "undisturbed")))
    train_ranks(layout.ranks, whole, *words_of(RUN), *layout.words())
    keys = ("step", "loss", "grad_norm", "lr", "loss_by_source", "valid_targets")
    curves = [
        [[row[key] for key in keys] for row in rows_in(output / "metrics.jsonl") if "loss" in row]
        for output in (life.output, folder / "undisturbed")
    ]
    assert curves[0] == curves[1] and validations_in(life.output) == validations_in(folder / "undisturbed")
    life.tally.worst_error = 0.0
    final = [max((output / "checkpoints").glob("step-*")) for output in (life.output, folder / "undisturbed")]
    names = [sorted(path.relative_to(one).as_posix() for path in one.rglob("*.safetensors")) for one in final]
    assert names[0] == names[1] and len(names[0]) > 2
    for name in names[0]:
        assert (final[0] / name).read_bytes() == (final[1] / name).read_bytes(), name


def kill(
    truth: tuple[Path, Truth],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    scripts: tuple[Script, ...],
    kills: int,
) -> Tally:
    """Lives one after another until there were so many kills; the figures are shown."""
    total, number = Tally(), FIRST
    while total.kills < kills:
        script, seed = scripts[number % len(scripts)], 1000 * SEED + number
        life = live(truth, folder / f"life-{number}", script, seed, kills - total.kills)
        total.add(life.tally)
        number += 1
        with capsys.disabled():
            tally = life.tally
            print(
                f"\n{script.name}, seed {seed}: {tally.kills} kills, {tally.attempts.total()} starts",
                end="",
                flush=True,
            )
    with capsys.disabled():
        print(f"\n{number - FIRST} lives, STAGEMIX_KILL_SEED={SEED}", *total.lines(), sep="\n")
    return total


@pytest.mark.timeout(300)
def test_T2_a_run_that_is_killed_five_times(
    truth: tuple[Path, Truth], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kill(truth, tmp_path, capsys, (QUICK,), 5).kills == 5


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_T2_a_hundred_random_kills(
    truth: tuple[Path, Truth], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kills = int(os.environ.get("STAGEMIX_KILLS", "100"))
    total = kill(truth, tmp_path, capsys, SCRIPTS, kills)
    assert total.kills >= kills


def test_the_laws_are_seen_to_be_broken(truth: tuple[Path, Truth], tmp_path: Path) -> None:
    """The checks themselves: each planted fault of a folder is found."""
    from kills.laws import faults_in, remains_of, whole_steps
    from kills.life import KEEP, STAGE_ENDS, STEPS

    folder, known = truth
    output = tmp_path / "run"

    def faults(plant: Callable[[], object], whole: int = STEPS) -> str:
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(folder / "run", output)
        plant()
        return "; ".join([*faults_in(output, known, whole, STEPS), *remains_of(output, STAGE_ENDS, 100)])

    metrics = output / "metrics.jsonl"

    def edit(change: Callable[[list[str]], list[str]]) -> Callable[[], object]:
        return lambda: metrics.write_text("".join(change(metrics.read_text().splitlines(keepends=True))))

    newest = output / f"checkpoints/step-{STEPS:09d}"
    assert faults(lambda: None) == ""
    assert "steps of metrics.jsonl" in faults(edit(lambda rows: rows[:4] + rows[5:]))
    assert "steps of metrics.jsonl" in faults(edit(lambda rows: rows[:4] + rows[3:]))
    assert "other samples" in faults(
        edit(lambda rows: [row.replace('"batch_digest": "', '"batch_digest": "0') for row in rows])
    )
    assert f"went back from step {STEPS}" in faults(lambda: (newest / "rng.safetensors").write_bytes(b"x"))
    assert "no checkpoint of the stage ends" in faults(lambda: shutil.rmtree(output / "checkpoints/step-000000015"), 0)
    assert ".tmp-x" in faults(lambda: (output / "checkpoints/.tmp-x").mkdir())
    assert len(whole_steps(output)) == STEPS and len(remains_of(output, STAGE_ENDS, KEEP)) == 2
