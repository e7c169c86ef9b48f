"""Initial weights, keyed by parameter name: the same at every layout, device and order of construction."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.models.decoder import Decoder
from megatron.models.head_norm import HeadNorm
from megatron.models.layers import Linear, Norm
from megatron.models.parameter_cuts import parameter_cuts
from megatron.parallel.random import keyed_generator


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Fills every parameter held here with its part of the whole, one after the other, cast to its dtype."""
    cuts = parameter_cuts(model)
    for name, parameter in model.named_parameters():
        whole = initial_value(model, name, seed)
        offset = cuts[name].offset_of(parameter.shape, model.place.tensor)
        box = tuple(slice(start, start + size) for start, size in zip(offset, parameter.shape, strict=True))
        parameter.copy_(whole[box])


def initial_value(model: Decoder, name: str, seed: int) -> Tensor:
    """A parameter at step 0, whole, float32 on the CPU: matrices from normal(0, initializer_range), those that write
    to the residual stream divided by sqrt(2 x layers) (Megatron-LM and GPT-2's scaling), norms 1 (0 where 1 is
    added), biases 0.

    Drawn by a generator keyed (seed, name). The model, which may be on the meta device, says only what the name means.
    """
    prefix, kind = name.rsplit(".", 1)
    module = model.get_submodule(prefix)
    shape = parameter_cuts(module)[kind].shape_of_whole(module.get_parameter(kind).shape, model.place.tensor)
    if kind == "bias":
        return torch.zeros(shape, device="cpu")
    if isinstance(module, Norm | HeadNorm):
        return torch.full(shape, 0.0 if model.shape.norm_unit_offset else 1.0, device="cpu")
    deviation = model.shape.initializer_range
    if isinstance(module, Linear) and module.residual:
        deviation /= (2 * model.shape.num_hidden_layers) ** 0.5
    generator = keyed_generator(seed, "initial weights", name)
    return torch.empty(shape, device="cpu").normal_(0.0, deviation, generator=generator)
