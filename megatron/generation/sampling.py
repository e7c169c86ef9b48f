"""The next token, by rules that a user names. Chance is a function of (seed, row, step), not a state: a row's answer
does not depend on which other rows stand beside it, nor on the layout, but for ties within rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.config.errors import ConfigError


@dataclass(frozen=True)
class SamplingRules:
    """temperature: logits are divided by it; 0 takes the likeliest token. top_k: only the k likeliest; 0 for all.
    top_p: only the fewest tokens whose probabilities reach it together (Holtzman et al. 2020, arXiv 1904.09751).
    min_p: only tokens at least so likely as this share of the likeliest. repetition_penalty: logits of tokens that the
    row has already are divided by it where positive, multiplied where negative (Keskar et al. 2019, arXiv 1909.05858).

    In this order: penalty, temperature, top_k, top_p, min_p, each over what the one before left. ConfigError for values
    that mean nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("temperature", self.temperature >= 0, "at least 0 (0 takes the likeliest token)"),
            ("top_k", self.top_k >= 0, "at least 0 (0 leaves all)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1 leaves all)"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1 (0 leaves all)"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 changes nothing)"),
        ):
            if not fits:  # NaN fits nothing
                raise ConfigError(f"{name.replace('_', '-')} {getattr(self, name)}: it must be {wanted}")

    @property
    def greedy(self) -> bool:
        """Whether chance plays no part."""
        return self.temperature == 0


@torch.no_grad()
def choose(
    logits: Tensor, rules: SamplingRules, uniforms: Sequence[float], seen: Sequence[Sequence[int]] = ()
) -> tuple[Tensor, Tensor]:
    """Chosen tokens, int64 [b], and their log-probabilities under the model itself, float32 [b].

    logits [b, V]. uniforms: one number of [0, 1) for each row: the token is where it falls among the probabilities, the
    likeliest first. seen: each row's tokens so far, for the penalty. Raises ValueError where a row's logits are not
    finite.
    """
    wide = logits.double()
    if not bool(wide.isfinite().all()):
        raise ValueError("the model's logits are not finite")
    natural = wide.log_softmax(-1)
    if rules.repetition_penalty != 1:
        wide = _penalised(wide, rules.repetition_penalty, seen)
    if rules.greedy:
        chosen = wide.argmax(-1)
    else:
        weights, order = (wide / rules.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        cumulative = _left(weights, rules).cumsum(-1)
        goals = torch.tensor(list(uniforms), dtype=torch.float64, device=wide.device) * cumulative[:, -1]
        # the first whose sum exceeds the goal: one of weight 0 never does before the one in front of it
        places = (cumulative <= goals[:, None]).sum(-1).clamp(max=wide.shape[-1] - 1)
        chosen = order.gather(-1, places[:, None])[:, 0]
    return chosen, natural.gather(-1, chosen[:, None])[:, 0].float()


def _left(weights: Tensor, rules: SamplingRules) -> Tensor:
    """Weights [b, V], the likeliest first, with those that the rules leave out set to 0."""
    if 0 < rules.top_k < weights.shape[-1]:
        weights = weights.clone()
        weights[:, rules.top_k :] = 0
    if rules.top_p < 1:
        shares = weights / weights.sum(-1, keepdim=True)
        before = shares.cumsum(-1) - shares
        weights = weights.masked_fill(before >= rules.top_p, 0)
    if rules.min_p > 0:
        weights = weights.masked_fill(weights < rules.min_p * weights[:, :1], 0)
    return weights


def _penalised(logits: Tensor, penalty: float, seen: Sequence[Sequence[int]]) -> Tensor:
    logits = logits.clone()
    for row, tokens in enumerate(seen):
        index = torch.tensor(sorted(set(tokens)), dtype=torch.int64, device=logits.device)
        values = logits[row, index]
        logits[row, index] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


def uniform(seed: int, row: str, step: int) -> float:
    """A number of [0, 1) with 53 random bits, keyed by what it is for."""
    digest = hashlib.blake2b(f"{seed}/{row}/{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
