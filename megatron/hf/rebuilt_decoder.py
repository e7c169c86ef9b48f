"""Our own decoder around a source's weights, computing in float32 with the weights rounded as a folder has them: all of
it in memory, or one layer at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron.checkpoint.tensor_shards import TensorSource
from megatron.config.errors import CheckpointError
from megatron.config.model_shape import ModelShape
from megatron.hf.proof_memory import give_back_freed
from megatron.models.decoder import Decoder


class RoundedWeights:
    """Weights of a TensorSource, whole, rounded to `dtype` and widened to float32 again."""

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype

    def whole(self, name: str) -> Tensor:
        """One tensor by our name, float32."""
        shape = self.source.shape(name)
        return self.source.read(name, (0,) * len(shape), shape).to(self.dtype).float()


def whole_decoder(shape: ModelShape, weights: RoundedWeights) -> Decoder:
    """The model with every weight in memory, in eval mode. Raises CheckpointError where names do not fit the shape."""
    model = _unset(shape, weights.source)
    model.load_state_dict({name: weights.whole(name) for name in weights.source.names()}, assign=True)
    return model.eval()


def layered_decoder(shape: ModelShape, weights: RoundedWeights) -> Decoder:
    """The model whose layers hold their weights only while they run, in eval mode."""
    model = _unset(shape, weights.source)
    outside = {name: weights.whole(name) for name in weights.source.names() if not name.startswith("layers.")}
    model.load_state_dict(outside, strict=False, assign=True)
    stream_layers(model, weights)
    return model.eval()


def stream_layers(model: Decoder, weights: RoundedWeights) -> None:
    """Makes each layer take its weights when it is called, and leave them when it is done."""
    for number, layer in model.layers.items():
        layer.register_forward_pre_hook(_Loader(f"layers.{number}.", weights))
        layer.register_forward_hook(_leave)


class _Loader:
    def __init__(self, prefix: str, weights: RoundedWeights) -> None:
        self._prefix, self._weights = prefix, weights

    def __call__(self, layer: nn.Module, _args: Any) -> None:
        names = [name for name, _ in layer.named_parameters()]
        layer.load_state_dict({name: self._weights.whole(self._prefix + name) for name in names}, assign=True)


def _leave(layer: nn.Module, _args: Any, _output: Any) -> None:
    layer.to("meta")
    give_back_freed()


def _unset(shape: ModelShape, source: TensorSource) -> Decoder:
    with torch.device("meta"):
        model = Decoder(shape)
    wanted, found = {name for name, _ in model.named_parameters()}, set(source.names())
    if wanted != found:
        names = ", ".join(sorted(wanted ^ found)[:8])
        raise CheckpointError(f"the weights and the model shape do not name the same tensors: {names}")
    return model
