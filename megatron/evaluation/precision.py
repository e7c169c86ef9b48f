"""In which dtype an evaluation computes: said by the user, or measured once and printed (law T3)."""

from __future__ import annotations

import statistics
import time

import torch

from megatron.config.errors import UnavailableError

_SIZE, _ROUNDS, _WORTH = 1024, 5, 1.3


def choose_dtype(asked: str, device: str) -> tuple[str, str]:
    """The dtype's name and the reason for it. `asked`: "auto", "float32" or "bfloat16". Raises UnavailableError."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UnavailableError(f"--device {device} cannot be used here ({first}): say --device cpu") from None
    if asked != "auto":
        return asked, "as asked"
    single, half = (_milliseconds(dtype, device) for dtype in (torch.float32, torch.bfloat16))
    figures = f"a {_SIZE}-square product takes {half:.2f} ms in bfloat16, {single:.2f} ms in float32"
    return ("bfloat16" if half * _WORTH < single else "float32"), figures


def _milliseconds(dtype: torch.dtype, device: str) -> float:
    a = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    taken = []
    for _ in range(_ROUNDS + 1):
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # reading one value waits for a device that runs ahead
        taken.append(time.perf_counter() - began)
    return 1000 * statistics.median(taken[1:])
