"""Words in a failure's reason that speak of a machine rather than of the program, and where they are documented."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class HardwareError:
    """What a reason's words mean.

    pattern: searched for in the reason, whatever its case. what: in a user's words. at_once: one such failure is enough
    to leave the node out: it stays broken until somebody repairs or resets it. own: the host that reports it is the one
    that is broken; else it may be any. source: who defines the words.
    """

    pattern: str
    what: str
    at_once: bool
    own: bool
    source: str


_CUDA = "CUDA runtime API, cudaError_t, in the words of cudaGetErrorString"
_XID = "NVIDIA, Xid catalog, docs.nvidia.com/deploy/xid-errors"
_NVML = "NVML API, in the words of nvmlErrorString"
_NCCL = "NCCL user guide, ncclResult_t, in the words of ncclGetErrorString"
_NUMBER = r"\bXid\b(?:\s*\([^)]*\)\W*|[^\d(]{0,12})"
"""Of the kernel's lines: "NVRM: Xid (PCI:0000:01:00): 79, …"."""

HARDWARE_ERRORS: tuple[HardwareError, ...] = (
    HardwareError(r"uncorrectable ECC error", "uncorrectable memory error of a GPU", True, True, f"{_CUDA}: 214"),
    HardwareError(r"double.bit ECC", "uncorrectable memory error of a GPU", True, True, f"{_XID}: 48"),
    HardwareError(
        rf"{_NUMBER}(48|64|94|95|140)\b",
        "uncorrectable memory error of a GPU",
        True,
        True,
        f"{_XID}: 48, 64, 94, 95, 140",
    ),
    HardwareError(
        rf"fallen off the bus|\bGPU is lost\b|{_NUMBER}79\b",
        "a GPU is no longer reachable",
        True,
        True,
        f"{_XID}: 79; {_NVML}",
    ),
    HardwareError(r"uncorrectable NVLink error", "NVLink of a GPU failed", False, True, f"{_CUDA}: 220"),
    HardwareError(
        r"Invalid access of peer GPU memory over nvlink or a hardware error",
        "NVLink of a GPU failed",
        False,
        True,
        f"{_CUDA}: 721",
    ),
    HardwareError(
        r"CUDA-capable device\(s\) is/are busy or unavailable", "its GPUs are not free", False, True, f"{_CUDA}: 46"
    ),
    HardwareError(r"no CUDA-capable device is detected", "its GPUs are not to be seen", False, True, f"{_CUDA}: 100"),
    HardwareError(
        r"system not yet initialized|system has unsupported display driver",
        "its driver or its fabric manager does not work",
        False,
        True,
        f"{_CUDA}: 802, 803",
    ),
    # Xid 13, 31, 43 and 45 come of a program's own mistakes, and of kills
    HardwareError(rf"{_NUMBER}(?!(?:13|31|43|45)\b)\d+\b", "the driver reported an error of a GPU", False, True, _XID),
    HardwareError(
        r"NCCL error(?!.*invalid (?:usage|argument))|ncclSystemError|ncclRemoteError|ncclUnhandledCudaError|"
        r"remote process exited or there was a network error",
        "NCCL could not reach another GPU",
        False,
        False,
        _NCCL,
    ),
    HardwareError(
        r"\bIBV_WC_\w+_ERR\b", "the InfiniBand network failed", False, False, "libibverbs, enum ibv_wc_status"
    ),
)
"""The first that matches counts. Not here: illegal memory access, launch failure, device-side assert, out of memory,
which a program's own mistakes bring about far more often than machines."""


def hardware_error_in(reason: str) -> HardwareError | None:
    """The first of HARDWARE_ERRORS that speaks in a failure's reason; None where none does."""
    found = (one for one in HARDWARE_ERRORS if re.search(one.pattern, reason, re.IGNORECASE | re.DOTALL))
    return next(found, None)
