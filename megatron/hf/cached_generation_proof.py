"""Greedy generation with our key-value cache against transformers' `generate(use_cache=True)`, logits of every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.hf.proof_prompts import Prompt, padded_left, padded_right, shortened
from megatron.hf.proof_record import GenerationComparison, Parting
from megatron.hf.transformers_door import generate_greedily
from megatron.models.decoding import CachedDecoder

NEW_TOKENS = 16
_LONGEST = 256
_ROWS = 4
Decoding = Callable[[int, int], CachedDecoder]
"""Our model ready to decode: of (rows, tokens that a row may have)."""


def generation_prompts(prompts: Sequence[Prompt], positions: int, new_tokens: int) -> list[Prompt]:
    """A few of the prompts, of different lengths, short enough for so many new tokens in a model of `positions`; none
    where it takes no more than one."""
    longest = min(positions - new_tokens, _LONGEST)
    if longest < 1:
        return []
    by_length = {len(prompt.tokens): prompt for prompt in shortened(prompts, longest)}
    return [by_length[length] for length in sorted(by_length)[-_ROWS:]]


@torch.no_grad()
def compare_generation(
    theirs: Any, decoding: Decoding, prompts: Sequence[Prompt], new_tokens: int = NEW_TOKENS
) -> GenerationComparison:
    """Both models' greedy tokens for all prompts at once. Where they part, ours goes on with transformers' token."""
    chosen, wanted = generate_greedily(theirs, *padded_left(prompts), new_tokens)
    tokens, lengths = padded_right(prompts)
    cached = decoding(len(prompts), max(lengths) + new_tokens)
    logits = cached.extend(tokens, lengths)
    largest, agreeing, partings = 0.0, 0, []
    for step in range(new_tokens):
        # NaN stays: it is larger than nothing, and every comparison with it is false.
        difference = float((logits.float() - wanted[:, step].float()).abs().max())
        largest = difference if difference != difference or difference > largest else largest
        ours = logits.argmax(-1)
        for row in (ours != chosen[:, step]).nonzero().flatten().tolist():
            partings.append(_parting(prompts[row], step, logits[row], int(ours[row]), int(chosen[row, step])))
        agreeing += int((ours == chosen[:, step]).sum())
        if step + 1 < new_tokens:
            logits = cached.extend(chosen[:, step, None])
    return GenerationComparison(lengths, new_tokens, agreeing, largest, partings)


def _parting(prompt: Prompt, step: int, logits: Tensor, ours: int, theirs: int) -> Parting:
    return Parting(prompt.text, step, ours, theirs, float(logits[ours] - logits[theirs]))
