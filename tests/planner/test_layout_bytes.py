"""The planner's tensors against the modules of every rank, for each kind of layer that a shape can ask for."""

from __future__ import annotations

import pytest
import torch
from models.tensor_cases import SHAPES

from megatron.config.partition import stage_parameters
from megatron.models.decoder import Decoder
from megatron.parallel.axis import Axis
from megatron.parallel.model_place import ModelPlace
from megatron.planner.layout_bytes import stage_tensors


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_of_a_stage_are_those_of_its_module(shape: str, tensor: int) -> None:
    for layers, first, last in ((range(2), True, True), (range(1), True, False), (range(1, 2), False, True)):
        place = ModelPlace(Axis(0, tensor), layers=layers, first=first, last=last)
        with torch.device("meta"):
            module = Decoder(SHAPES[shape], place=place)
        planned = {item.name: item for item in stage_tensors(SHAPES[shape], tensor, layers, first, last)}
        held = dict(module.named_parameters())
        assert list(planned) == list(held)
        for name, parameter in held.items():
            item = planned[name]
            assert (item.rows, item.rows * item.width) == (parameter.shape[0], parameter.numel()), name
            assert item.matrix == (parameter.ndim == 2 and name.startswith("layers.")), name


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_counted_as_modules_hold_them(shape: str) -> None:
    partition = (range(1), range(1, 2))
    with torch.device("meta"):
        whole = Decoder(SHAPES[shape])
        ends = [
            Decoder(SHAPES[shape], place=ModelPlace(layers=layers, first=number == 0, last=number == 1))
            for number, layers in enumerate(partition)
        ]
    counts = [sum(p.numel() for p in module.parameters()) for module in (whole, *ends)]
    assert SHAPES[shape].parameter_count() == counts[0]
    assert list(stage_parameters(SHAPES[shape], partition)) == counts[1:]
