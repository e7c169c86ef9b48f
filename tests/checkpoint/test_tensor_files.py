"""Safetensors files by our own reading and layout, against the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron.checkpoint.tensor_files import TensorFile, lay_out, raw_bytes
from megatron.checkpoint.tensor_format import DTYPES
from megatron.config.errors import CheckpointError


def tensors_of(seed: int) -> dict[str, Tensor]:
    """One of each dtype, and shapes that are odd, empty or none."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.randint(-100, 100, (5, 7), generator=generator).to(dtype)
        for name, dtype in DTYPES.items()
        if dtype not in (torch.uint8, torch.bool)
    }
    made["scalar"] = torch.tensor(2.5)
    made["empty"] = torch.zeros(0, 3)
    made["flags"] = torch.tensor([True, False, True])
    made["wide"] = torch.randn(3, 70_000, generator=generator)
    made["ünïcode.weight"] = torch.randn(4, generator=generator)
    return made


def test_what_the_library_wrote_is_read(tmp_path: Path) -> None:
    tensors = tensors_of(0)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"} and file.places.keys() == tensors.keys()
    for name, tensor in tensors.items():
        box = torch.empty_like(tensor)
        file.read_into(box, name, (0,) * tensor.ndim)
        assert torch.equal(raw(box), raw(tensor)), name


def test_what_we_lay_out_the_library_reads(tmp_path: Path) -> None:
    tensors = tensors_of(1)
    header, places = lay_out(((name, t.dtype, tuple(t.shape)) for name, t in tensors.items()), {"format": "pt"})
    with open(tmp_path / "x.safetensors", "wb") as out:
        out.write(header)
        for name, tensor in tensors.items():
            out.seek(places[name].begin)
            out.write(raw_bytes(tensor))
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(raw(read[name]), raw(tensor)) for name, tensor in tensors.items())
    assert all(place.begin % place.dtype.itemsize == 0 for place in places.values())


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_box_is_the_slice(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    if data.draw(st.booleans()):
        shape[-1] *= 20_000  # rows long enough to be read one by one
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    path = tmp_path_factory.mktemp("box") / "x.safetensors"
    save_file({"x": whole}, path)
    begin = [data.draw(st.integers(0, size)) for size in shape]
    count = [data.draw(st.integers(0, size - at)) for size, at in zip(shape, begin, strict=True)]
    wanted = whole[tuple(slice(a, a + n) for a, n in zip(begin, count, strict=True))]
    for box in (torch.empty(count), torch.empty([n + 1 for n in count])[tuple(slice(1, None) for _ in count)]):
        TensorFile(path).read_into(box, "x", begin)
        assert torch.equal(box, wanted)


def test_a_box_beyond_the_tensor_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3, 4)}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    for box, offset in ((torch.empty(2, 4), (2, 0)), (torch.empty(1, 1), (-1, 0)), (torch.empty(3), (0,))):
        with pytest.raises(ValueError, match="no box"):
            file.read_into(box, "x", offset)
    with pytest.raises(ValueError, match="float64"):
        file.read_into(torch.empty(1, 1, dtype=torch.float64), "x", (0, 0))
    with pytest.raises(KeyError):
        file.read_into(torch.empty(1), "y", (0,))


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(1000)}, path)
    file = TensorFile(path)
    with open(path, "r+b") as cut:
        cut.truncate(2000)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: ends at byte 2000"):
        file.read_into(torch.empty(1000), "x", (0,))


def entry(**over: object) -> dict[str, object]:
    """One float32 tensor of four elements, or what is said otherwise."""
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **over}


BAD = {
    "empty": b"",
    "no header": b"\x10\0\0\0\0\0\0\0{",
    "huge header": b"\xff" * 8 + b"{}",
    "not JSON": b"\x02\0\0\0\0\0\0\0[}",
    "a list": b"\x02\0\0\0\0\0\0\0[]",
    "short": {"x": entry(data_offsets=[0, 16])},
    "sizes": {"x": entry(data_offsets=[0, 12])},
    "negative": {"x": entry(data_offsets=[-16, 0])},
    "negative shape": {"x": entry(shape=[-4])},
    "dtype": {"x": entry(dtype="PICKLE")},
    "words": {"x": entry(shape="four")},
    "no offsets": {"x": {"dtype": "F32", "shape": [4]}},
}


@pytest.mark.parametrize("name", BAD)
def test_no_safetensors_file(name: str, tmp_path: Path) -> None:
    content = BAD[name]
    if isinstance(content, dict):
        words = json.dumps(content).encode()
        content = len(words).to_bytes(8, "little") + words + b"\0" * 12
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a whole safetensors file"):
        TensorFile(tmp_path / "x.safetensors")


def raw(tensor: Tensor) -> Tensor:
    """Its bytes: some dtypes cannot be compared."""
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1).float()
