"""Losses of rows of logits, and the logits replaced by their slopes: with torch's own operations.

logits [n, held] are this rank's words (`vocabulary_words`), targets [n] int64 of the whole vocabulary, -100 where none.
Everything but logits is float32 (float64 for float64 logits). `vocabulary_softmax_triton` promises the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron.kernels.vocabulary_words import IGNORED, PLAIN, Objective, Words, gathered, own_targets, wide

_SOFTMAX_ELEMENTS = 1 << 20
"""Elements widened at once for the softmax on a CPU: 4 MB of float32, which stays in cache."""

_SOFTMAX_ELEMENTS_GPU = 1 << 27
"""The same elsewhere: half a gigabyte of float32, so that few kernels are launched."""


def _parts(logits: Tensor) -> Iterator[slice]:
    """Rows that are widened together."""
    elements = _SOFTMAX_ELEMENTS if logits.device.type == "cpu" else _SOFTMAX_ELEMENTS_GPU
    rows = max(1, elements // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, logits.shape[0], rows))


def own_statistics(logits: Tensor, targets: Tensor, words: Words, objective: Objective = PLAIN) -> Tensor:
    """Of each row over this rank's words, [n, 3]: the highest logit, the sum of exp(logit - highest), the target's (0
    where it is not here); with smoothed labels the sum of logits, [n, 4]. A rank of padding alone: -infinity, 0, 0, 0.
    """
    own = torch.zeros(logits.shape[0], objective.numbers, dtype=wide(logits.dtype), device=logits.device)
    own[:, 0] = -torch.inf
    if not words.valid:
        return own
    column, mine = own_targets(targets, words)
    for part in _parts(logits):
        spread = logits[part, : words.valid].to(own.dtype, copy=True)
        own[part, 2:3] = spread.gather(1, column[part]).where(mine[part], 0)
        if objective.label_smoothing:
            own[part, 3] = spread.sum(-1)
        own[part, 0] = highest = spread.amax(-1)
        own[part, 1] = spread.sub_(highest[:, None]).exp_().sum(-1)
    return own


def statistics(logits: Tensor, targets: Tensor, words: Words, objective: Objective = PLAIN) -> Tensor:
    """`own_statistics` over all ranks' words, on all of them the same."""
    own = own_statistics(logits, targets, words, objective)
    if words.alone:
        return own
    every = gathered(own, words)
    highest = every[..., 0].amax(0)
    merged = every.sum(0)
    merged[:, 0] = highest
    merged[:, 1] = (every[..., 1] * (every[..., 0] - highest).exp()).sum(0)
    return merged


def losses_of(found: Tensor, targets: Tensor, words: Words, objective: Objective = PLAIN) -> tuple[Tensor, Tensor]:
    """(cross-entropy, objective) of each row by its `statistics`, [n] each; one tensor where they are the same."""
    highest, total, chosen = found[:, 0], found[:, 1], found[:, 2]
    counts = targets != IGNORED
    losses = (highest - chosen + total.log()).where(counts, 0)
    if objective.plain:
        return losses, losses
    objectives = losses + objective.z_loss * (highest + total.log()).square()
    if objective.label_smoothing:
        objectives += objective.label_smoothing * (chosen - found[:, 3] / words.vocabulary)
    return losses, objectives.where(counts, 0)


def slopes(
    logits: Tensor, found: Tensor, targets: Tensor, words: Words, scale: float, objective: Objective = PLAIN
) -> None:
    """Replaces logits by scale * d(objective)/d(logits), by their `statistics`: 0 in padding and without a target."""
    column, mine = own_targets(targets, words)
    highest, total = found[:, 0:1], found[:, 1:2]
    factor = (targets != IGNORED)[:, None].to(total.dtype) * scale
    weight = factor * (1 + 2 * objective.z_loss * (highest + total.log())) / total
    hot = mine * factor * (objective.label_smoothing - 1)
    floor = factor * (objective.label_smoothing / words.vocabulary)
    logits[:, words.valid :] = 0
    for part in _parts(logits if words.valid else logits[:0]):
        narrow = logits[part, : words.valid]
        spread = narrow.to(total.dtype, copy=True).sub_(highest[part]).exp_().mul_(weight[part])
        if objective.label_smoothing:
            spread.sub_(floor[part])
        # The target's slope is formed in wide precision before it is rounded.
        narrow.copy_(spread.scatter_add_(1, column[part], hot[part]))


def losses_and_slopes(
    logits: Tensor,
    targets: Tensor,
    words: Words,
    scale: float,
    objective: Objective,
    losses: Tensor,
    objectives: Tensor,
) -> None:
    """Writes the cross-entropy of each row to losses [n] and what is minimised to objectives [n] (the same tensor where
    the objective is plain), then replaces logits by scale * d(objective)/d(logits).
    """
    if words.alone:
        _alone(logits, targets, words, scale, objective, losses, objectives)
        return
    found = statistics(logits, targets, words, objective)
    rows = losses_of(found, targets, words, objective)
    losses.copy_(rows[0])
    if not objective.plain:
        objectives.copy_(rows[1])
    slopes(logits, found, targets, words, scale, objective)


def _alone(
    logits: Tensor,
    targets: Tensor,
    words: Words,
    scale: float,
    objective: Objective,
    losses: Tensor,
    objectives: Tensor,
) -> None:
    """`losses_and_slopes` where all words are here: each part is widened, and its exponentials are taken, once."""
    counts = targets != IGNORED
    safe = targets.where(counts, 0)[:, None]
    for part in _parts(logits):
        narrow, target, count = logits[part], safe[part], counts[part, None]
        spread = narrow.to(losses.dtype)
        chosen = spread.gather(1, target)
        mean = spread[:, : words.valid].mean(-1, keepdim=True) if objective.label_smoothing else chosen
        if words.valid < words.held:
            spread[:, words.valid :] = -torch.inf
        # log-sum-exp from the likeliest word, whose probability never underflows: lse = max - log(p of max).
        highest = spread.amax(-1, keepdim=True)
        likely = torch.softmax(spread, -1)
        rest = likely.amax(-1, keepdim=True).log()
        loss = highest - rest - chosen
        losses[part] = loss.where(count, 0).squeeze(1)
        weight = factor = count.to(losses.dtype) * scale
        if not objective.plain:
            spare = objective.z_loss * (highest - rest).square() + objective.label_smoothing * (chosen - mean)
            objectives[part] = (loss + spare).where(count, 0).squeeze(1)
            weight = factor * (1 + 2 * objective.z_loss * (highest - rest))
        floor = factor * (objective.label_smoothing / words.vocabulary)
        # The target's slope is formed in wide precision before it is rounded.
        hot = likely.gather(1, target) * weight - factor * (1 - objective.label_smoothing) - floor
        if objective.label_smoothing:
            torch.sub(likely.mul_(weight), floor, out=narrow)
            narrow[:, words.valid :] = 0
        else:
            torch.mul(likely, weight, out=narrow)
        narrow.scatter_(1, target, hot.to(narrow.dtype))


def row_losses(logits: Tensor, targets: Tensor, words: Words) -> Tensor:
    """The cross-entropy of each row [n], and nothing else; not differentiable."""
    return losses_of(statistics(logits, targets, words), targets, words)[0]
