"""From our tensors to one of theirs and back, by the layout that the name table gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.config.model_shape import ModelShape
from megatron.hf.name_table import Entry, our_size


def pack(entry: Entry, tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """Their tensor from ours."""
    if entry.layout == "vocabulary":
        return tensors[0][: shape.vocab_size].contiguous()
    if entry.layout == "per-head qkv":
        heads = [tensor.reshape(shape.num_attention_heads, shape.head_dim, *tensor.shape[1:]) for tensor in tensors]
        return torch.stack(heads, dim=1).flatten(0, 2).contiguous()
    return tensors[0].contiguous()


def unpack(entry: Entry, tensor: Tensor, shape: ModelShape) -> list[Tensor]:
    """Our tensors from theirs, in the order of `entry.ours`; the vocabulary's padding rows are zero."""
    if entry.layout == "vocabulary":
        padded = tensor.new_zeros(our_size(entry.size[0], shape))
        padded[: shape.vocab_size] = tensor
        return [padded]
    if entry.layout == "per-head qkv":
        heads = tensor.reshape(shape.num_attention_heads, 3, shape.head_dim, *tensor.shape[1:])
        return [heads[:, part].flatten(0, 1).contiguous() for part in range(3)]
    return [tensor.contiguous()]
