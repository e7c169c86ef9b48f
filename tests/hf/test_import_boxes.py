"""Of a Hugging Face folder a rank reads the boxes that it holds, and nothing else; its peak is the largest of them."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from engines.made_rows import engine_here
from hf.made_checkpoint import LLAMA, NEOX
from hf.made_folder import WORDS, made_by_transformers, ours_in, shape_of
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from safetensors import safe_open

import megatron.checkpoint.stored_tensors as reading
import megatron.hf.import_weights as importing
from megatron.config.model_shape import ModelShape
from megatron.hf.import_weights import HuggingFaceTensors

FAMILIES = {"llama": LLAMA, "tied": LLAMA | {"tie_word_embeddings": True, "attention_bias": True}, "neox": NEOX}


class CountedFile:
    """A safetensors file that gives slices only, and notes the bytes of each."""

    read: list[int] = []

    def __init__(self, path: str | Path, framework: str) -> None:
        self._file = safe_open(path, framework=framework)

    def __enter__(self) -> CountedFile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def get_slice(self, name: str) -> Any:
        found = self._file.get_slice(name)

        class Slice:
            get_shape, get_dtype = found.get_shape, found.get_dtype

            def __getitem__(self, box: Any) -> torch.Tensor:
                tensor: torch.Tensor = found[box]
                CountedFile.read.append(tensor.nbytes)
                return tensor

        return Slice()


class Asked:
    """The source, and which boxes were asked for."""

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        source = HuggingFaceTensors(folder, shape)
        self.boxes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        self.names, self.shape, self.dtype, self._read = source.names, source.shape, source.dtype, source.read

    def read(self, name: str, offset: Any, shape: Any) -> torch.Tensor:
        self.boxes.append((name, tuple(offset), tuple(shape)))
        return self._read(name, offset, shape)


def load_here(world_size: int, parallel: dict[str, Any], folder: Path, shape: ModelShape) -> Any:
    """What this rank holds then, as (offset, tensor) by name; the boxes that it asked for; bytes of each slice read."""
    reading.safe_open = importing.safe_open = CountedFile  # type: ignore[misc, assignment]
    engine, _ = engine_here(world_size, parallel, {}, "fp32", shape)
    source = Asked(folder, shape)
    assert not CountedFile.read, "headers say enough to check a folder"
    engine.load_model_state(source)
    held = {name: [(s.offset, s.tensor.clone()) for s in shards] for name, shards in engine.model_state().items()}
    return held, source.boxes, CountedFile.read


@pytest.mark.parametrize(
    ("family", "world_size", "parallel"),
    [
        ("llama", 2, {"tensor": 2}),
        ("llama", 2, {"data_shard": "full"}),
        ("neox", 2, {"tensor": 2}),
        ("neox", 4, {"tensor": 2, "data_shard": "full"}),
    ],
    ids=str,
)
def test_T1_ranks_read_exactly_the_slices_that_they_hold(
    family: str, world_size: int, parallel: dict[str, Any], tmp_path: Path
) -> None:
    shape = shape_of(FAMILIES[family])
    folder = made_by_transformers(shape, tmp_path / "model", "20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    whole = ours_in(folder, shape)
    left = {name: tensor.numel() for name, tensor in whole.items()}
    for held, boxes, read in run_ranks(world_size, load_here, world_size, parallel, folder, shape):
        for name, shards in held.items():
            for offset, tensor in shards:
                box = tuple(slice(begin, begin + size) for begin, size in zip(offset, tensor.shape, strict=True))
                assert torch.equal(tensor, whole[name][box]), (name, offset)
                left[name] -= tensor.numel()
        stored = [
            4 * prod((max(0, min(begin[0] + size[0], WORDS) - begin[0]), *size[1:]))
            if name in ("embedding.weight", "head.weight")
            else 4 * prod(size)
            for name, begin, size in boxes
        ]
        assert sum(read) == sum(stored) and max(read) <= max(stored)
        largest = max(tensor.nbytes for tensor in whole.values())
        assert max(4 * prod(size) for _, _, size in boxes) <= largest // 2
    assert not any(left.values()), "together the ranks hold everything once"


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelShape]:
    shape = shape_of(FAMILIES[request.param])
    return made_by_transformers(shape, tmp_path_factory.mktemp(request.param) / "model"), shape


@given(data=st.data())
def test_T1_any_box_is_that_slice_of_the_whole(made: tuple[Path, ModelShape], data: st.DataObject) -> None:
    folder, shape = made
    source, whole = HuggingFaceTensors(folder, shape), ours_in(folder, shape)
    assert set(source.names()) == whole.keys()
    name = data.draw(st.sampled_from(sorted(whole)))
    assert (source.shape(name), source.dtype(name)) == (tuple(whole[name].shape), whole[name].dtype)
    ends = [sorted(data.draw(st.tuples(*2 * [st.integers(0, size)]))) for size in source.shape(name)]
    box = source.read(name, [begin for begin, _ in ends], [end - begin for begin, end in ends])
    assert torch.equal(box, whole[name][tuple(slice(*pair) for pair in ends)])
    assert box.untyped_storage().nbytes() == box.nbytes, "a copy of its own, of that size"
    box.fill_(7)
    assert torch.equal(source.whole(name), whole[name])


def test_B1_beyond_the_tensor_is_an_error(made: tuple[Path, ModelShape]) -> None:
    folder, shape = made
    source = HuggingFaceTensors(folder, shape)
    for offset, size in (((shape.padded_vocab_size, 0), (1, 1)), ((0, -1), (1, 1)), ((0, 0), (-1, 1)), ((0,), (1,))):
        with pytest.raises(ValueError):
            source.read("embedding.weight", offset, size)
    with pytest.raises(KeyError):
        source.read("lm_head.weight", (0, 0), (1, 1))
