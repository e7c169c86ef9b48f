"""Both models whole in memory, side by side: logits, negative log-likelihood and greedy tokens of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron.config.errors import ProofError
from megatron.hf.proof_prompts import Prompt, padded_left, shortened
from megatron.hf.proof_record import Comparison
from megatron.hf.transformers_door import model_logits
from megatron.models.decoder import Decoder

_POSITIONS = 64
"""Positions whose logits of ours are held at once."""
_BATCH_LONGEST = 128


@torch.no_grad()
def compare_alone(model: Decoder, theirs: Any, prompts: Sequence[Prompt]) -> Iterator[Comparison]:
    """Each prompt by itself, without a mask."""
    for prompt in prompts:
        tokens = torch.tensor([prompt.tokens])
        yield compare_logits(prompt, final_hidden_of(model, tokens)[0], model, model_logits(theirs, tokens)[0])


@torch.no_grad()
def compare_padded(model: Decoder, theirs: Any, prompts: Sequence[Prompt]) -> Iterator[Comparison]:
    """Short prompts of different lengths as one batch on transformers' side, padded on the left, with an attention mask
    and the positions that `generate` makes of it; ours each by itself."""
    chosen = shortened(prompts, _BATCH_LONGEST)[:6]
    tokens, mask = padded_left(chosen)
    logits = model_logits(theirs, tokens, mask, (mask.cumsum(1) - 1).clamp(min=0))
    for row, prompt in enumerate(chosen):
        hidden = final_hidden_of(model, torch.tensor([prompt.tokens]))[0]
        yield compare_logits(prompt, hidden, model, logits[row, -len(prompt.tokens) :])


@torch.no_grad()
def final_hidden_of(model: Decoder, tokens: Tensor) -> Tensor:
    """Our hidden states behind the last norm [batch, length, hidden] of rows that are one document each."""
    hidden = model(tokens, torch.zeros_like(tokens))
    assert isinstance(hidden, Tensor)
    return hidden


def our_logits(model: Decoder, hidden: Tensor) -> Tensor:
    """Logits [..., vocab_size] of `final_hidden_of`."""
    return (hidden @ model.head_weight.t())[..., : model.shape.vocab_size]


def compare_logits(prompt: Prompt, hidden: Tensor, model: Decoder, theirs: Tensor) -> Comparison:
    """Our final hidden states [length, hidden] against their logits [length, vocabulary], a few positions at a time."""
    if theirs.shape[-1] != model.shape.vocab_size:
        raise ProofError(
            f"the exported folder gives logits for {theirs.shape[-1]} words, our model for {model.shape.vocab_size}"
        )
    targets = torch.tensor(prompt.tokens)[1:]
    worst, agreed, sums = [], 0, torch.zeros(2, dtype=torch.float64)
    for begin in range(0, len(hidden), _POSITIONS):
        a, b = our_logits(model, hidden[begin : begin + _POSITIONS]).float(), theirs[begin : begin + _POSITIONS].float()
        worst.append((a - b).abs().max())
        agreed += int((a.argmax(-1) == b.argmax(-1)).sum())
        known = targets[begin : begin + _POSITIONS]
        for number, logits in enumerate((a, b)):
            sums[number] += functional.cross_entropy(logits[: len(known)].double(), known, reduction="sum")
    ours, of_theirs = (sums / max(1, len(targets))).tolist()
    difference = float(torch.stack(worst).max())  # NaN where any is
    return Comparison(prompt.text, len(hidden), difference, abs(ours - of_theirs), ours, agreed / len(hidden))
