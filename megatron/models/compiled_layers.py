"""Layers compiled one by one, in place, by torch.compile.

All layers are alike, so that one program serves them all; parameters keep their names. A second sequence length makes
the program one for any length: a run whose lengths change compiles twice. The pipeline's split backward passes run a
layer's graph twice, which compiled graphs do not allow; a whole pipeline stage is never compiled for the same reason.
"""

from __future__ import annotations

import torch

from megatron.models.decoder import Decoder, DecoderLayer

compiler = torch.compile
"""Compiled at the first call; a second length of sequences makes the program one for any."""

OPAQUE = ("blockwise", "cudnn", "unfused")
"""Attentions whose plans differ from microbatch to microbatch in more than tensors: they run between two programs."""


def compile_layers(model: Decoder) -> None:
    """Compiles every layer held here; before `apply_recompute`, which wraps what it finds."""
    if model.kernels.attention in OPAQUE:
        for layer in model.layers.values():
            assert isinstance(layer, DecoderLayer)
            layer.attention.core = torch.compiler.disable(layer.attention.core)  # type: ignore[method-assign]
    for layer in model.layers.values():
        assert isinstance(layer, DecoderLayer)
        layer.forward = compiler(layer.forward)  # type: ignore[method-assign]
