"""Weights of any origin as a checkpoint of step 0: whole or absent, every value as it was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron.checkpoint import weights_alone
from megatron.checkpoint.aside import aside_of
from megatron.checkpoint.imported import write_imported
from megatron.checkpoint.manager import open_checkpoint
from megatron.checkpoint.manifest import verify
from megatron.checkpoint.tensor_shards import WholeTensors
from megatron.config.errors import CheckpointError

TENSORS = {
    "large": torch.randn(5000, 1100),
    "narrow": torch.randn(7).bfloat16(),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "cube": torch.randn(3, 4, 5).double(),
}


class Counted(WholeTensors):
    """Notes the largest box that is asked for."""

    largest = 0

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        box = super().read(name, offset, shape)
        Counted.largest = max(Counted.largest, box.numel() * box.element_size())
        return box


def write(output: Path, tensors: dict[str, Tensor] = TENSORS, **more: object) -> Path:
    return write_imported(output, WholeTensors(tensors), {}, [], "# config\n", {"kind": "made"}, **more)  # type: ignore[arg-type]


def test_every_value_a_few_megabytes_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_alone, "FILE_BYTES", 1000)
    told: list[tuple[int, int]] = []
    source = Counted(TENSORS)
    write_imported(
        tmp_path / "out", source, {}, [], "", lambda: {"kind": "asked"}, progress=lambda *words: told.append(words)
    )
    assert Counted.largest <= 8 * 2**20 < TENSORS["large"].numel() * 4
    found = open_checkpoint(tmp_path / "out")
    assert found.step == 0 and found.state["imported"] == {"kind": "asked"}
    assert list(found.optimizer().names()) == [] and found.rng() == {}
    read = found.model().all()
    assert read.keys() == TENSORS.keys() and all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    files = sorted((tmp_path / "out" / "model").iterdir())
    assert len(files) > 2 and {name for file in files for name in load_file(file)} == set(TENSORS)
    whole = sum(tensor.numel() * tensor.element_size() for tensor in TENSORS.values())
    assert told[-1] == (whole, whole) and [done for done, _ in told] == sorted(done for done, _ in told)


def test_dtype(tmp_path: Path) -> None:
    read = open_checkpoint(write(tmp_path / "out", dtype=torch.bfloat16)).model().all()
    assert all(torch.equal(read[name], tensor.bfloat16()) for name, tensor in TENSORS.items())
    with pytest.raises(CheckpointError, match="tensor x holds 70000, which float16 cannot say"):
        write(tmp_path / "other", {"x": torch.tensor([1.0, 70_000.0])}, dtype=torch.float16)
    with pytest.raises(CheckpointError, match="tensor x holds NaN"):
        write(tmp_path / "other", {"x": torch.tensor([1.0, float("nan")])})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Failing(WholeTensors):
        def names(self) -> Iterable[str]:
            return [*super().names(), "missing"]

        def shape(self, name: str) -> tuple[int, ...]:
            return (4,) if name == "missing" else super().shape(name)

        def dtype(self, name: str) -> torch.dtype:
            return torch.float32 if name == "missing" else super().dtype(name)

    with pytest.raises(KeyError):
        write_imported(tmp_path / "out", Failing(TENSORS), {}, [], "", {})
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_import_left_is_swept_and_an_older_one_replaced_whole(tmp_path: Path) -> None:
    aside = aside_of(tmp_path / "out")
    (aside / "model").mkdir(parents=True)
    (aside / "model" / "half.safetensors").write_bytes(b"half")
    write(tmp_path / "out")
    other = {"x": torch.ones(2)}
    write(tmp_path / "out", other, overwrite=True)
    assert set(verify(tmp_path / "out")["tensors"]["model"]) == {"x"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out" / "state.json").read_text())["step"] == 0
