"""What a parity proof compares on: token ids of several lengths, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.config.model_shape import ModelShape

WHOLE_LONGEST, LAYERS_LONGEST = 2048, 256
"""Tokens of the longest prompt, where the model takes as many: of the whole proof, and layer by layer, where all
prompts and the hidden states of every layer are held at once."""
_ODD = 17


@dataclass(frozen=True)
class Prompt:
    """Token ids to compare on, and where they come from ("held-out python", "random ids")."""

    text: str
    tokens: list[int]


def prompts_from(
    texts: Mapping[str, Sequence[int]], shape: ModelShape, seed: int = 0, longest: int = WHOLE_LONGEST
) -> list[Prompt]:
    """Prompts of 1, 2, 17, half and all of the model's positions (at most `longest`), cut from each text's tokens in
    turn; of full length one from every text.

    Texts that are too short are repeated. One more prompt of random ids reaches the rare rows of the embedding; where
    there is no text, prompts of every length are random ids.
    """
    full = min(shape.max_position_embeddings, longest)
    lengths = sorted({1, min(2, full), min(_ODD, full), max(1, full // 2), full})
    prompts: list[Prompt] = []
    named = [(name, list(tokens)) for name, tokens in texts.items() if len(tokens) > 0]
    for number, length in enumerate(lengths if named else []):
        chosen = named if length == full else [named[number % len(named)]]
        for name, tokens in chosen:
            prompts.append(Prompt(name, (tokens * (length // len(tokens) + 1))[:length]))
    generator = torch.Generator().manual_seed(seed)
    of_random = [full] if named else [full, *lengths[:-1]]
    random = [
        Prompt("random ids", torch.randint(shape.vocab_size, (length,), generator=generator).tolist())
        for length in of_random
    ]
    return [*prompts, *sorted(random, key=lambda prompt: len(prompt.tokens))]


def shortened(prompts: Sequence[Prompt], longest: int) -> list[Prompt]:
    """The prompts, none longer than `longest`; what becomes equal is kept once."""
    cut = {(prompt.text, tuple(prompt.tokens[:longest])): prompt.text for prompt in prompts}
    return [Prompt(text, list(tokens)) for (text, tokens) in cut]


def padded_right(prompts: Sequence[Prompt]) -> tuple[Tensor, list[int]]:
    """(tokens int64 [prompts, longest], 0 behind each prompt's end; the lengths)."""
    lengths = [len(prompt.tokens) for prompt in prompts]
    tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : lengths[row]] = torch.tensor(prompt.tokens)
    return tokens, lengths


def padded_left(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """(tokens int64 [prompts, longest], 0 before each prompt's begin; mask, 1 for tokens), as generation wants them."""
    right, lengths = padded_right(prompts)
    width = right.shape[1]
    mask = torch.zeros_like(right)
    tokens = torch.zeros_like(right)
    for row, length in enumerate(lengths):
        tokens[row, width - length :] = right[row, :length]
        mask[row, width - length :] = 1
    return tokens, mask
