"""Cross-entropy of next tokens, in nats, for each token by itself.

`cross_entropy` is the definition over given logits. `linear_cross_entropy` is the same behind the output projection:
it walks over rows, makes each chunk's logits once, and turns them into their own gradient in place, so that the logits
of a whole microbatch are never held, and the backward pass has nothing left to compute but a multiplication.

For 4096 rows, 8192 words and width 256 on one thread with AVX512-BF16, forward and backward took 180 ms of its time in
bfloat16 and 566 ms in float32, `F.cross_entropy(F.linear(h, w).float(), t)` 462 and 791; the three GEMMs alone took 151
and 581.

On a GPU, where nothing was measured: 16,384 rows of 128,256 words at width 4096 are 51.6 TFLOP of GEMMs, 65 ms at 794
TFLOP/s; beside them Triton's softmax moves 8.4 GB, and the float32 gradient of the weight, to which four chunks are
added and which is rounded, 18 GB: limits of 2 ms and 4 ms at 4.3 TB/s.

Where the vocabulary is cut over ranks (`vocabulary_words`) losses and totals are the same on all of them; the gradient
of hidden is this rank's part of a sum, that of weight is complete.

Losses that are reported are always cross-entropy alone, so that they can be compared and their exponential is a
perplexity; totals, which are differentiated, have the z-loss and the smoothing of labels in them (`Objective`).

The softmax is done by `vocabulary_softmax` (kernels="eager") or `vocabulary_softmax_triton` ("triton"). Nothing here
waits for a device: no shape and no branch depends on what a tensor holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron.kernels import vocabulary_softmax
from megatron.kernels.matrix_product import Library, linear_of, product_into, product_of
from megatron.kernels.vocabulary_words import IGNORED, Kernels, Objective, Words, wide, words_of

CHUNK_ROWS = 1024
"""Rows whose logits exist at once on a CPU: enough to keep the GEMMs busy and the weight gradient's additions rare."""

_CHUNK_BYTES = 1 << 30
"""Of logits that exist at once elsewhere: each further chunk reads and writes the wide gradient of the weight again."""


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    vocab_size: int | None = None,
) -> Tensor:
    """What is minimised for each row: its cross-entropy, with `Objective`'s terms. 0 where the target is -100.

    logits [..., words] of any float dtype, targets [...] int64; words from vocab_size on, if it is given, are padding
    and have probability 0. Float32 statistics (float64 for float64 logits); the result has the shape of targets.
    """
    Objective(z_loss, label_smoothing)  # says what is wrong with them
    spread = logits[..., :vocab_size].to(wide(logits.dtype))
    spread = spread.reshape(-1, spread.shape[-1])
    losses = functional.cross_entropy(
        spread, targets.reshape(-1), ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing
    ).view(targets.shape)
    if z_loss == 0:
        return losses
    squares = spread.logsumexp(-1).square().view(targets.shape)
    return losses + z_loss * squares.where(targets != IGNORED, 0)


def _softmax(kernels: Kernels) -> Callable[..., None]:
    """`losses_and_slopes` by those kernels."""
    if kernels == "eager":
        return vocabulary_softmax.losses_and_slopes
    from megatron.kernels.vocabulary_softmax_triton import losses_and_slopes_triton

    return losses_and_slopes_triton


def _chunk_rows(logits_of: Tensor, held: int) -> int:
    """Rows whose logits [rows, held] exist at once, in the dtype and on the device of a tensor."""
    if logits_of.device.type == "cpu":
        return CHUNK_ROWS
    return max(1, _CHUNK_BYTES // (logits_of.element_size() * held * 1024)) * 1024


def _add_weight_gradient(total: Tensor, slopes: Tensor, hidden: Tensor, first: bool, library: Library) -> None:
    """total [words, width] += slopes.T @ hidden, or = where it is the first. A wider total is added to in its dtype."""
    beta = 0 if first else 1
    if library != "torch":
        made = product_of(library)(slopes.t(), hidden)
        total.copy_(made) if first else total.add_(made)
    elif slopes.dtype == total.dtype:
        total.addmm_(slopes.t(), hidden, beta=beta)
    elif slopes.is_cuda:
        # The GEMM adds its float32 sums to total itself; no product is written in between.
        torch.addmm(total, slopes.t(), hidden, out_dtype=total.dtype, beta=beta, out=total)
    elif first:
        total.copy_(slopes.t() @ hidden)
    else:
        total.add_(slopes.t() @ hidden)


def _multiply(tensor: Tensor, factor: Tensor, kernels: Kernels) -> None:
    """tensor *= factor, a number on the same device, without a wait and without a new version of the tensor."""
    if kernels == "eager":
        tensor.data.mul_(factor)
        return
    from megatron.kernels.cross_entropy_triton import multiply_triton

    multiply_triton(tensor.data, factor)


def _from(multiplied: Tensor, grad: Tensor) -> Tensor:
    """What takes a gradient that was multiplied by one upstream to another upstream; exactly 1 where they are equal, so
    that an upstream of 0 may come again.
    """
    return torch.where(grad == multiplied, 1.0, grad / multiplied)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: float,
        words: Words,
        objective: Objective,
        kernels: Kernels,
        library: Library,
    ) -> tuple[Tensor, Tensor]:
        solve, count = _softmax(kernels), targets.shape[0]
        losses = torch.empty(count, dtype=wide(hidden.dtype), device=hidden.device)
        objectives = losses if objective.plain else torch.empty_like(losses)
        hidden_grad = torch.empty_like(hidden)
        rows = _chunk_rows(hidden, words.held)
        # One chunk has nothing to add up: its GEMM, which adds in float32 inside, rounds once.
        dtype = weight.dtype if count <= rows else losses.dtype
        weight_grad = (torch.empty if count else torch.zeros)(weight.shape, dtype=dtype, device=weight.device)
        # One buffer: of two chunks' logits, one would be idle.
        buffer = hidden.new_empty(min(rows, count), words.held)
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            logits = product_into(library, hidden[part], weight.t(), buffer[: part.stop - start])
            solve(logits, targets[part], words, scale, objective, losses[part], objectives[part])
            made = product_into(library, logits, weight, hidden_grad[part])
            if made.data_ptr() != hidden_grad[part].data_ptr():
                hidden_grad[part] = made
            _add_weight_gradient(weight_grad, logits, hidden[part], start == 0, library)
        logits = buffer = None  # type: ignore[assignment]  # before the narrow copy of the weight's gradient is made
        # A number beside the gradients, not in ctx: hooks on saved tensors keep all three alike.
        multiplied = torch.ones((), dtype=losses.dtype, device=losses.device)
        ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype), multiplied)
        ctx.kernels, ctx.given = kernels, False
        ctx.mark_non_differentiable(losses)
        return objectives.sum() * scale, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad, multiplied = ctx.saved_tensors
        factor = _from(multiplied, grad)
        if ctx.given:
            # What was given away is somebody's: a second pass gets its own.
            return hidden_grad * factor, weight_grad * factor, *(None,) * 6
        ctx.given = True
        for tensor in (hidden_grad, weight_grad):
            _multiply(tensor, factor, ctx.kernels)
        multiplied.data.copy_(grad)
        return hidden_grad, weight_grad, *(None,) * 6


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    scale: float,
    rank: int = 0,
    size: int = 1,
    group: dist.ProcessGroup | None = None,
    *,
    kernels: Kernels = "eager",
    library: Library = "torch",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(scale x the sum of what is minimised, a differentiable scalar; the cross-entropy of each row, detached) of
    hidden @ weight.T.

    hidden [n, width], weight [padded vocabulary / size, width] of one dtype; targets [n] int64, -100 where none; words
    from vocab_size on are padding and have probability 0. Losses are float32 (float64 for float64). rank, size, group:
    of those who share the vocabulary; hidden and targets are the same on all of them. kernels: who does
    the softmax; the GEMMs are torch's. z_loss, label_smoothing: `Objective`; ValueError where they cannot be.
    Gradients are computed in the forward pass, which is why the scale is an argument: 1 / valid targets of the batch.
    """
    words, objective = words_of(weight.shape[0], vocab_size, rank, size, group), Objective(z_loss, label_smoothing)
    return _LinearCrossEntropy.apply(hidden, weight, targets, scale, words, objective, kernels, library)


def linear_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    rank: int = 0,
    size: int = 1,
    group: dist.ProcessGroup | None = None,
    *,
    kernels: Kernels = "eager",
    library: Library = "torch",
) -> Tensor:
    """The losses of `linear_cross_entropy` alone, [n], one chunk after the other.

    Where size is 1, differentiable by plain autograd, which then holds every chunk's logits.
    """
    words = words_of(weight.shape[0], vocab_size, rank, size, group)
    count, rows = targets.shape[0], _chunk_rows(hidden, words.held)
    parts = [slice(start, start + rows) for start in range(0, max(count, 1), rows)]
    return torch.cat([_chunk_losses(hidden[part], weight, targets[part], words, kernels, library) for part in parts])


def _chunk_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, words: Words, kernels: Kernels, library: Library
) -> Tensor:
    logits = linear_of(library)(hidden, weight, None)
    if kernels == "eager":
        if words.alone:
            return cross_entropy(logits, targets, vocab_size=words.valid)
        return vocabulary_softmax.row_losses(logits, targets, words)
    if words.alone:
        from megatron.kernels.cross_entropy_triton import cross_entropy_triton

        return cross_entropy_triton(logits, targets, vocab_size=words.valid)
    from megatron.kernels.vocabulary_softmax_triton import row_losses_triton

    return row_losses_triton(logits, targets, words)


class _CrossEntropyInPlace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        scale: float,
        words: Words,
        objective: Objective,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(targets.shape[0], dtype=wide(logits.dtype), device=logits.device)
        objectives = losses if objective.plain else torch.empty_like(losses)
        # Not saved but held, and multiplied in place: a copy would be a second tensor of tokens x words. What has been
        # multiplied in already is kept, so that a schedule that runs this twice gets the same twice.
        ctx.slopes, ctx.multiplied = logits.detach(), torch.ones((), dtype=losses.dtype, device=losses.device)
        _softmax(kernels)(ctx.slopes, targets, words, scale, objective, losses, objectives)
        ctx.kernels = kernels
        ctx.mark_non_differentiable(losses)
        return objectives.sum() * scale, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _multiply(ctx.slopes, _from(ctx.multiplied, grad), ctx.kernels)
        ctx.multiplied.copy_(grad)
        return ctx.slopes, *(None,) * 5


def cross_entropy_in_place(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    scale: float,
    rank: int = 0,
    size: int = 1,
    group: dist.ProcessGroup | None = None,
    *,
    kernels: Kernels = "eager",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` of logits [n, padded vocabulary / size], which are overwritten by their slopes; nothing
    else of their size is made.

    It holds no weight, so that input and weight gradients may be computed apart. logits must belong to the caller
    alone and be needed by nobody afterwards, as what a linear map returns.
    """
    words, objective = words_of(logits.shape[1], vocab_size, rank, size, group), Objective(z_loss, label_smoothing)
    return _CrossEntropyInPlace.apply(logits, targets, scale, words, objective, kernels)
