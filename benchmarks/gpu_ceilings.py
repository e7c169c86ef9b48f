"""Part a: what the device gives at best, which every other figure is held against.

copy: a device-to-device copy, bytes read plus bytes written. gemm: products [m, k] x [n, k]^T, 2mnk operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from gpu_job import Context, Job, Timer, first_line
from gpu_results import Row
from torch import Tensor

TITLE = "ceilings"
NOTES = (
    "Medians over back-to-back calls on random numbers. copy: bytes read and written; fill and sum: bytes written, "
    "read. gemm m, n, k: `[m, k] x [n, k]^T`, 2mnk operations; 8192^3 is what is usually quoted, the others are those "
    "of Llama-3.2-1B and Llama-3-8B at 16,384 tokens. fp8: e4m3 by torch._scaled_mm with one scale a tensor."
)

PEAK_BF16 = 989e12
"""Dense bf16 operations a second of an H100 or H200 (SXM) by NVIDIA's data sheet."""

GEMMS = (
    (8192, 8192, 8192), (16384, 16384, 16384), (4096, 4096, 4096), (16384, 3072, 2048), (16384, 16384, 2048),
    (16384, 2048, 8192), (16384, 6144, 4096), (16384, 28672, 4096), (16384, 4096, 14336), (8192, 128256, 4096),
)  # fmt: skip
_DRY_GEMMS = ((64, 64, 64), (64, 96, 32))
_BYTES = 4 << 30
_DRY_BYTES = 1 << 20


@dataclass(frozen=True)
class Ceilings:
    """Bytes of copying and bf16 operations a second, at best; where they are from."""

    copy: float
    gemm: float
    origin: str


def jobs(context: Context) -> Iterator[Job]:
    """All of part a."""
    timer = Timer(context.device)
    yield Job("memory", lambda: _memory(context, timer))
    for sizes in _DRY_GEMMS if context.dry else GEMMS:
        yield Job(f"gemm bf16 {sizes}", lambda sizes=sizes: [_gemm(context, timer, sizes)])
    for sizes in _DRY_GEMMS[:1] if context.dry else (*GEMMS[:2], *GEMMS[6:9]):
        yield Job(f"gemm fp8 {sizes}", lambda sizes=sizes: [_gemm_fp8(context, timer, sizes)])


def ceilings_of(context: Context) -> Ceilings:
    """Those that part a has measured on this device today, or else two measured now."""
    rows = context.results.rows_here("a")
    copies = [1e12 * row["TB/s"] for row in rows if row.get("what") == "copy"]
    gemms = [1e12 * row["TFLOP/s"] for row in rows if row.get("dtype") == "bf16"]
    if copies and gemms:
        return Ceilings(max(copies), max(gemms), "part a")
    timer = Timer(context.device)
    copy = 1e12 * _memory(context, timer)[0]["TB/s"]
    gemm = 1e12 * _gemm(context, timer, (_DRY_GEMMS if context.dry else GEMMS)[0])["TFLOP/s"]
    return Ceilings(copy, gemm, "measured before this part")


def _memory(context: Context, timer: Timer) -> Sequence[Row]:
    size = _DRY_BYTES if context.dry else _BYTES
    source = torch.randn(size // 4, device=context.device)
    target = torch.empty_like(source)
    ways = {
        "copy": (lambda: target.copy_(source), 2 * size),
        "fill": (lambda: target.fill_(1.0), size),
        "sum": (lambda: source.sum(), size),
    }
    rows = []
    for name, (call, moved) in ways.items():
        taken = timer.seconds(call, flush=False)
        rows.append({"what": name, "bytes": moved, "ms": 1e3 * taken.median, "TB/s": moved / taken.median / 1e12})
    return rows


def _gemm(context: Context, timer: Timer, sizes: tuple[int, int, int]) -> Row:
    a, b = _operands(context, sizes)
    taken = timer.seconds(lambda: a @ b.t(), flush=False)
    return _row("bf16", sizes, taken.median)


def _gemm_fp8(context: Context, timer: Timer, sizes: tuple[int, int, int]) -> Row:
    """A device or a torch without it is said in the row: the part goes on."""
    one = torch.ones((), device=context.device)
    try:
        a, b = (x.to(torch.float8_e4m3fn) for x in _operands(context, sizes))
        for quick in (True, False):
            product = lambda quick=quick: torch._scaled_mm(  # noqa: E731
                a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=quick
            )
            if quick:
                first = timer.seconds(product, flush=False)
            else:
                exact = timer.seconds(product, flush=False)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return {"dtype": "fp8", "m, n, k": str(sizes), "not possible": first_line(error)}
    operations = 2.0 * sizes[0] * sizes[1] * sizes[2]
    return _row("fp8", sizes, first.median) | {"TFLOP/s, slow accumulation": operations / exact.median / 1e12}


def _operands(context: Context, sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """[m, k] and [n, k] of normal numbers; zeros would run quicker than data does."""
    m, n, k = sizes
    generator = torch.Generator(context.device).manual_seed(context.seed)
    return tuple(  # type: ignore[return-value]
        torch.randn(rows, k, dtype=torch.bfloat16, device=context.device, generator=generator) for rows in (m, n)
    )


def _row(dtype: str, sizes: tuple[int, int, int], seconds: float) -> Row:
    rate = 2.0 * sizes[0] * sizes[1] * sizes[2] / seconds
    return {"dtype": dtype, "m, n, k": str(sizes), "ms": 1e3 * seconds, "TFLOP/s": rate / 1e12}
