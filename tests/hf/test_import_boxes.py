"""Of a Hugging Face folder a rank reads the boxes that it holds, and nothing else; its peak is the largest of them."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hf.family_cases import CASES, WORDS, made, ours_by_hand
from ranks import run_ranks

import megatron.hf.import_weights as importing
from megatron.checkpoint.stored_tensors import StoredTensors
from megatron.config.layout import resolve_layout
from megatron.config.model_shape import ModelShape
from megatron.config.schema import OptimizerSection, ParallelSection, TrainSection
from megatron.engines.build import build_engine
from megatron.hf.architecture import shape_from_folder
from megatron.hf.import_weights import HuggingFaceTensors
from megatron.parallel.mesh import launched, open_mesh

FAMILIES = ("llama", "llama 3", "gpt_neox", "gpt2 untied", "phi3", "qwen3 tied, biased")
"""Every layout of the name tables, tied and untied."""


class Counted(StoredTensors):
    """Stored tensors that note the bytes of each box read of them."""

    boxes: list[int] = []

    def read_into(self, box: torch.Tensor, name: str, offset: Any) -> None:
        super().read_into(box, name, offset)
        Counted.boxes.append(box.nbytes)


class Asked:
    """The source, and which boxes were asked for."""

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        source = HuggingFaceTensors(folder, shape)
        self.boxes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        self.names, self.shape, self.dtype, self._read = source.names, source.shape, source.dtype, source.read

    def read(self, name: str, offset: Any, shape: Any) -> torch.Tensor:
        self.boxes.append((name, tuple(offset), tuple(shape)))
        return self._read(name, offset, shape)


def load_here(world_size: int, parallel: dict[str, Any], folders: dict[str, Path]) -> dict[str, Any]:
    """Of each folder what this rank holds then, as (offset, tensor) by name; the boxes that it asked for; bytes of each
    box that was read of a file."""
    importing.StoredTensors = Counted  # type: ignore[misc]
    section = ParallelSection(**parallel)
    mesh = open_mesh(resolve_layout(section, world_size), launched(), 60)
    loaded = {}
    for name, folder in folders.items():
        shape = shape_from_folder(folder)
        train = TrainSection(global_batch_size=8, micro_batch_size=2)
        engine = build_engine(shape, OptimizerSection(), section, train, 5, "fp32", mesh)
        Counted.boxes = []
        source = Asked(folder, shape)
        assert not Counted.boxes, "headers say enough to check a folder"
        engine.load_model_state(source)
        held = {key: [(s.offset, s.tensor.clone()) for s in shards] for key, shards in engine.model_state().items()}
        loaded[name] = (held, source.boxes, Counted.boxes)
    return loaded


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """By family a folder of several files, and our tensors of it."""
    found = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp("model")
        found[name] = (folder, ours_by_hand(made(CASES[name], folder, "20KB")))
        assert len(list(folder.glob("*.safetensors"))) > 2
    return found


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(2, {"tensor": 2}), (2, {"data_shard": "full"}), (4, {"tensor": 2, "data_shard": "full"})],
    ids=str,
)
def test_T1_ranks_read_exactly_the_slices_that_they_hold(
    world_size: int, parallel: dict[str, Any], models: dict[str, tuple[Path, dict[str, torch.Tensor]]]
) -> None:
    folders = {name: folder for name, (folder, _) in models.items()}
    by_rank = run_ranks(world_size, load_here, world_size, parallel, folders)
    for name, (_, whole) in models.items():
        left = {key: tensor.numel() for key, tensor in whole.items()}
        for held, boxes, read in (loaded[name] for loaded in by_rank):
            for key, shards in held.items():
                for offset, tensor in shards:
                    box = tuple(slice(begin, begin + size) for begin, size in zip(offset, tensor.shape, strict=True))
                    assert torch.equal(tensor, whole[key][box]), (name, key, offset)
                    left[key] -= tensor.numel()
            stored = [4 * prod(_stored(*asked)) for asked in boxes]
            assert sum(read) == sum(stored) and max(read) <= max(stored)
            largest = max(tensor.nbytes for tensor in whole.values())
            assert max(4 * prod(size) for _, _, size in boxes) <= largest // 2
        assert not any(left.values()), "together the ranks hold everything once"


def _stored(name: str, begin: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, ...]:
    """What a box has on the disk: the vocabulary's padding is nowhere."""
    if name not in ("embedding.weight", "head.weight"):
        return size
    return (max(0, min(begin[0] + size[0], WORDS) - begin[0]), *size[1:])


def test_B1_beyond_the_tensor_is_an_error(models: dict[str, tuple[Path, dict[str, torch.Tensor]]]) -> None:
    folder, _ = models["gpt2 untied"]
    shape = shape_from_folder(folder)
    source = HuggingFaceTensors(folder, shape)
    for offset, size in (((shape.padded_vocab_size, 0), (1, 1)), ((0, -1), (1, 1)), ((0, 0), (-1, 1)), ((0,), (1,))):
        with pytest.raises(ValueError):
            source.read("embedding.weight", offset, size)
    with pytest.raises(KeyError):
        source.read("lm_head.weight", (0, 0), (1, 1))
