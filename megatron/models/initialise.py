"""Initial weights, keyed by parameter name: the same at every layout, device and order of construction."""

from __future__ import annotations

import torch
from torch import nn

from megatron.models.decoder import Decoder
from megatron.models.layers import Linear, Norm
from megatron.parallel.random import keyed_generator


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Fills every parameter: matrices from normal(0, initializer_range), those that write to the residual stream
    divided by sqrt(2 x layers) (Megatron-LM and GPT-2's scaling), norms 1, biases 0.

    Values are drawn in float32 by a generator keyed (seed, parameter name) and cast to the parameter's dtype.
    """
    deviation = model.shape.initializer_range
    residual = deviation / (2 * model.shape.num_hidden_layers) ** 0.5
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{prefix}.{name}"
            if name == "bias":
                parameter.zero_()
            elif isinstance(module, Norm):
                parameter.fill_(1.0)
            else:
                scale = residual if isinstance(module, Linear) and module.residual else deviation
                parameter.copy_(_normal(parameter, scale, seed, full_name))


def _normal(parameter: nn.Parameter, deviation: float, seed: int, name: str) -> torch.Tensor:
    generator = keyed_generator(seed, "initial weights", name)
    return torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator)
