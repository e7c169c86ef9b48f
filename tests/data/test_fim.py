"""Fill-in-the-middle: spans keep their length and their content, draws are keyed, rates are met."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.errors import ConfigError
from megatron.data.fim import DISPLACED, FimRates, FimRule, FimSentinels, stage_rates
from megatron.data.mixture_words import MixtureWords

SENTINELS = FimSentinels(prefix=1000, middle=1001, suffix=1002)


def rule(rate: str = "1", spm: str = "0.5", seed: int = 7, fingerprint: str = "f") -> FimRule:
    return FimRule(seed, fingerprint, FimRates(Decimal(rate), Decimal(spm)), SENTINELS)


def rows_of(count: int, length: int = 50, epoch: int = 0) -> np.ndarray:
    starts = np.arange(count) * length
    return np.stack([np.full(count, epoch), np.arange(count) % 97, starts, starts + length], axis=1).astype(np.int64)


def put_back(ids: list[int], ends: bool) -> tuple[list[int], str]:
    """The content in its first order, read from the sentinels alone, and which order it was written in."""
    body = ids[: len(ids) - ends]
    assert body[0] == SENTINELS.prefix and Counter(body)[SENTINELS.middle] == Counter(body)[SENTINELS.suffix] == 1
    suffix_at, middle_at = body.index(SENTINELS.suffix), body.index(SENTINELS.middle)
    assert suffix_at < middle_at
    if suffix_at == 1:  # suffix first: the prefix and the middle follow in one piece
        return body[middle_at + 1 :] + body[suffix_at + 1 : middle_at], "spm"
    return body[1:suffix_at] + body[middle_at + 1 :] + body[suffix_at + 1 : middle_at], "psm"


@given(st.integers(8, 400), st.booleans(), st.integers(0, 5), st.integers(0, 10**6), st.integers(0, 10**9))
def test_a_span_keeps_its_length_its_end_and_all_but_three_tokens(
    length: int, ends: bool, epoch: int, document: int, start: int
) -> None:
    ids = np.arange(length, dtype=np.uint16)
    ids[-1] = 999 if ends else ids[-1]
    result = rule().rearrange((epoch, document, start), ids, ends).tolist()
    assert len(result) == length
    if ends:
        assert result[-1] == 999
    content, _ = put_back(result, ends)
    assert content == ids[: length - ends - DISPLACED].tolist()


def test_the_rates_are_met_and_both_orders_occur() -> None:
    rows = rows_of(20_000)
    for rate in ("0.1", "0.5", "0.9"):
        share = rule(rate).chosen(rows).mean()
        assert abs(share - float(rate)) < 0.015  # four standard errors are 0.014
    orders = Counter(
        put_back(rule(spm="0.25").rearrange((0, n, 0), np.arange(40), False).tolist(), False)[1] for n in range(4000)
    )
    looks_like_spm = 0.25 + 0.75 * (1 - (37 / 38) ** 2)  # prefix first, too, where the prefix is empty
    assert abs(orders["spm"] / 4000 - looks_like_spm) < 0.03
    assert rule("0").chosen(rows).sum() == 0 and rule("1").chosen(rows).all()
    assert not rule("1").chosen(rows_of(10, length=7)).any()


def test_M3_draws_depend_on_seed_source_epoch_and_place_alone() -> None:
    rows = rows_of(3000)
    whole = rule("0.5").chosen(rows)
    parts = np.concatenate([rule("0.5").chosen(rows[i : i + 7]) for i in range(0, 3000, 7)])
    assert (whole == parts).all()
    for other in (rule("0.5", seed=8), rule("0.5", fingerprint="g")):
        assert 0.4 < (other.chosen(rows) != whole).mean() < 0.6
    again = rule("0.5").chosen(rows_of(3000, epoch=1))
    assert 0.4 < (again != whole).mean() < 0.6  # drawn anew each epoch
    # a higher rate adds spans to those that a lower one chose: nothing else moves
    assert (rule("0.9").chosen(rows) | ~whole).all()


def test_cuts_are_uniform() -> None:
    places = Counter()
    for document in range(6000):
        ids = rule(spm="0").rearrange((0, document, 0), np.arange(13), False).tolist()
        places[ids.index(SENTINELS.suffix) - 1] += 1  # the smaller of two uniform cuts of 0..10
    for place in range(11):
        expected = ((11 - place) ** 2 - (10 - place) ** 2) / 121
        assert abs(places[place] / 6000 - expected) < 4 * (expected * (1 - expected) / 6000) ** 0.5 + 1e-9


def test_a_stage_may_say_other_rates_by_source_or_group() -> None:
    words = MixtureWords({"py": "code", "rs": "code", "web": "web"}, {"py": 1, "rs": 1, "web": 1}, {}, "stage 's'")
    own = {"py": FimRates(Decimal("0.5"), Decimal("0.1")), "web": FimRates(Decimal("0.2"), Decimal("0.5"))}
    sources = ("py", "rs", "web")
    assert stage_rates({}, own, words, sources) == own
    said = stage_rates({"code": Decimal("0.9"), "web": Decimal(0)}, own, words, sources)
    assert said == {"py": FimRates(Decimal("0.9"), Decimal("0.1")), "rs": FimRates(Decimal("0.9"), Decimal("0.5"))}
    with pytest.raises(ConfigError, match="fim names 'cod'"):
        stage_rates({"cod": Decimal(1)}, own, words, sources)
