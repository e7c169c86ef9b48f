"""Averages of checkpoints against NumPy and rational arithmetic over the files themselves, and what has no average."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks  # noqa: F401 (its import tells the fork server what to load)
import torch
from checkpoint.made_members import SHAPES, cut_member, imported, member, shape_json, tensors_of
from safetensors.numpy import load_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from megatron.checkpoint import storage, weights_alone
from megatron.checkpoint.averaged_members import open_members
from megatron.checkpoint.averaging import whole_weights, write_average
from megatron.checkpoint.manager import CheckpointManager, open_checkpoint
from megatron.checkpoint.manifest import verify
from megatron.checkpoint.stored_tensors import StoredTensors
from megatron.config.errors import CheckpointError, ConfigError, StagemixError, StorageError
from megatron.data.ledger import Ledger
from megatron.data.ledger_events import event_words

Weight = Fraction | int
_forked = multiprocessing.get_context("forkserver")


def average(output: Path, paths: Sequence[Path], weights: Sequence[Weight] = ()) -> Path:
    whole = whole_weights(list(weights) or [1] * len(paths))
    return write_average(output, open_members(paths, whole, print))


def values(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The model's tensors of a checkpoint whose tensors are whole, read from its files alone."""
    return {name: value for file in (path / "model").iterdir() for name, value in load_file(file).items()}


def exact(members: Sequence[np.ndarray[Any, Any]], weights: Sequence[Weight]) -> np.ndarray[Any, Any]:
    """The mean in rational numbers, rounded once to float64."""
    total = sum(map(Fraction, weights))
    rows = zip(*(value.astype(np.float64).ravel().tolist() for value in members), strict=True)
    means = [float(sum(Fraction(w) * Fraction(x) for w, x in zip(weights, row, strict=True)) / total) for row in rows]
    return np.array(means, np.float64).reshape(members[0].shape)


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [member(tmp_path / f"run{n}" / "checkpoints", tensors_of(n), step=10 * n, seed=n) for n in (1, 2, 3)]


@pytest.mark.parametrize("weights", [(1, 1, 1), (3, 2, 1), (Fraction("0.1"), Fraction("0.7"), Fraction("1e-9"))])
def test_values_are_the_exact_mean(tmp_path: Path, three: list[Path], weights: Sequence[Weight]) -> None:
    found = values(average(tmp_path / "mean", three, weights))
    read = [values(path) for path in three]
    assert found.keys() == SHAPES.keys()
    for name, value in found.items():
        wanted = exact([one[name] for one in read], weights)
        assert value.dtype == np.float32 and value.shape == SHAPES[name]
        # float64 sums of three: rounding them to float32 can only differ where a mean lies between two by 2^-27 of it
        assert np.array_equal(value, wanted.astype(np.float32))
    if set(weights) == {1}:
        numpy = {name: np.mean([one[name] for one in read], axis=0, dtype=np.float64) for name in SHAPES}
        assert all(np.allclose(found[name], numpy[name], rtol=2e-7, atol=0) for name in SHAPES)


def test_it_equals_torchs_averaged_model(tmp_path: Path, three: list[Path]) -> None:
    class Holder(torch.nn.Module):
        def __init__(self, tensors: dict[str, Tensor]) -> None:
            super().__init__()
            self.all = torch.nn.ParameterList([tensors[name] for name in sorted(tensors)])

    averaged = AveragedModel(Holder(tensors_of(1)))
    for seed in (1, 2, 3):
        averaged.update_parameters(Holder(tensors_of(seed)))
    found = open_checkpoint(average(tmp_path / "mean", three)).model().all()
    for name, parameter in zip(sorted(found), averaged.module.all, strict=True):
        # it keeps a running mean in float32
        torch.testing.assert_close(found[name], parameter.data, rtol=1e-5, atol=1e-4)


def test_bits_follow_from_values_and_weights_alone(tmp_path: Path) -> None:
    """Not from the order of the members, nor from files that ranks cut; seven members, so that sums round."""
    paths = [member(tmp_path / f"r{n}", tensors_of(n), seed=n) for n in range(7)]
    weights = [1, 2, 3, 1, 2, 3, 5]
    first = values(average(tmp_path / "mean", paths, weights))
    for number, order in enumerate([(6, 5, 4, 3, 2, 1, 0), (3, 0, 6, 2, 5, 1, 4)]):
        again = average(tmp_path / f"again{number}", [paths[n] for n in order], [weights[n] * 10 for n in order])
        assert all(np.array_equal(value, first[name]) for name, value in values(again).items())
    for n, parts in ((0, 2), (3, 5), (6, 4)):
        cut_member(paths[n], parts)
    again = average(tmp_path / "cut", paths, weights)
    assert all(np.array_equal(value, first[name]) for name, value in values(again).items())


def test_whole_weights_are_exact() -> None:
    assert whole_weights([Fraction("0.2"), Fraction("0.1")]) == (2, 1)
    assert whole_weights([6, 4, 2]) == (3, 2, 1)
    assert whole_weights([Fraction(1, 3), Fraction(1, 6), Fraction("0.5")]) == (2, 1, 3)
    assert whole_weights([Fraction("1e-30"), Fraction("1e30")]) == (1, 10**60)


def test_weights_far_apart_and_wide_masters(tmp_path: Path) -> None:
    one = member(tmp_path / "a", tensors_of(1, torch.float64), seed=1, precision={"name": "fp64"})
    other = member(tmp_path / "b", tensors_of(2, torch.float64), seed=2, precision={"name": "fp64"})
    weights = (Fraction("1e-30"), Fraction("1e30"))
    found = values(average(tmp_path / "mean", [one, other], weights))
    assert all(
        value.dtype == np.float64 and np.allclose(value, values(other)[name], rtol=1e-15)
        for name, value in found.items()
    )
    with pytest.raises(ConfigError, match=r"master weights are float32, those of .* float64"):
        open_members([one, member(tmp_path / "c", tensors_of(3))], (1, 1), print)


def test_it_is_a_whole_checkpoint_with_the_position_of_the_first(tmp_path: Path, three: list[Path]) -> None:
    path = average(tmp_path / "mean", [three[1], three[0]], [2, 1])
    found, first = open_checkpoint(path), open_checkpoint(three[1])
    assert found.step == 20 and found.state["data"]["seed"] == 2 and found.state["run_id"] == "run-2"
    assert found.state["skipped_in_row"] == 0
    assert list(found.optimizer().names()) == [] and torch.equal(found.rng()["cpu"], first.rng()["cpu"])
    assert (path / "config.toml").read_bytes() == (three[1] / "config.toml").read_bytes()
    rows = found.state["averaged"]["members"]
    assert [(row["path"], row["step"], row["share"], row["weight"]) for row in rows] == [
        (str(three[1]), 20, "2/3", "2"),
        (str(three[0]), 10, "1/3", "1"),
    ]
    assert [row["manifest"] for row in rows] == [
        json.loads((one / "manifest.json").read_text())["manifest_sha256"] for one in (three[1], three[0])
    ]
    (event,) = Ledger.from_json(found.state["data"]).events
    assert f"2/3 of {three[1]} (step 20), 1/3 of {three[0]} (step 10)" in event_words(event)
    # a run may take it for its own, with everything in it
    adopted = CheckpointManager(tmp_path / "run" / "checkpoints").adopt(found)
    assert open_checkpoint(adopted).state == found.state
    # and averages have averages
    again = open_checkpoint(average(tmp_path / "again", [path, three[2]]))
    assert len(again.state["data"]["events"]) == 2 and again.state["averaged"]["members"][0]["path"] == str(path)


def test_memory_is_a_few_megabytes_a_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest, read = [0], StoredTensors.read

    def counted(self: StoredTensors, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        box = read(self, name, offset, shape)
        largest[0] = max(largest[0], box.numel() * box.element_size())
        return box

    tensors = [{"large": torch.randn(3000, 1100), "small": torch.randn(3)} for _ in range(2)]
    paths = [member(tmp_path / f"r{n}", one) for n, one in enumerate(tensors)]
    monkeypatch.setattr(StoredTensors, "read", counted)
    found = average(tmp_path / "mean", paths)
    assert 0 < largest[0] <= 8 * 2**20 < 3000 * 1100 * 4
    assert torch.equal(open_checkpoint(found).model().whole("large"), (tensors[0]["large"] + tensors[1]["large"]) / 2)


# -- imported models ---------------------------------------------------------------------------------------------------


def test_imported_models_may_follow_a_run_and_have_averages_of_their_own(tmp_path: Path) -> None:
    run = member(tmp_path / "run", tensors_of(1))
    wide, narrow = (
        imported(tmp_path / "wide", tensors_of(2)),
        imported(tmp_path / "narrow", tensors_of(3, torch.bfloat16), shape_json(document_mask=False)),
    )
    members = open_members([run, narrow], (1, 1), print)
    notes = "; ".join(members.notes)
    assert "is an imported model" in notes and "document_mask is False" in notes and "narrow (bfloat16)" in notes
    found = open_checkpoint(write_average(tmp_path / "mixed", members))
    assert found.state["data"]["seed"] == 1 and "imported" not in found.state
    wanted = (tensors_of(1)["layers.0.weight"] + tensors_of(3, torch.bfloat16)["layers.0.weight"].float()) / 2
    assert torch.equal(found.model().whole("layers.0.weight"), wanted)
    with pytest.raises(ConfigError, match="no data position.*name a run's checkpoint first"):
        open_members([wide, run], (1, 1), print)
    alone = open_checkpoint(average(tmp_path / "alone", [narrow, wide]))
    assert alone.step == 0 and alone.state["imported"]["folder"] == "the average of narrow, wide"
    assert "files" not in alone.state["imported"] and alone.rng() == {}
    assert alone.model().dtype("scale") == torch.float32


# -- what has no mean --------------------------------------------------------------------------------------------------

_FEWER = {name: tensor for name, tensor in tensors_of(2).items() if name != "scale"}
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"model": shape_json(hidden_size=32)}, "hidden_size is 32, not 16"),
    "tied": ({"model": shape_json(tie_word_embeddings=True)}, "tie_word_embeddings is True, not False"),
    "vocabulary": ({"model": shape_json(vocab_size=300)}, "vocab_size is 300, not 257"),
    "tokenizer": ({"tokenizer": {"name": "bpe", "fingerprint": "other"}}, "its tokenizer is bpe other, not bytes"),
    "held out": ({"validation": "fraction 0"}, "its held-out documents are fraction 0, not fraction 0.1"),
    "names": ({"tensors": _FEWER}, "has no tensor scale"),
    "sizes": ({"tensors": tensors_of(2) | {"layers.0.norm": torch.ones(7)}}, r"norm has the shape \[7\], not \[6\]"),
    "dtype": ({"tensors": tensors_of(2, torch.bfloat16)}, "holds weights in torch.bfloat16"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_B1_what_has_no_mean_is_named(tmp_path: Path, name: str) -> None:
    over, words = MISFITS[name]
    first = member(tmp_path / "a", tensors_of(1))
    other = member(
        tmp_path / "b", over.get("tensors", tensors_of(2)), **{k: v for k, v in over.items() if k != "tensors"}
    )
    with pytest.raises(ConfigError, match=words) as error:
        open_members([first, other], (1, 1), print)
    assert str(other) in str(error.value)


def test_learned_positions_of_other_lengths_are_refused_and_rotary_ones_noted(tmp_path: Path) -> None:
    for kind in ("rope", "learned"):
        short, long = (shape_json(position_embedding=kind, max_position_embeddings=n) for n in (16, 32))
        paths = [
            member(tmp_path / kind / "a", tensors_of(1), model=short),
            member(tmp_path / kind / "b", tensors_of(2), model=long),
        ]
        if kind == "learned":
            with pytest.raises(ConfigError, match="max_position_embeddings is 32, not 16"):
                open_members(paths, (1, 1), print)
        else:
            assert "max_position_embeddings is 32" in "; ".join(open_members(paths, (1, 1), print).notes)


def test_other_seeds_versions_and_precisions_are_noted(tmp_path: Path) -> None:
    first = member(tmp_path / "a", tensors_of(1))
    other = member(tmp_path / "b", tensors_of(2), seed=5, algorithm=7, precision={"name": "bf16"})
    notes = "; ".join(open_members([first, other], (1, 1), print).notes)
    assert (
        "seed is 5, that of the first 1" in notes and "algorithm version is 7" in notes and "precision is bf16" in notes
    )


def test_B1_checkpoints_that_are_not_there_damaged_or_twice(tmp_path: Path, three: list[Path]) -> None:
    def refused(paths: Sequence[Path], words: str, kind: type[StagemixError] = CheckpointError) -> None:
        with pytest.raises(kind, match=words):
            average(tmp_path / "mean", paths)
        assert not (tmp_path / "mean").exists()

    refused([three[0], three[0].with_name("step-000000099")], "no such checkpoint folder; .* has step-000000010")
    refused([three[0], three[0].parent / "." / three[0].name], "is named twice: name it once", ConfigError)
    copy = tmp_path / "copy"
    shutil.copytree(three[0], copy)
    refused([three[0], copy], "is a copy of", ConfigError)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    refused([three[0], tmp_path / "hf"], "Hugging Face folder.*import_hf", ConfigError)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    refused([three[0], tmp_path / "empty"], "holds no checkpoint yet")
    nan = member(tmp_path / "nan", tensors_of(4) | {"layers.0.norm": torch.tensor([1, 2, float("nan"), 4, 5, 6])})
    refused([three[0], nan], "tensor layers.0.norm holds NaN or infinity: leave this checkpoint out")
    (file,) = (three[1] / "model").iterdir()
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    refused(three, "expected sha256")
    assert not list(tmp_path.glob(".mean*")), "nothing is left"


# -- whole or absent ---------------------------------------------------------------------------------------------------


def _average_and_be_killed(number: int, output: Path, paths: Sequence[Path]) -> None:
    """Averages in a process of its own that kills itself before its `number`-th write, fsync or rename."""
    left = number

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*words, **more)

        return call

    storage._write = counted(storage._write)
    os.fsync, os.rename = counted(os.fsync), counted(os.rename)
    average(output, paths)


def test_C1_a_kill_at_any_write_leaves_nothing_that_looks_whole(tmp_path: Path, three: list[Path]) -> None:
    """Killed before every other write, fsync and rename; each time made again over what the last one left."""
    output = tmp_path / "node" / "checkpoints" / "step-000000010"
    manager = CheckpointManager(output.parent)
    for number in itertools.count(1, 2):
        process = _forked.Process(target=_average_and_be_killed, args=(number, output, three))
        process.start()
        process.join(60)
        if output.exists():
            break
        assert process.exitcode == -signal.SIGKILL
        assert manager.steps() == [] and manager.newest_whole(print) is None
    assert number > 10
    verify(output)
    shutil.rmtree(output)
    average(output, three)
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert np.array_equal(values(output)["scale"], values(average(tmp_path / "mean", three))["scale"])


def test_a_full_disk_is_seen_before_and_while_writing(
    tmp_path: Path, three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    members = open_members(three, (1, 1, 1), print)
    disk = type("Disk", (), {"free": 1000, "total": 2000})
    with monkeypatch.context() as patch:
        patch.setattr("megatron.checkpoint.room.shutil.disk_usage", lambda path: disk)
        with pytest.raises(StorageError, match="the average needs"):
            write_average(tmp_path / "mean", members)

    def full(*words: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("megatron.checkpoint.storage._write", full)
        with pytest.raises(StorageError, match="No space left"):
            write_average(tmp_path / "mean", members)
    assert not list(tmp_path.glob("*mean*"))


def test_many_small_files_are_as_one(tmp_path: Path, three: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_alone, "FILE_BYTES", 100)
    found = average(tmp_path / "mean", three)
    assert len(list((found / "model").iterdir())) > 2
    monkeypatch.undo()
    whole = values(average(tmp_path / "other", three))
    assert all(np.array_equal(value, whole[name]) for name, value in values(found).items())
