"""Whether memory holds both models whole, in float32, or a proof goes layer by layer."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from pathlib import Path
from typing import Literal

from megatron.config.errors import ConfigError
from megatron.config.model_shape import ModelShape
from megatron.hf.proof_record import Extent

ASKED: tuple[str, ...] = ("auto", "whole", "layers")
SHARE = 0.5
"""Of the available memory, that a whole proof may take."""
_MEMINFO = Path("/proc/meminfo")
_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def choose_extent(
    asked: Literal["auto", "whole", "layers"] | str, shape: ModelShape, longest: int, available: int | None = None
) -> tuple[Extent, str]:
    """(how the proof goes, why, in words). longest: tokens of the longest prompt. available: bytes; None: asks.

    Raises ConfigError for an unknown word.
    """
    if asked == "whole":
        return "whole", "because --proof asks for it"
    if asked == "layers":
        return "layers", "because --proof asks for it"
    if asked != "auto":
        raise ConfigError(f"--proof {asked!r}: {', '.join(ASKED)} are known")
    needed, free = whole_bytes(shape, longest), available_bytes() if available is None else available
    words = f"both models in float32 take {needed / 1e9:.1f} GB, of {free / 1e9:.1f} GB available"
    return ("whole", words) if needed <= SHARE * free else ("layers", f"{words} at most {SHARE:.0%} is taken")


def whole_bytes(shape: ModelShape, longest: int) -> int:
    """Bytes of both models in float32, and of the logits of one prompt on its way."""
    return 4 * (2 * shape.parameter_count() + 2 * longest * shape.vocab_size)


def available_bytes() -> int:
    """Memory that this process may still take: the machine's, or its control group's where that is less."""
    found = [_machine()]
    for limit, current in _GROUPS:
        with contextlib.suppress(OSError, ValueError):  # no limit is written as "max", or there is no such group
            found.append(int(limit.read_text()) - int(current.read_text()))
    return max(0, min(found))


def _machine() -> int:
    with contextlib.suppress(OSError):
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def give_back_freed() -> None:
    """Gives freed memory back to the machine. Layers come and go in pieces that glibc would keep for later: on a model
    of 207 million parameters 380 MB of them. Other C libraries are left alone."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
