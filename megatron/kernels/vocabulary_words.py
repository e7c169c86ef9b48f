"""Which words of the vocabulary this rank has logits of, what is asked of a row, and what ranks tell each other of it.

The vocabulary may be cut over ranks, in equal parts of the padded vocabulary: rank r of `size` holds the r-th. Logits
are never gathered: of each row the ranks exchange three numbers (Shoeybi et al., arXiv 1909.08053, section 3, which
gathers losses only; here maximum, sum and target travel together), and a fourth where labels are smoothed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.kernels.collectives import all_gather

IGNORED = -100
"""The target of a position that does not count."""

Kernels = Literal["eager", "triton"]
"""Who does the softmax part."""


@dataclass(frozen=True)
class Words:
    """The words whose logits this rank has: `held` from number `first` on, of which the first `valid` are no padding.

    vocabulary: how many words all ranks have together, without padding. alone: this rank has them all.
    """

    first: int
    held: int
    valid: int
    vocabulary: int
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def alone(self) -> bool:
        return self.size == 1


def words_of(held: int, vocab_size: int, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> Words:
    """The words of one of `size` ranks that hold `held` each."""
    first = rank * held
    return Words(first, held, min(max(vocab_size - first, 0), held), vocab_size, size, group)


@dataclass(frozen=True)
class Objective:
    """What is minimised for each row, beyond its cross-entropy: with log-sum-exp L over V words and targets' logit x_t,

        L - x_t + z_loss * L^2 + label_smoothing * (x_t - mean of x)

    z_loss keeps L near 0 (Chowdhery et al., arXiv 2204.02311, section 5). Label smoothing e (Szegedy et al., arXiv
    1512.00567, section 7) is (1 - e) * cross-entropy + e * the mean over V of -log p: the same, written with L and x.
    The slope to x_j is (1 + 2 z_loss L) p_j - (1 - e) [j = t] - e / V.
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not (self.z_loss >= 0 and 0 <= self.label_smoothing < 1):
            raise ValueError(f"z_loss >= 0 and 0 <= label_smoothing < 1 are needed, not {self}")

    @property
    def plain(self) -> bool:
        """It is cross-entropy and nothing else."""
        return self.z_loss == 0 and self.label_smoothing == 0

    @property
    def numbers(self) -> int:
        """How many numbers of a row the ranks exchange: the sum of its logits only where labels are smoothed."""
        return 4 if self.label_smoothing else 3


PLAIN = Objective()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and losses."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def own_targets(targets: Tensor, words: Words) -> tuple[Tensor, Tensor]:
    """(column of each row's target [n, 1], 0 where it is not held here; whether it is, [n, 1])."""
    column = (targets - words.first)[:, None]
    mine = (column >= 0) & (column < words.valid) & (targets != IGNORED)[:, None]
    return column.where(mine, 0), mine


def gathered(own: Tensor, words: Words) -> Tensor:
    """The numbers [n, k] of each row on every rank, [size, n, k]: one collective."""
    every = own.new_empty(words.size * own.shape[0], own.shape[1])
    all_gather(every, own, group=words.group)
    return every.view(words.size, *own.shape)
