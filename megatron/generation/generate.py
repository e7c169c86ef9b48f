"""Answers to prompts, a batch at a time: prefill, then a token a row and step, until each row is done.

All ranks run the same loop in step: the last pipeline stage chooses, and tells the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from megatron.config.errors import CheckpointError
from megatron.generation.rank_decoder import RankDecoder
from megatron.generation.sampling import SamplingRules, choose, uniform

OnToken = Callable[[int, Sequence[int]], None]
"""Called with a prompt's number in its batch and its answer so far, whenever that has grown."""
IsDone = Callable[[Sequence[int]], bool]
"""Whether an answer is to end here, asked after each token."""


@dataclass(frozen=True)
class Prompt:
    """Token ids, at least one, and a name that keys its chance."""

    key: str
    tokens: Sequence[int]


@dataclass
class Answer:
    """Token ids that were generated, an ending token not among them, and the sum of their log-probabilities.

    end: "end" (an ending token came), "stop" (`is_done` said so), "length" (max_new_tokens, or no more positions).
    """

    tokens: list[int] = field(default_factory=list)
    log_probability: float = 0.0
    end: str = "length"


@dataclass(frozen=True)
class Pace:
    """What a batch took. Seconds are of the wall clock; cache: bytes of keys and values on this rank."""

    prompt_tokens: int
    prompt_seconds: float
    new_tokens: int
    new_seconds: float
    cache: int


def generate(
    decoder: RankDecoder,
    prompts: Sequence[Prompt],
    rules: SamplingRules,
    *,
    max_new_tokens: int,
    ending: frozenset[int],
    seed: int = 0,
    is_done: IsDone = lambda answer: False,
    on_token: OnToken = lambda row, answer: None,
) -> tuple[list[Answer], Pace]:
    """An answer to each prompt, in order, the same on every rank.

    ending: tokens that end an answer. Prompts must leave room for one token below max_position_embeddings (ValueError);
    an answer ends where the model has no more positions. CheckpointError where logits are not finite.
    """
    limit = decoder.shape.max_position_embeddings
    longest = max(len(prompt.tokens) for prompt in prompts)
    if longest >= limit or min(len(prompt.tokens) for prompt in prompts) < 1:
        raise ValueError(f"prompts have 1 to {limit - 1} tokens")
    capacity = min(limit, longest + max_new_tokens)
    answers, live = [Answer() for _ in prompts], list(range(len(prompts)))
    began = time.monotonic()
    cache = decoder.begin(len(prompts), capacity)
    counts = [len(prompt.tokens) for prompt in prompts]
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : counts[row]] = torch.tensor(list(prompt.tokens))
    logits = decoder.extend(tokens, counts)
    filled, step = time.monotonic(), 0
    while live:
        chosen = _chosen(decoder, logits, rules, [prompts[row] for row in live], [answers[row] for row in live], seed)
        going: list[int] = []
        for place, (row, (token, log_probability)) in enumerate(zip(live, chosen, strict=True)):
            answer = answers[row]
            answer.log_probability += log_probability
            if token in ending:
                answer.end = "end"
                continue
            answer.tokens.append(token)
            on_token(row, answer.tokens)
            if is_done(answer.tokens):
                answer.end = "stop"
            elif len(answer.tokens) < max_new_tokens and counts[row] + len(answer.tokens) < limit:
                going.append(place)
        step += 1
        if len(going) < len(live) and going:
            decoder.keep(going)
        live, last = [live[place] for place in going], [chosen[place][0] for place in going]
        if live:
            logits = decoder.extend(torch.tensor(last)[:, None])
    new = sum(len(answer.tokens) + (answer.end == "end") for answer in answers)
    return answers, Pace(sum(counts), filled - began, new, time.monotonic() - filled, cache)


def _chosen(
    decoder: RankDecoder,
    logits: torch.Tensor | None,
    rules: SamplingRules,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    seed: int,
) -> list[tuple[int, float]]:
    """The next token of each live row and its log-probability, as the last stage chose them."""
    tokens = log_probabilities = None
    if logits is not None:
        step = [len(answer.tokens) for answer in answers]
        uniforms = [uniform(seed, prompt.key, number) for prompt, number in zip(prompts, step, strict=True)]
        seen = [[*prompt.tokens, *answer.tokens] for prompt, answer in zip(prompts, answers, strict=True)]
        try:
            tokens, log_probabilities = choose(logits, rules, uniforms, seen)
        except ValueError as error:
            raise CheckpointError(f"{error}: the weights hold NaN or infinity, or overflow in this dtype") from None
    rows = len(prompts)
    told = decoder.told(tokens, rows, torch.int64), decoder.told(log_probabilities, rows, torch.float32)
    return list(zip(told[0].tolist(), told[1].tolist(), strict=True))
