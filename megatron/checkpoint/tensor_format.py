"""The safetensors format as we write it: header, order of tensors, bytes; and what a file says of cut tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron.checkpoint.manifest import OFFSET, OFFSETS, SHAPES
from megatron.checkpoint.tensor_shards import TensorShard

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""torch's dtypes by their names in safetensors files."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 16 * 2**20


def file_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file piece by piece. At most one tensor at a time is copied (to the host, or to be contiguous).

    Wide elements come first, so that each tensor is aligned. Raises TypeError for a dtype the format lacks.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise TypeError(f"tensor {name} is of {tensor.dtype}, which checkpoints do not hold")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    words = json.dumps(header, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)
    yield len(words).to_bytes(8, "little") + words
    for name in order:
        flat = tensors[name].detach().to("cpu").reshape(-1)
        if flat.numel() and flat.stride(0) != 1:
            # one element of a larger tensor may pass for contiguous with any stride
            flat = flat.clone(memory_format=torch.contiguous_format)
        if flat.numel():
            raw = memoryview(flat.view(torch.uint8).numpy().data)
            for begin in range(0, len(raw), _CHUNK):
                yield raw[begin : begin + _CHUNK]
            del raw
        del flat  # else two copies would live while the next is made


def cut_metadata(shards: Mapping[str, TensorShard]) -> dict[str, str]:
    """What a file says of its tensors where any is a part of one; nothing where all are whole.

    torch.distributed.checkpoint wants every tensor of the file in it then.
    """
    if all(tuple(shard.tensor.shape) == tuple(shard.shape) for shard in shards.values()):
        return {}
    return {
        OFFSETS: json.dumps({name: {OFFSET: list(shard.offset)} for name, shard in shards.items()}),
        SHAPES: json.dumps({name: list(shard.shape) for name, shard in shards.items()}),
        "DCP_VERSION": "1.0",
    }
