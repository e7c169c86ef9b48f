"""How a model's parameters lie on the tensor ranks, gathered from its parts, each of which states its own."""

from __future__ import annotations

from torch import nn

from megatron.parallel.model_place import ParameterCut


def parameter_cuts(model: nn.Module) -> dict[str, ParameterCut]:
    """The cut of every parameter held here, by its global name."""
    return {
        f"{prefix}.{name}".lstrip("."): module.cuts[name]
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
