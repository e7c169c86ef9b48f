"""Two ledgers side by side, and what one repeats, against sets of the tokens themselves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron.data.ledger import Ledger, SourceRecord, SourceUse, StageRecord
from megatron.planner.ledger_sides import repeated_tokens, side_by_side, totals_by_source

EPOCH = 40


def ledger(stages: list[dict[str, SourceUse]], epoch: int = EPOCH, ends: dict[str, int] | None = None) -> Ledger:
    made = Ledger(1, "", "")
    for name in sorted({name for use in stages for name in use}):
        cursor = {"cursor": ends[name]} if ends else {}
        made.sources[name] = SourceRecord("text", name, epoch, epoch, cursor=cursor)
    for number, use in enumerate(stages):
        samples = sum(taken.samples for taken in use.values())
        weights = {"denominator": 1, "segments": [{"start": 0, "weights": dict.fromkeys(use, 1)}]}
        made.stages.append(
            StageRecord(
                f"stage{number}",
                0,
                0,
                samples,
                [[0, 1, 1]],
                "",
                "continue",
                weights,
                {},
                {},
                {},
                {},
                {},
                samples=samples,
                use=use,
            )  # fmt: skip
        )
    return made


@given(st.lists(st.tuples(st.integers(0, 70), st.integers(1, 50)), min_size=1, max_size=5))
def test_repeated_tokens_are_those_that_a_set_of_places_already_holds(spans: list[tuple[int, int]]) -> None:
    """A stream goes on epoch by epoch: a place beyond the first is a token that was there before, if the first was
    taken whole; so only streams that begin at 0 or stay within an epoch are told exactly, as runs' are."""
    spans = [(start, count) for start, count in spans if start + count <= EPOCH] or [(0, 5)]
    uses = [{"web": SourceUse(count, count, start={"cursor": start})} for start, count in spans]
    seen: set[int] = set()
    again = 0
    for start, count in spans:
        for place in range(start, start + count):
            again += place in seen
            seen.add(place)
    assert repeated_tokens(ledger(uses, ends={"web": spans[-1][0] + spans[-1][1]})) == {"web": again}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_a_stream_that_goes_on_repeats_what_is_beyond_an_epoch(counts: list[int]) -> None:
    uses, at = [], 0
    for count in counts:
        uses.append({"web": SourceUse(count, count, start={"cursor": at})})
        at += count
    assert repeated_tokens(ledger(uses, ends={"web": at})) == {"web": max(0, at - EPOCH)}


def test_what_a_stage_passed_over_is_no_repeat() -> None:
    """A packed stage that leaves the rest of a block behind, and a padded one that cuts documents."""
    before = [
        {"web": SourceUse(10, 10, start={"cursor": 0})},
        {"web": SourceUse(10, 10, skipped=4, start={"cursor": 14})},  # four were passed over before it began
        {"web": SourceUse(5, 5, start={"cursor": 24})},
    ]
    assert repeated_tokens(ledger(before, ends={"web": 29})) == {"web": 0}
    within = [
        {"web": SourceUse(10, 10, skipped=6, start={"cursor": 0})},
        {"web": SourceUse(10, 10, start={"cursor": 16})},
    ]
    assert repeated_tokens(ledger(within, ends={"web": 26})) == {"web": 0}


def test_sides_and_totals() -> None:
    a = ledger([{"web": SourceUse(3, 30), "code": SourceUse(1, 10)}, {"web": SourceUse(2, 20)}])
    b = ledger([{"web": SourceUse(5, 50)}])
    assert totals_by_source(a) == {"web": (5, 50), "code": (1, 10)}
    assert totals_by_source(b) == {"web": (5, 50)}
    rows = {(row["training_stage"], row["source"]): row for row in side_by_side(a, b)}
    assert rows["stage0", "web"]["samples_a"] == 3
    assert rows["stage0", "web"]["samples_b"] == 5
    assert rows["stage0", "code"]["tokens_b"] == 0
    assert rows["stage1", "web"]["tokens_a"] == 20
    assert rows["stage1", "web"]["epochs_b"] == 0.0
