"""Hooks on their own: what was loaded is compared with what the ledger says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron.data.ledger import hash_words
from megatron.trainer.hooks import CompareOrder


def step(number: int, loaded: tuple[int, int], order: list[int]) -> SimpleNamespace:
    batch = SimpleNamespace(loaded=loaded, position={"order": hash_words(order)})
    return SimpleNamespace(state=SimpleNamespace(step=number), batch=batch)


def test_M3_other_samples_than_the_ledger_says_stop_the_run() -> None:
    compare = CompareOrder([5, 2**64 - 1])
    compare(step(1, (7, 3), [12, 2]))  # sums wrap at 2^64
    compare(step(2, (1, 1), [13, 3]))
    with pytest.raises(RuntimeError, match="step 3: the samples that were loaded have the order hash"):
        compare(step(3, (1, 1), [14, 5]))
