"""`cross_entropy` in Triton, and the multiplication of gradients that are ready by a number on their device.

Forward reads each logit once, 2 bytes in bfloat16, and keeps 12 bytes of each row; backward reads and writes each once,
4 bytes. 8192 rows of 131072 words are limits of 0.5 ms and 1.0 ms at 4.3 TB/s. Not measured on a GPU. Kernels and
doors are `vocabulary_softmax_triton`'s.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.kernels.launch_triton import processors, require_triton
from megatron.kernels.vocabulary_softmax_triton import losses_of_triton, slopes_triton, statistics_triton
from megatron.kernels.vocabulary_words import Objective, Words, words_of


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, words: Words, objective: Objective) -> Tensor:
        found = statistics_triton(logits, targets, words, objective)
        ctx.save_for_backward(logits, targets, found)
        ctx.words, ctx.objective = words, objective
        return losses_of_triton(found, targets, words, objective)[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, found = ctx.saved_tensors
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        slopes_triton(logits, found, targets, ctx.words, 1.0, ctx.objective, grad.contiguous(), out)
        return out, None, None, None


def cross_entropy_triton(
    logits: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    vocab_size: int | None = None,
) -> Tensor:
    """As `cross_entropy`. Logits whose last stride is 1 are not copied."""
    require_triton(logits.device)
    rows = logits.reshape(-1, logits.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    words = words_of(rows.shape[1], rows.shape[1] if vocab_size is None else vocab_size)
    objective = Objective(z_loss, label_smoothing)
    losses: Tensor = _CrossEntropy.apply(rows, targets.reshape(-1), words, objective)
    return losses.view(targets.shape)


@triton.jit
def _multiply_kernel(values, factor, count, BLOCK: tl.constexpr):
    """values *= factor; nothing is read where it is 1."""
    WIDE: tl.constexpr = tl.float64 if values.dtype.element_ty == tl.float64 else tl.float32
    by = tl.load(factor).to(WIDE)
    if by != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        start = tl.program_id(0).to(tl.int64) * BLOCK
        while start < count:
            places = start + tl.arange(0, BLOCK)
            x = tl.load(values + places, mask=places < count).to(WIDE)
            tl.store(values + places, (x * by).to(values.dtype.element_ty), mask=places < count)
            start += step


def multiply_triton(values: Tensor, factor: Tensor) -> None:
    """values *= factor, a tensor of one number, in place; computed in float32 (float64 for float64).

    The number is read on the device: nothing waits for it, and where it is 1 values are neither read nor written.
    Values with gaps between them are left to torch.
    """
    require_triton(values.device)
    if not values.is_contiguous():
        values.mul_(factor)
        return
    count, block = values.numel(), 4096
    if count:
        programs = min(triton.cdiv(count, block), 8 * processors(values.device))
        _multiply_kernel[(programs,)](values, factor, count, BLOCK=block, num_warps=8)
