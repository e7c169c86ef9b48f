"""pass@k against all ways to draw k of n, and BLEU against sacrebleu."""

from __future__ import annotations

import itertools
import random
import statistics

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from megatron.evaluation.bleu import bleu_counts, bleu_of
from megatron.evaluation.pass_at_k import mean_pass_at_k, pass_at_k


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(samples: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    draws = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_keeps_its_digits_at_many_samples() -> None:
    assert pass_at_k(10_000, 1, 1) == pytest.approx(1e-4, rel=1e-9)
    assert pass_at_k(10_000, 5_000, 100) == 1 - np.prod([(5_000 - n) / (10_000 - n) for n in range(100)])
    for wrong in ((5, 6, 1), (5, -1, 1), (5, 1, 6), (5, 1, 0)):
        with pytest.raises(ValueError):
            pass_at_k(*wrong)


def test_the_standard_error_is_that_of_a_mean_over_problems() -> None:
    counts = [(4, 0), (4, 1), (4, 4), (4, 2), (4, 0)]
    values = [pass_at_k(*pair, 2) for pair in counts]
    mean, error = mean_pass_at_k(counts, 2)
    assert mean == pytest.approx(statistics.mean(values))
    assert error == pytest.approx(statistics.stdev(values) / 5**0.5)
    assert mean_pass_at_k([(1, 1)], 1) == (1.0, None)


def test_bleu_is_that_of_sacrebleu() -> None:
    generator = random.Random(3)
    words = ["def", "f(x):", "return", "x", "+", "1", "for", "in", "range(3)"]
    for _ in range(30):
        references = [" ".join(generator.choices(words, k=generator.randint(3, 30))) for _ in range(5)]
        answers = [
            " ".join(word if generator.random() < 0.8 else generator.choice(words) for word in text.split()[:20])
            for text in references
        ]
        ours = bleu_of(np.array([bleu_counts(*pair) for pair in zip(answers, references, strict=True)], float).sum(0))
        theirs = sacrebleu.corpus_bleu(
            answers, [references], smooth_method="add-k", smooth_value=1, tokenize="none", force=True
        )
        assert 100 * float(ours) == pytest.approx(theirs.score, rel=1e-9)


def test_bleu_of_nothing_is_zero_and_of_the_same_is_one() -> None:
    text = "a b c d e f"
    assert float(bleu_of(np.array(bleu_counts(text, text), float))) == pytest.approx(1)
    for answer in ("", "x y z", "   "):
        assert float(bleu_of(np.array(bleu_counts(answer, text), float))) == 0
