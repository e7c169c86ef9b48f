"""Places in words lead to the sample that they name."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_runs import run_config, write_corpus
from planned_runs import planned

from megatron.config.errors import ConfigError
from megatron.data.fim import FimSentinels
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.schedule import Schedule
from megatron.planner.resolve import resolve_run
from megatron.planner.sample_drawing import abbreviated, documents_asked, trained_ids, visible
from megatron.planner.sample_places import sample_range


@pytest.fixture(scope="module")
def schedule(tmp_path_factory: pytest.TempPathFactory) -> Schedule:
    return resolve_run(planned(tmp_path_factory.mktemp("plan"))).schedule  # samples of 16, batches of 4, 193,600 tokens


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("0:10", (0, 10)),
        ("77:", (77, 12_100)),
        ("77:+3", (77, 80)),
        ("160 tokens:+2", (10, 12)),
        ("64K tokens:+2", (4000, 4002)),
        ("63999 tokens:64001 tokens", (3999, 4000)),
        ("15 tokens:+1", (0, 1)),
        ("16 tokens:+1", (1, 2)),
        ("3 steps:+1 steps", (12, 16)),
        ("1000 steps:+2 steps", (4000, 4008)),
        ("50%:+10", (6050, 6060)),
        ("12099:+50", (12_099, 12_100)),
        ("12:+32 tokens", (12, 14)),
    ],
)
def test_a_place_is_the_sample_that_holds_it(schedule: Schedule, words: str, expected: tuple[int, int]) -> None:
    assert sample_range(words, schedule) == expected


@pytest.mark.parametrize("words", ["5", ":5", "x:y", "5:4", "12100:", "2T tokens:+5", "-3:4", "1:+x"])
def test_B1_words_that_name_no_place_are_refused(schedule: Schedule, words: str) -> None:
    with pytest.raises(ConfigError, match="--samples"):
        sample_range(words, schedule)


def test_every_token_is_in_the_sample_that_is_named(schedule: Schedule) -> None:
    for token in range(0, 193_600, 977):
        first, _ = sample_range(f"{token} tokens:+1", schedule)
        assert first == token // 16


def test_text_is_shown_with_nothing_hidden() -> None:
    assert visible("a\tb\n\\n\x07é\u200b\U0001f600") == "a\\tb\\n\\\\n\\x07é\\u200b\U0001f600"
    assert abbreviated("x" * 30, 10, 5) == "x" * 30
    assert abbreviated("x" * 100 + "y" * 100, 10, 5) == "x" * 10 + " … 185 characters … " + "y" * 5


def test_rearranged_ids_are_the_piece_with_three_sentinels_in_place_of_three_tokens(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", 60, 3)
    stage = {"name": "one", "samples": 80, "mixture": {"text": 1}, "fim": {"text": "1"}}
    config = run_config(tmp_path, {"text": {"data": [str(tmp_path / "text")], "max_epochs": 9}}, [stage])
    run = resolve_run(config, fim_sentinels=FimSentinels(300, 301, 302))
    file = IndexedDataset(tmp_path / "text")
    seen = 0
    for sample in run.stream().next_batch() + run.stream_from_start().next_batch():
        for number, (ids, piece) in enumerate(
            zip(trained_ids(sample, run.sources["text"]), sample.pieces, strict=True)
        ):
            original = file.tokens(piece.document)[piece.start : piece.end].tolist()
            if number not in sample.fim:
                assert ids == original
                continue
            seen += 1
            assert len(ids) == len(original) and sorted(ids)[-3:] == [300, 301, 302]
            ends = piece.end == file.document_length(piece.document)
            assert sorted(ids)[:-3] == sorted(original[: -3 - ends] + original[len(original) - ends :])
    assert seen >= 4


@pytest.mark.parametrize(
    ("words", "expected"),
    [("a", ("a", 0, None)), ("a:3:9", ("a", 3, 9)), ("a:3:", ("a", 3, None)), ("a:b:1:2", ("a:b", 1, 2))],
)
def test_documents_are_asked_for_by_source(words: str, expected: tuple[str, int, int | None]) -> None:
    assert documents_asked(words, ["a", "a:b", "c"]) == expected


@pytest.mark.parametrize("words", ["d", "a:", "a:3", "a:9:3", "a:x:3", "ab"])
def test_B1_documents_of_no_source_or_range_are_refused(words: str) -> None:
    with pytest.raises(ConfigError, match="--documents"):
        documents_asked(words, ["a", "a:b", "c"])
