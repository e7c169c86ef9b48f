"""Tables on a device by which one kernel launch walks over many tensors: where each lies, and which block is whose.

A table is a pure function of the numbers in it, so it is kept under them and made again only where a tensor has moved.
Uploads go through pinned memory on the current stream and nothing waits for them: who launches on another stream lets
it wait for this one, as for any tensor. While a CUDA graph is captured nothing may be uploaded, as the graph would read
host memory that is long gone: a step that ran before the capture with the same tensors has made all that it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

VECTOR_BYTES = 16
"""The widest load of a thread; a tensor that does not begin on such a boundary is read element by element."""


@lru_cache(maxsize=64)
def uploaded(numbers: tuple[int, ...] | tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a vector on the device. RuntimeError where they are new while a CUDA graph is captured."""
    return _to_device(torch.tensor(numbers, dtype=dtype), device)


@lru_cache(maxsize=32)
def block_map(
    sizes: tuple[int, ...], chosen: tuple[int, ...], block: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cuts the chosen ones of tensors of so many elements into blocks of `block` elements, the last of each shorter.

    Gives owners and numbers, int32 [blocks]: which tensor a block belongs to, and which of its blocks it is.
    RuntimeError where that is new while a CUDA graph is captured.
    """
    counts = torch.tensor([-(-sizes[index] // block) for index in chosen], dtype=torch.int64)
    owners = torch.repeat_interleave(torch.tensor(chosen, dtype=torch.int32), counts)
    before = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    numbers = (torch.arange(len(owners)) - before).to(torch.int32)
    return _to_device(owners, device), _to_device(numbers, device)


def addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Where the tensors begin, in bytes."""
    return tuple(tensor.data_ptr() for tensor in tensors)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is captured over tensors that were not there in the step before: run a step with the very "
            "same tensors first, so that the tables of where they lie exist"
        )
    return tensor.pin_memory().to(device, non_blocking=True)
