"""Which attention can run where, and why another cannot: for a measurement at step 0, and for errors in its words."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch

from megatron.config.kernel_checks import attention_limit
from megatron.kernels.attention import AttentionBackend


@dataclass(frozen=True)
class AttentionCall:
    """What decides. torch: (2, 13). capability: of the GPU, (9, 0) for an H100 or H200; None on CPUs. cudnn: 91900 for
    9.19.0; None without it. documents: whether rows may be divided. gathered: whether queries are some positions and
    keys all (context_method = gather). windowed: whether a sliding window hides positions.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    torch: tuple[int, int]
    capability: tuple[int, int] | None
    cudnn: int | None
    documents: bool = True
    gathered: bool = False
    windowed: bool = False


def attention_call(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    torch_version: str = torch.__version__,
    documents: bool = True,
    gathered: bool = False,
    windowed: bool = False,
) -> AttentionCall:
    """Of this machine. torch_version: as torch.__version__ says it."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None
    version = version_of(torch_version)
    return AttentionCall(device, dtype, head_dim, version, capability, cudnn, documents, gathered, windowed)


def version_of(torch_version: str) -> tuple[int, int]:
    """(2, 13) of "2.13.0+cu130" or "2.14.0a0+git1234"."""
    major, minor = torch_version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def attention_candidates(call: AttentionCall) -> list[AttentionBackend]:
    """The backends that can train with this call, in the order of `AttentionBackend`."""
    return [name for name in get_args(AttentionBackend) if attention_obstacle(name, call) is None]


def attention_obstacle(backend: AttentionBackend, call: AttentionCall) -> str | None:
    """Why a backend cannot train with this call, in words that complete "cannot run here: "; None where it can."""
    return _OBSTACLES[backend](call)


def _sdpa(call: AttentionCall) -> str | None:
    return None


def _blockwise(call: AttentionCall) -> str | None:
    return (
        None if call.device.type == "cpu" else f"its blocks are cut by the host, and the model is on {call.device.type}"
    )


def _half_precision_gpu(name: AttentionBackend, call: AttentionCall) -> str | None:
    if call.device.type != "cuda" or call.capability is None:
        return f"it is a kernel for GPUs, and the model is on {call.device.type}"
    if call.capability < (8, 0):
        return f"its kernels need compute capability 8.0, and this GPU has {'.'.join(map(str, call.capability))}"
    return _limit(name, call)


def _limit(name: AttentionBackend, call: AttentionCall) -> str | None:
    dtype = str(call.dtype).removeprefix("torch.")
    return attention_limit(name, dtype, call.head_dim, call.gathered, call.windowed)


def _varlen(call: AttentionCall) -> str | None:
    return _half_precision_gpu("varlen", call)


def _cudnn(call: AttentionCall) -> str | None:
    obstacle = _half_precision_gpu("cudnn", call)
    if obstacle is None and call.documents:
        obstacle = _packed_cudnn(call)
    return obstacle


def _packed_cudnn(call: AttentionCall) -> str | None:
    if call.capability is not None and call.capability[0] not in (9, 10):
        return "cuDNN takes packed documents on compute capability 9.0 and 10.0 only"
    if call.torch < (2, 15):
        # pytorch pull requests 186142 (the accumulator's size) and 191576 (the cache of plans); not in 2.11
        return (
            "before torch 2.15 its backward pass over packed documents may write past its memory, and it plans anew at "
            f"each call; this is torch {'.'.join(map(str, call.torch))}"
        )
    if call.cudnn is None or call.cudnn < 91800:
        return f"packed documents need cuDNN 9.18, and this is {call.cudnn}"
    return None


def _flex(call: AttentionCall) -> str | None:
    if call.device.type != "cuda" or call.capability is None:
        return f"it has no backward pass on {call.device.type}"
    if call.capability < (8, 0):
        return f"Triton needs compute capability 8.0, and this GPU has {'.'.join(map(str, call.capability))}"
    return _limit("flex", call) or _without_triton()


def _unfused(call: AttentionCall) -> str | None:
    return None if call.device.type == "cpu" else _without_triton()


def _without_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "the triton package is not installed"


_OBSTACLES: dict[AttentionBackend, Callable[[AttentionCall], str | None]] = {
    "sdpa": _sdpa,
    "blockwise": _blockwise,
    "varlen": _varlen,
    "cudnn": _cudnn,
    "flex": _flex,
    "unfused": _unfused,
}
