"""Copies of tensors in host memory, so that training goes on while they are written."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.checkpoint.tensor_shards import TensorShard, TensorShards


class HostCopies:
    """Copies the tensors of one save at a time.

    Copies from a CUDA device go to pinned memory, which is slow to get and so is kept for the next save: nothing of
    the last save may be in use any more when the next is copied.
    """

    def __init__(self) -> None:
        self._pinned: dict[tuple[str, int], Tensor] = {}
        self._devices: set[torch.device] = set()

    def of_shards(self, part: str, shards: TensorShards) -> dict[str, list[TensorShard]]:
        """The shards of a part with values of their own. To be read only after `wait`."""
        return {
            name: [
                TensorShard(self._copy((f"{part}/{name}", number), shard.tensor), shard.shape, shard.offset)
                for number, shard in enumerate(shards[name])
            ]
            for name in sorted(shards)
        }

    def wait(self) -> None:
        """Returns when every copy holds what its tensor held when it was asked for."""
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()
        self._devices.clear()

    def _copy(self, key: tuple[str, int], tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.device.type != "cuda":
            return tensor.to("cpu", copy=True).contiguous()
        buffer = self._pinned.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = self._pinned[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._devices.add(tensor.device)
        return buffer.copy_(tensor, non_blocking=True)
