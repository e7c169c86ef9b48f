"""Matrices decay, vectors do not, whatever the shape of the model."""

from __future__ import annotations

import pytest
import torch

from megatron.config.model_shape import resolve_model
from megatron.config.schema import ModelSection
from megatron.models.decoder import Decoder
from megatron.optim.groups import parameter_groups


@pytest.mark.parametrize("preset", ["llama-tiny", "neox-160m"])
def test_biases_and_norms_are_never_decayed(preset: str) -> None:
    with torch.device("meta"):
        model = Decoder(resolve_model(ModelSection(preset=preset, seq_length=8), 100))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = parameter_groups(model.named_parameters(), 0.1)
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    free = {names[id(p)] for p in kept["params"]}
    assert free == {name for name in names.values() if "norm" in name or name.endswith("bias")}
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_an_empty_group_is_left_out() -> None:
    assert len(parameter_groups([("a", torch.nn.Parameter(torch.ones(2, 2)))], 0.1)) == 1
