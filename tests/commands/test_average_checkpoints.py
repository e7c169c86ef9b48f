"""`stagemix average_checkpoints` from outside: real runs averaged, exported, generated from, and trained on from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_jobs import train_ranks
from safetensors.numpy import load_file, save_file
from tiny_run import CONFIG, Done, curve_of, exit_record, make_run, rows_of, steps_in, train, validation_of
from transformers import AutoModelForCausalLM

from megatron.checkpoint.manager import open_checkpoint
from megatron.checkpoint.manifest import NAME, build_manifest, manifest_bytes
from megatron.commands import average_checkpoints, export_hf, generate, ledger
from megatron.commands.frame import run_command
from megatron.config.load import load_config
from megatron.config.model_shape import ModelShape
from megatron.data.ledger import Ledger
from megatron.data.loader import BatchLoader
from megatron.data.sources import TokenizerIdentity
from megatron.models.decoder import Decoder
from megatron.planner.resolve import resolve_run
from megatron.tokenizers.byte_level import ByteTokenizer

pytestmark = pytest.mark.timeout(300)
COOLDOWN = CONFIG.index('[[stages]]\nname = "cooldown"')
SHORT = CONFIG[:COOLDOWN] + CONFIG[CONFIG.index("[checkpoint]") :]
"""The first two stages alone: 14 steps."""
NEXT = CONFIG.replace('name = "cooldown"\nsteps = 10', 'name = "cooldown"\nsteps = 4\ntake = {{ optimizer = "fresh" }}')
END = "checkpoints/step-000000014"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one model, the second by two tensor ranks and of another seed."""
    folder = tmp_path_factory.mktemp("runs")
    assert train(make_run(folder, "a", SHORT), "--set", "checkpoint.keep_steps=[5, 12]").returncode == 0
    train_ranks(2, make_run(folder, "b", SHORT), "--set", "parallel.tensor=2", "--set", "run.seed=8")
    average(folder / "mean", folder / "a", 0.5, folder / "b", 0.25)
    return folder


def average(output: Path, *words: object) -> None:
    """Members, each followed by its weight or not."""
    argv = ["--output", str(output)]
    for word in words:
        argv += ["--checkpoint" if isinstance(word, Path) else "--weight", str(word)]
    assert run_command(average_checkpoints.main, argv) == 0


def weights(path: Path) -> dict[str, np.ndarray]:
    """Whole tensors, by hand where ranks cut them."""
    manifest = json.loads((path / NAME).read_text())
    files = {name: load_file(path / name) for name in manifest["files"] if name.startswith("model/")}
    found = {}
    for name, entry in manifest["tensors"]["model"].items():
        found[name] = np.zeros(entry["shape"], np.float32)
        for shard in entry["shards"]:
            box = tuple(slice(at, at + n) for at, n in zip(shard["offset"], shard["shape"], strict=True))
            found[name][box] = files[shard["file"]][name]
    return found


def go_on(runs: Path, name: str, start: Path, text: str = NEXT, *words: str) -> Done:
    shutil.rmtree(runs / name, ignore_errors=True)
    return train(make_run(runs, name, text), "--resume-from", str(start), *words)


def test_runs_of_different_layouts_have_numpys_mean(runs: Path) -> None:
    one, other, found = weights(runs / "a" / END), weights(runs / "b" / END), weights(runs / "mean")
    assert found.keys() == one.keys() and len(list((runs / "b" / END / "model").iterdir())) == 2
    for name, value in found.items():
        wanted = (2 * one[name].astype(np.float64) + other[name].astype(np.float64)) / 3
        assert np.array_equal(value, wanted.astype(np.float32))


def test_what_it_prints(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    average(tmp_path / "mean", runs / "a", 0.2, runs / "b", "1/10")
    printed = capsys.readouterr().out
    assert f"2/3 of {runs / 'a' / END} (step 14)" in printed and f"1/3 of {runs / 'b' / END}" in printed
    assert "seed is 8, that of the first 7" in printed and "summed in float64, kept in float32" in printed
    assert run_command(ledger.main, ["show", str(runs / "mean")]) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"after step 14 of stage 'text' the weights became an average: 2/3 of .*/a/.*, 1/3 of .*/b/", shown
    )
    assert run_command(ledger.main, ["diff", str(runs / "a"), str(runs / "mean")]) == 0
    assert "only in B: after step 14" in capsys.readouterr().out.replace("\n", " ")


def test_training_goes_on_as_from_a_checkpoint_made_by_hand(runs: Path) -> None:
    """The reference: the first member's checkpoint, its weights replaced by NumPy, its optimizer state taken out."""
    by_hand = runs / "by-hand" / "step-000000014"
    shutil.rmtree(by_hand.parent, ignore_errors=True)
    shutil.copytree(runs / "a" / END, by_hand)
    shutil.rmtree(by_hand / "optimizer")
    (file,) = (by_hand / "model").iterdir()
    save_file(weights(runs / "mean"), file)
    (by_hand / NAME).unlink()
    (by_hand / NAME).write_bytes(manifest_bytes(build_manifest(by_hand, 14, False)))
    assert go_on(runs, "reference", by_hand).returncode == 0
    done = go_on(runs, "next", runs / "mean")
    assert done.returncode == 0 and "optimizer from fresh" in done.stdout, done.stderr
    assert curve_of(runs / "next") == curve_of(runs / "reference") and len(curve_of(runs / "next")) == 4
    assert validation_of(runs / "next") == validation_of(runs / "reference")
    assert steps_in(runs / "next") == [14, 15, 18], "the average is the run's own from now on, for good"
    # once it has been trained on it is a checkpoint as any other, and its ledger still tells
    last = open_checkpoint(runs / "next" / "checkpoints" / "step-000000018")
    assert "averaged" not in last.state and list(last.optimizer().names())
    assert last.state["data"]["events"][0]["event"] == "averaged"


def test_the_first_loss_is_that_of_the_averaged_weights(runs: Path) -> None:
    assert go_on(runs, "next", runs / "mean").returncode == 0
    state = json.loads((runs / "mean" / "state.json").read_text())
    tokenizer = TokenizerIdentity.of(ByteTokenizer())
    resolved = resolve_run(load_config(runs / "next.toml"), ledger=Ledger.from_json(state["data"]), tokenizer=tokenizer)
    with BatchLoader(resolved.stream(), resolved.sources, 8, 0) as loader:
        (batch,) = next(iter(loader)).microbatches
    decoder = Decoder(ModelShape.from_json(state["model"]))
    decoder.load_state_dict({name: torch.from_numpy(value) for name, value in weights(runs / "mean").items()})
    losses = decoder.loss(batch.tokens, batch.targets, batch.document_ids)
    mean = float(losses.detach().double().sum() / (batch.targets >= 0).sum())
    assert rows_of(runs / "next")[0]["step"] == 15
    assert rows_of(runs / "next")[0]["loss"] == pytest.approx(mean, rel=1e-6)


def test_a_kill_before_the_first_save_goes_on_from_the_copy(runs: Path) -> None:
    assert go_on(runs, "next", runs / "mean").returncode == 0
    whole = curve_of(runs / "next")
    for step in (15, 18):
        shutil.rmtree(runs / "next" / "checkpoints" / f"step-{step:09d}")
    assert train(runs / "next.toml").returncode == 0
    assert curve_of(runs / "next") == whole


def test_a_stage_of_another_run_takes_its_weights(runs: Path) -> None:
    take = f"stages.text.take.weights='{runs / 'mean'}'"
    shutil.rmtree(runs / "other", ignore_errors=True)
    done = train(make_run(runs, "other", SHORT), "--set", take, "--set", "stages.text.lr.peak=0")
    assert done.returncode == 0 and f"weights from {runs / 'mean'}" in done.stdout, done.stderr
    # with a learning rate of 0 they are still there at the end
    found = weights(runs / "other" / END)
    assert all(np.allclose(found[name], value, atol=1e-7) for name, value in weights(runs / "mean").items())


def test_exports_are_proven_and_equal_transformers_mean(runs: Path, tmp_path: Path) -> None:
    models = {}
    for name, path in {"a": runs / "a" / END, "b": runs / "b" / END, "mean": runs / "mean"}.items():
        words = ["--input", str(path), "--output", str(tmp_path / name), "--dtype", "float32"]
        assert run_command(export_hf.main, words) == 0
        models[name] = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
    for name, value in models["mean"].items():
        wanted = (2 * models["a"][name].double() + models["b"][name].double()) / 3
        assert torch.equal(value, wanted.float())
    assert "became an average" in (tmp_path / "mean" / "README.md").read_text()


def test_generation_takes_it(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(runs / "mean"), "--prompt", "abc", "--max-new-tokens", "4", "--temperature", "0"]
    assert run_command(generate.main, words) == 0
    assert "abc" in capsys.readouterr().out


# -- what cannot be carried out ----------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], words: list[str], code: int = 2) -> str:
    assert run_command(average_checkpoints.main, words) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said
    return said


def test_B1_words_that_are_wrong(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, out = str(runs / "a"), str(runs / "b"), ["--output", str(tmp_path / "out")]
    both = ["--checkpoint", a, "--checkpoint", b]
    assert "is alone" in refused(capsys, [*out, "--checkpoint", a])
    assert "stands before any --checkpoint" in refused(capsys, [*out, "--weight", "1", *both])
    assert "two weights, 1 and 2" in refused(capsys, [*out, *both, "--weight", "1", "--weight", "2"])
    for weight in ("0", "-1", "nan", "inf", "x", "1/0", "1e999999999", ""):
        assert f"--weight {weight}" in refused(capsys, [*out, *both, f"--weight={weight}"])
    assert "lies inside --checkpoint" in refused(capsys, ["--output", str(runs / "a" / "mean"), *both])
    assert "exists already" in refused(capsys, ["--output", str(runs / "mean"), *both])
    inside = str(runs / "a" / "checkpoints" / "step-000000014")
    member = ["--checkpoint", inside, "--checkpoint", b]
    assert "step-000000014" in refused(capsys, ["--output", str(tmp_path / "step-000000099"), *member])
    shutil.copytree(runs / "a", tmp_path / "a")
    (tmp_path / "a" / END).rename(tmp_path / "a" / "moved")
    among = refused(capsys, ["--output", str(tmp_path / "a" / END), *member])
    assert "which would take it for its own" in among
    assert "no such checkpoint" in refused(capsys, [*out, *both, "--checkpoint", str(tmp_path / "gone")], 4)
    assert not (tmp_path / "out").exists()


def test_an_older_average_is_replaced_whole(runs: Path, tmp_path: Path) -> None:
    average(tmp_path / "mean", runs / "a", runs / "b")
    words = ["--output", str(tmp_path / "mean"), "--overwrite", "--checkpoint", str(runs / "b"), "--weight", "2"]
    assert run_command(average_checkpoints.main, [*words, "--checkpoint", str(runs / "a")]) == 0
    state = open_checkpoint(tmp_path / "mean").state
    assert state["data"]["seed"] == 8 and [row["share"] for row in state["averaged"]["members"]] == ["2/3", "1/3"]


def test_B1_a_stage_that_would_continue_its_optimizer_is_refused(runs: Path, tmp_path: Path) -> None:
    done = go_on(runs, "bad", runs / "mean", CONFIG)
    assert done.returncode == exit_record(runs / "bad")["code"] == 2
    assert "is an average, which has no optimizer state, and stage 'cooldown', which comes next" in done.stderr
    assert 'set stages.cooldown.take = { optimizer = "fresh" }' in done.stderr
    assert not (runs / "bad" / "checkpoints").exists() or not steps_in(runs / "bad")
    assert steps_in(runs / "a") == [5, 6, 8, 9, 12, 14], "checkpoint.keep_steps stay, 5 and 12, beside keep = 2"
    average(tmp_path / "late", runs / "a" / "checkpoints" / "step-000000012", runs / "a" / END)
    done = go_on(runs, "bad", tmp_path / "late")
    assert done.returncode == 2 and "stage 'text' is at sample 32 of 48" in done.stderr
    # the remedy that it names
    assert go_on(runs, "bad", tmp_path / "late", NEXT, "--set", "stages.text.steps=4").returncode == 0
    take = f"stages.text.take.optimizer='{runs / 'mean'}'"
    done = train(make_run(runs, "worse", SHORT), "--set", take)
    assert done.returncode == 2 and "stage 'text': take.optimizer" in done.stderr
    assert "an average has weights and a data position, no optimizer" in done.stderr
