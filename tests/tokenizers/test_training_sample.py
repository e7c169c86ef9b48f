"""Samples hold to their weights, come again the same, and are drawn evenly. Oracle: counting."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.errors import ConfigError, DataError
from megatron.tokenizers.training_sample import (
    CHUNK_CHARACTERS,
    SampleSource,
    SourceSample,
    chunks_of,
    first_sample,
    mingled,
    random_sample,
)


def source(weight: float, texts: list[str]) -> SampleSource:
    return SampleSource(weight, lambda: iter(texts))


def lines(letter: str, count: int, length: int = 100) -> list[str]:
    return [f"{letter}{number:06d}".ljust(length - 1, ".") + "\n" for number in range(count)]


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("aé\n\r \u2028"), max_size=30).map(lambda text: text * 700))
def test_chunks_are_the_text_and_short(text: str) -> None:
    chunks = list(chunks_of(text))
    assert "".join(chunks) == text
    assert all(0 < len(chunk) <= CHUNK_CHARACTERS for chunk in chunks)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_the_first_sample_holds_to_the_weights_at_every_size(weights: list[int]) -> None:
    sources = {str(n): source(weight, lines(str(n), 1000)) for n, weight in enumerate(weights)}
    for size in (1_000, 7_300, 30_000):
        found = first_sample(sources, size)
        assert sum(sample.bytes for sample in found.values()) == -(-size // 100) * 100
        for n, weight in enumerate(weights):
            assert abs(found[str(n)].bytes - size * weight / sum(weights)) < 100 * len(weights) + 100
            assert "".join(found[str(n)].chunks) == "".join(lines(str(n), found[str(n)].documents))


def test_the_first_sample_reads_no_further_than_it_needs() -> None:
    def endless() -> Iterator[str]:
        yield from lines("a", 100)
        raise AssertionError("read on")

    found = first_sample({"a": SampleSource(1, endless), "b": source(1, lines("b", 200))}, 19_000)
    assert found["a"].bytes == found["b"].bytes == 9_500


@pytest.mark.parametrize("kind", ["first", "random"])
def test_a_dry_source_leaves_its_share_to_the_others_by_weight(kind: str) -> None:
    sources = {"a": source(1, lines("a", 10)), "b": source(1, lines("b", 2000)), "c": source(3, lines("c", 2000))}
    found = first_sample(sources, 101_000) if kind == "first" else random_sample(sources, 101_000, 7)
    assert [sample.dry for sample in found.values()] == [True, False, False]
    assert found["a"].bytes == 1_000
    assert abs(found["b"].bytes - 25_000) <= 200 and abs(found["c"].bytes - 75_000) <= 200
    few = {"a": source(1, lines("a", 10)), "b": source(2, lines("b", 5))}
    everything = first_sample(few, 10**9) if kind == "first" else random_sample(few, 10**9, 7)
    assert [(sample.bytes, sample.dry) for sample in everything.values()] == [(1000, True), (500, True)]


def test_the_random_sample_is_even_repeatable_and_keyed() -> None:
    sources = {"a": source(1, lines("a", 4000)), "b": source(1, lines("b", 4000))}
    found = random_sample(sources, 100_000, 1)
    assert found == random_sample(sources, 100_000, 1)
    other = random_sample(sources, 100_000, 2)
    assert found["a"].chunks != other["a"].chunks
    numbers = [int(chunk[1:7]) for chunk in found["a"].chunks]
    assert numbers == sorted(set(numbers)) and len(numbers) == 500 == found["a"].documents
    # 500 of 4000 drawn evenly: a quarter of them in each quarter, within 6 standard deviations of 9.06
    for quarter in range(4):
        assert abs(sum(number // 1000 == quarter for number in numbers) - 125) < 55
    assert numbers != [int(chunk[1:7]) for chunk in found["b"].chunks]


def test_mingled_gives_every_chunk_once_and_spreads_the_sources() -> None:
    samples = {"a": SourceSample(chunks=list("aaaaaaaa")), "b": SourceSample(chunks=list("bb")), "c": SourceSample()}
    assert "".join(mingled(samples)) == "aabaaaabaa"


def test_B1_weights_and_texts_are_checked() -> None:
    for weight in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="source 'a': weight"):
            first_sample({"a": source(weight, [])}, 10)
    with pytest.raises(ConfigError, match="no source"):
        random_sample({}, 10, 1)
    with pytest.raises(DataError, match="surrogate"):
        first_sample({"a": source(1, ["\ud800"])}, 10)
