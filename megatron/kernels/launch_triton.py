"""What all Triton kernels' doors need: how a launch is sized, and where it may run.

A door is the Python function that allocates outputs, checks what it was given, and launches. Sizes of blocks and
numbers of warps are chosen here and in the doors, from shapes alone, so that the same call always launches the same
program, and `tests/kernels/compiled_ahead.py` can compile every launch for a GPU that is not there.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from megatron.config.errors import UnavailableError

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 was set before this was imported)."""

_SMS_WITHOUT_A_GPU = 132
"""An H200's; what compiling ahead and the interpreter assume."""


def require_triton(device: torch.device) -> None:
    """Raises UnavailableError where Triton kernels cannot run on a device's tensors."""
    if device.type == "cuda" or INTERPRETED or device.type == "meta":
        return
    raise UnavailableError(
        f"Triton kernels run on GPUs, and the model is on {device.type}: set the backend in [kernels] to eager, or for "
        "a test of few tokens set TRITON_INTERPRET=1 in the environment"
    )


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device: how many programs of a persistent kernel are launched."""
    if device.type != "cuda":
        return 2 if INTERPRETED else _SMS_WITHOUT_A_GPU
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below size, at least 1."""
    return 1 << max(0, (size - 1).bit_length())


def warps_for(block: int) -> int:
    """Warps of a program that holds one block of so many elements in registers: 8 to 32 elements a thread."""
    return min(16, max(4, block // 512))


def rows_of(tensor: Tensor) -> Tensor:
    """tensor [..., size] as contiguous rows [n, size]; copies only where strides ask for it."""
    return tensor.contiguous().view(-1, tensor.shape[-1]) if tensor.numel() else tensor.reshape(0, tensor.shape[-1])
