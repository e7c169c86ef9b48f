"""This rank's part of a model: which layers, which slices, built without memory and filled by global name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from megatron.config.kernel_checks import splits_backward
from megatron.config.model_shape import ModelShape
from megatron.config.partition import partition_layers, stage_count, stage_numbers
from megatron.config.schema import ParallelSection
from megatron.kernels.choice import Kernels
from megatron.models.decoder import Decoder
from megatron.models.initialise import initial_value
from megatron.parallel.mesh import Mesh
from megatron.parallel.model_place import ModelPlace
from megatron.parallel.pipeline import Pipeline, StageShape


@dataclass(frozen=True)
class ModelParts:
    """The pipeline stages held here, ascending: their modules and numbers. layers, owners: of every stage, its layers
    and its pipeline rank."""

    modules: tuple[Decoder, ...]
    numbers: tuple[int, ...]
    layers: tuple[range, ...]
    owners: tuple[int, ...]


def build_parts(
    shape: ModelShape,
    section: ParallelSection,
    mesh: Mesh,
    kernels: Kernels,
    dtype: torch.dtype,
    seed: int,
    objective: Mapping[str, float] = MappingProxyType({}),
) -> ModelParts:
    """Modules on the meta device, in the master weights' dtype. objective: see `Decoder`."""
    count = stage_count(section)
    layers = partition_layers(shape, count, shape.max_position_embeddings)
    owners = [0] * count
    for rank in range(section.pipeline):
        for number in stage_numbers(section, rank):
            owners[number] = rank
    numbers = stage_numbers(section, mesh.pipeline.rank)
    modules = []
    with torch.device("meta"):
        for number in numbers:
            place = ModelPlace(
                tensor=mesh.tensor,
                sequence=section.sequence,
                context=mesh.context,
                context_method=section.context_method,
                layers=layers[number],
                first=number == 0,
                last=number == count - 1,
                split_backward=splits_backward(section),
            )
            modules.append(Decoder(shape, kernels, place, seed).to(dtype))
            modules[-1].objective = dict(objective)
    return ModelParts(tuple(modules), tuple(numbers), layers, tuple(owners))


def build_pipeline(
    parts: ModelParts, modules: Sequence[nn.Module], section: ParallelSection, mesh: Mesh, dtype: torch.dtype
) -> Pipeline | None:
    """The pipeline over what runs of the parts (wrapped, or copies that compute in dtype); None without one."""
    if section.pipeline == 1:
        return None
    sharing = section.context * (section.tensor if section.sequence else 1)
    travelling = StageShape(parts.modules[0].shape.hidden_size, dtype, sharing)
    return Pipeline(modules, parts.numbers, parts.owners, mesh.pipeline, section.schedule, travelling, mesh.device)


def whole_parameters(shape: ModelShape) -> dict[str, Tensor]:
    """Every parameter of the whole model by name, without memory."""
    with torch.device("meta"):
        return {name: parameter.detach() for name, parameter in Decoder(shape).named_parameters()}


class InitialWeights:
    """The weights of step 0 as a TensorSource: whole tensors, drawn by name, the same for every layout."""

    def __init__(self, shape: ModelShape, seed: int) -> None:
        with torch.device("meta"):
            self._model = Decoder(shape)  # says what each name means
        self._shapes = {name: tuple(p.shape) for name, p in self._model.named_parameters()}
        self._seed = seed

    def names(self) -> Iterable[str]:
        """Every parameter of the whole model."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Values are drawn in float32, whatever they are kept in."""
        return torch.float32

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A box of the whole tensor, which is drawn for it."""
        box = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        return initial_value(self._model, name, self._seed)[box]
