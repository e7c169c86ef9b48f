"""Sampling rules against brute force over the whole distribution, and against counted frequencies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.errors import ConfigError
from megatron.generation.sampling import SamplingRules, choose, uniform

WORDS = 12


def allowed(logits: list[float], rules: SamplingRules, seen: list[int]) -> dict[int, float]:
    """Token -> probability, by the definitions, in plain Python."""
    values = list(logits)
    for token in set(seen):
        scale = rules.repetition_penalty
        values[token] = values[token] / scale if values[token] > 0 else values[token] * scale
    values = [value / rules.temperature for value in values]
    weights = [math.exp(value - max(values)) for value in values]
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    if rules.top_k:
        order = order[: rules.top_k]
    if rules.top_p < 1:
        total, sum_, kept = sum(weights[token] for token in order), 0.0, []
        for token in order:
            if sum_ / total >= rules.top_p:
                break
            kept.append(token)
            sum_ += weights[token]
        order = kept
    order = [token for token in order if weights[token] >= rules.min_p * weights[order[0]]]
    total = sum(weights[token] for token in order)
    return {token: weights[token] / total for token in order}


rules_of = st.builds(
    SamplingRules,
    temperature=st.floats(0.3, 2.0),
    top_k=st.integers(0, WORDS + 2),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.5),
    repetition_penalty=st.floats(0.5, 2.0),
)


@settings(deadline=None, max_examples=150)
@given(
    logits=st.lists(st.floats(-8, 8).map(lambda x: round(x, 3)), min_size=WORDS, max_size=WORDS, unique=True),
    rules=rules_of,
    seen=st.lists(st.integers(0, WORDS - 1), max_size=4),
)
def test_tokens_and_their_shares_are_those_of_the_definition(
    logits: list[float], rules: SamplingRules, seen: list[int]
) -> None:
    """A grid of the chance number gives each token as often as its probability says, and no token else."""
    wanted = allowed(logits, rules, seen)
    grid = 400
    chances = [(number + 0.5) / grid for number in range(grid)]
    tokens, _ = choose(torch.tensor([logits] * grid, dtype=torch.float64), rules, chances, [seen] * grid)
    counts = np.bincount(tokens.numpy(), minlength=WORDS)
    # at the edge of top_p a rounding may let one more in, or not: such cases say nothing
    edges = [sum(sorted(wanted.values(), reverse=True)[:n]) for n in range(1, len(wanted) + 1)]
    if rules.top_p < 1 and any(abs(edge - rules.top_p) < 1e-9 for edge in edges):
        return
    for token in range(WORDS):
        assert abs(counts[token] - grid * wanted.get(token, 0.0)) <= 1.0 + 1e-6
        assert token in wanted or counts[token] == 0


def test_the_edges_of_chance_give_allowed_tokens() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0, -3.0]])
    rules = SamplingRules(top_k=2)
    assert int(choose(logits, rules, [0.0])[0]) == 1
    assert int(choose(logits, rules, [1 - 2**-53])[0]) == 2


def test_temperature_nought_is_the_likeliest_and_log_probabilities_are_the_models() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    tokens, log_probabilities = choose(logits, SamplingRules(temperature=0), [0.9] * 5)
    assert torch.equal(tokens, logits.argmax(-1))
    wanted = torch.nn.functional.log_softmax(logits.double(), -1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probabilities, wanted.float())
    hot = SamplingRules(temperature=1.7, top_k=3)
    tokens, log_probabilities = choose(logits, hot, [0.5] * 5)
    wanted = torch.nn.functional.log_softmax(logits.double(), -1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probabilities, wanted.float())


def test_chance_is_even_and_keyed() -> None:
    numbers = np.array([uniform(3, f"{row}/0", step) for row in range(100) for step in range(100)])
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    expected = len(numbers) / 20
    assert float(((counts - expected) ** 2 / expected).sum()) < 45  # chi-square of 19 degrees, far out
    assert numbers.min() >= 0 and numbers.max() < 1
    assert len({uniform(0, "0/0", 0), uniform(1, "0/0", 0), uniform(0, "1/0", 0), uniform(0, "0/0", 1)}) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
    ],
)
def test_values_that_mean_nothing_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field.replace("_", "-")):
        SamplingRules(**{field: value})


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        choose(torch.tensor([[0.0, math.nan]]), SamplingRules(), [0.5])
