"""Whole runs with an instruction stage: what is said, resumed, refused, and done with batches that have no target."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from masked_runs import chats, write_masked
from rank_jobs import train_ranks
from tiny_run import CONFIG, curve_of, exit_record, make_run, rows_of, train, validation_of, write_corpus

from megatron.commands.frame import run_command
from megatron.commands.inspect_data import main as inspect_data

pytestmark = pytest.mark.timeout(300)
CHATS = chats(3, answered=0.3)
SOURCE = """
[sources.chat]
data = ["{data}/chat"]
max_epochs = 40
"""
SFT = """
[[stages]]
name = "sft"
steps = 8
objective = "instruction"
whole_loss = ["text"]
mixture = {{ chat = 0.75, text = 0.25 }}
lr = {{ peak = 1e-3 }}
"""
BEFORE = CONFIG[: CONFIG.index("[[stages]]")]
FIRST_STAGE = CONFIG[CONFIG.index("[[stages]]") : CONFIG.index('[[stages]]\nname = "text"')]
TAIL = CONFIG[CONFIG.index("[checkpoint]") :]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Pre-training, then instruction tuning."""
    return make(tmp_path, FIRST_STAGE + SFT)


def make(folder: Path, stages: str) -> Path:
    (folder / "data").mkdir(exist_ok=True)
    write_masked(folder / "data" / "chat", CHATS)
    text = BEFORE + SOURCE + stages + TAIL
    for name, seed in (("python", 1), ("prose", 2)):
        write_corpus(folder / "data" / name, seed)
    return make_run(folder, text=text)


def test_T2_a_run_that_is_stopped_within_the_stage_goes_on_as_if_it_was_not(config: Path, tmp_path: Path) -> None:
    done = train(config, "--set", "checkpoint.keep=20")
    assert done.returncode == 0, done.stderr
    assert "note: stage 'sft': the loss is on: chat " in done.stdout and "prose all of it" in done.stdout
    assert "does not read the loss mask" not in done.stdout, "no stage trains on it unread"
    assert "(of chat on masked targets)" in done.stdout
    whole = curve_of(tmp_path / "run")
    held_out = validation_of(tmp_path / "run")
    for step in (15, 16):  # it goes on from the twelfth, the fourth of the stage
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:09d}")
    assert train(config).returncode == 0
    assert curve_of(tmp_path / "run") == whole and validation_of(tmp_path / "run") == held_out


def test_M5_a_changed_mask_ends_the_resume_with_its_code(config: Path, tmp_path: Path) -> None:
    assert train(config).returncode == 0
    write_masked(tmp_path / "data" / "chat", [(ids, [1] * len(ids)) for ids, _ in CHATS])
    done = train(config)
    assert done.returncode == 5 and "stage 'sft': its loss mask of source 'chat' was" in done.stderr, done.stderr
    write_masked(tmp_path / "data" / "chat", CHATS)
    assert train(config).returncode == 0


def test_a_pre_training_stage_says_that_it_does_not_read_a_mask(tmp_path: Path) -> None:
    config = make(tmp_path, FIRST_STAGE.replace("text = 0.5", "chat = 0.5") + SFT)
    done = train(config, "--set", "stages.balanced.steps=1", "--set", "stages.sft.steps=1")
    assert done.returncode == 0, done.stderr
    note = "note: stage 'balanced' does not read the loss mask of source 'chat': all of its tokens are learned"
    assert done.stdout.count("does not read the loss mask") == 1 and note in done.stdout


def rare(folder: Path) -> Path:
    """Long documents of which one token is learned: most batches of one row have no target."""
    config = make(folder, SFT.replace(", text = 0.25", "").replace("0.75", "1").replace('whole_loss = ["text"]\n', ""))
    documents = [([5, 6, 7] * 60, [0] * 90 + [1] + [0] * 89) for _ in range(20)]
    write_masked(folder / "data" / "chat", documents)
    return config


ONE_ROW = ("--set", "train.global_batch_size=1", "--set", "train.micro_batch_size=1", "--set", "stages.sft.steps=30")


def test_a_batch_without_a_target_makes_no_update_and_is_said(tmp_path: Path) -> None:
    done = train(rare(tmp_path), *ONE_ROW, "--set", "train.max_non_finite=30")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "run")
    empty = [row for row in rows if not row["valid_targets"]]
    assert 15 < len(empty) < 30
    assert all(row["skipped"] and row["loss"] is None and row["loss_by_source"] == {"chat": None} for row in empty)
    assert all(row["loss"] > 0 and not row["skipped"] for row in rows if row not in empty)
    assert f"step {empty[0]['step']}: no update: no target of the batch is valid" in done.stdout
    assert rows[-1]["skipped_total"] == len(empty)


def test_many_such_batches_in_a_row_end_the_run_with_a_remedy(tmp_path: Path) -> None:
    done = train(rare(tmp_path), *ONE_ROW, "--set", "train.max_non_finite=3")
    assert done.returncode == 8 and "The loss masks mark nothing in these batches" in done.stderr, done.stderr
    assert "--loss" in done.stderr and "global_batch_size" in done.stderr and "learning rate" not in done.stderr
    assert exit_record(tmp_path / "run")["code"] == 8


def test_inspect_data_shows_what_samples_of_the_stage_learn(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(inspect_data, [str(config), "--samples", "64:80", "--loss", "--jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["source"] for row in rows} == {"chat", "prose"}
    for row in rows:
        for (document, start, end), learned, count in zip(row["pieces"], row["learned"], row["targets"], strict=True):
            if row["source"] == "prose":
                assert learned == [place > 0 for place in range(start, end)] and count >= end - start - 1
                continue
            bits = CHATS[document][1]
            assert learned == [place > 0 and bits[place] == 1 for place in range(start, end)]
            assert count == sum(bits[start + 1 : end + 1])
    assert run_command(inspect_data, [str(config), "--samples", "64:80", "--loss"]) == 0
    shown = capsys.readouterr().out
    total = sum(sum(row["targets"]) for row in rows[:1])
    assert f"the window ends: the loss is on {total} of its targets" in shown and "│  █ " in shown
    assert run_command(inspect_data, [str(config), "--samples", "0:2", "--pieces"]) == 0
    assert "the loss is on" not in capsys.readouterr().out, "pre-training learns all"


def test_T1_ranks_train_and_validate_the_stage_as_one_process_does(config: Path, tmp_path: Path) -> None:
    assert train(config).returncode == 0
    alone, held_out = curve_of(tmp_path / "run"), validation_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    train_ranks(2, config, "--set", "parallel.data_shard=full")
    ranks = curve_of(tmp_path / "run")
    assert [row[:4] for row in ranks] == [row[:4] for row in alone]
    assert [row[4] for row in ranks] == pytest.approx([row[4] for row in alone], rel=1e-4)
    for (_, mine), (_, theirs) in zip(validation_of(tmp_path / "run"), held_out, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
