"""Batches as the trainer gets them: the same for every number of workers, with bounds that agree with the ids."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixed_runs import config_of, write_corpora

from megatron.data.fim import FimSentinels
from megatron.data.ledger import add_to_order
from megatron.data.loader import Batch, BatchLoader, Microbatch, validation_batches
from megatron.planner.resolve import resolve_run

STAGES: list[dict[str, Any]] = [
    {"name": "one", "samples": 40, "mixture": {"a": 1, "b": 2}, "seq_length": 16, "global_batch_size": 4},
    {"name": "two", "samples": 30, "mixture": {"a": 1, "c": 1, "d": 1}, "seq_length": 23, "global_batch_size": 5},
]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora"))


def batches(corpora: Path, micro: int = 2, **options: Any) -> list[Batch]:
    run = resolve_run(config_of(corpora, [dict(stage) for stage in STAGES]))
    with BatchLoader(run.stream(), run.sources, micro, **options) as loader:
        return list(loader)


def arrays(batch: Batch, field: str) -> list[list[int]]:
    return torch.cat([getattr(micro, field) for micro in batch.microbatches]).tolist()


def facts(batch: Batch) -> tuple[object, ...]:
    return (batch.step, batch.digest, batch.position, batch.valid_targets, batch.loaded, batch.samples_by_source)


@pytest.mark.parametrize("options", [{"prefetch": 1}, {"prefetch": 3, "workers": 4}, {"prefetch": 9, "workers": 2}])
def test_T2_the_order_does_not_depend_on_workers_or_prefetch(corpora: Path, options: dict[str, int]) -> None:
    plain, threaded = batches(corpora, prefetch=0), batches(corpora, **options)
    assert len(plain) == 16 and [facts(batch) for batch in plain] == [facts(batch) for batch in threaded]
    for one, other in zip(plain, threaded, strict=True):
        for field in ("tokens", "targets", "document_ids", "position_ids", "source_ids"):
            assert arrays(one, field) == arrays(other, field)


@pytest.mark.parametrize("micro", [1, 3, 5])
def test_T2_other_microbatches_hold_the_same_rows(corpora: Path, micro: int) -> None:
    for one, other in zip(batches(corpora, prefetch=0), batches(corpora, micro, prefetch=0), strict=True):
        assert facts(one) == facts(other)
        assert arrays(one, "tokens") == arrays(other, "tokens") and arrays(one, "targets") == arrays(other, "targets")


def check_bounds(micro: Microbatch) -> None:
    """Bounds, positions and numbers of pieces say the same."""
    bounds, (rows, length) = micro.cu_seqlens.tolist(), micro.tokens.shape
    assert micro.cu_seqlens.dtype == micro.document_ids.dtype == torch.int32 and bounds[0] == 0
    ids = micro.document_ids.tolist()
    new = [row * length + i for row in range(rows) for i in range(length) if i == 0 or ids[row][i] != ids[row][i - 1]]
    assert bounds == [*new, rows * length]
    assert micro.longest_piece == max(np.diff(bounds))
    positions = [place for start, end in zip(bounds, bounds[1:], strict=False) for place in range(end - start)]
    assert micro.position_ids.flatten().tolist() == positions


def test_bounds_and_positions_agree_with_the_pieces(corpora: Path) -> None:
    for batch in batches(corpora, 2):
        for micro in batch.microbatches:
            check_bounds(micro)
            inside = micro.document_ids[:, 1:] == micro.document_ids[:, :-1]
            assert torch.equal(micro.targets[:, :-1][inside], micro.tokens[:, 1:][inside])


def test_what_was_loaded_adds_up_to_the_streams_own_order(corpora: Path) -> None:
    order = [0, 0]
    for batch in batches(corpora, workers=2):
        add_to_order(order, batch.loaded)
        assert batch.position["order"] == "".join(f"{word:016x}" for word in order)


def test_a_loader_can_be_left_midway_and_before_it_began(corpora: Path) -> None:
    run = resolve_run(config_of(corpora, [dict(stage) for stage in STAGES]))
    with BatchLoader(run.stream(), run.sources, 2, prefetch=2, workers=3) as loader:
        assert [batch.step for batch in islice(loader, 3)] == [1, 2, 3]
    with BatchLoader(run.stream(), run.sources, 2):
        pass


@pytest.mark.parametrize("prefetch", [0, 3])
def test_an_error_of_a_reader_comes_where_its_batch_would(corpora: Path, prefetch: int) -> None:
    run = resolve_run(config_of(corpora, [dict(stage) for stage in STAGES]))
    stream, given = run.stream(), []
    good = stream.next_batch

    def broken(owned: Any = None) -> Any:
        samples = good(owned)
        if samples[0].number >= 8:
            document = samples[0].pieces[0]._replace(document=10**9)
            samples[0].pieces[0] = document
        return samples

    stream.next_batch = broken  # type: ignore[method-assign]
    with (
        BatchLoader(stream, run.sources, 2, prefetch, workers=2) as loader,
        pytest.raises(IndexError, match="10000000"),
    ):
        for batch in loader:
            given.append(batch.step)
    assert given == [1, 2]


def test_validation_windows_have_bounds_too(corpora: Path) -> None:
    run = resolve_run(config_of(corpora, [dict(stage) for stage in STAGES], validation={"fraction": "0.2"}))
    micros = validation_batches(run.sources, 16, 3, 4)
    assert micros and all(micro.tokens.shape[1] == 16 for micro in micros)
    for micro in micros:
        check_bounds(micro)


def test_at_least_one_worker_is_needed(corpora: Path) -> None:
    run = resolve_run(config_of(corpora, [dict(stage) for stage in STAGES]))
    with pytest.raises(ValueError, match="worker"):
        BatchLoader(run.stream(), run.sources, 2, workers=0)


def shared_out(corpora: Path, size: int, stages: list[dict[str, Any]], micro: int = 1) -> list[list[Batch]]:
    """Each data rank's batches, each from a stream of its own."""
    found = []
    for rank in range(size):
        run = resolve_run(
            config_of(corpora, [dict(stage) for stage in stages]), fim_sentinels=FimSentinels(253, 254, 255)
        )
        with BatchLoader(run.stream(), run.sources, micro, prefetch=2, data_rank=rank, data_size=size) as loader:
            found.append(list(loader))
    return found


EVEN: list[dict[str, Any]] = [
    {"name": "one", "samples": 48, "mixture": {"a": 1, "b": 2}, "seq_length": 16, "global_batch_size": 4},
    {
        "name": "two",
        "samples": 40,
        "mixture": {"a": 1, "c": 1, "d": 1},
        "seq_length": 23,
        "global_batch_size": 8,
        "batch_ramp": {"start": 4, "increment": 4, "over": "16 samples"},
    },
]
WITH_FIM = [EVEN[0] | {"fim": {"a": "0.5"}}, EVEN[1]]


@pytest.mark.parametrize("stages", [EVEN, WITH_FIM], ids=["plain", "fim"])
@pytest.mark.parametrize("size", [2, 4])
def test_M3_data_ranks_share_each_batch_out_in_blocks_and_keep_one_ledger(
    corpora: Path, size: int, stages: list[dict[str, Any]]
) -> None:
    (whole,) = shared_out(corpora, 1, stages)
    assert any(batch.position["stages"][0]["use"]["a"].get("displaced") for batch in whole) == (stages is WITH_FIM)
    parts = shared_out(corpora, size, stages)
    for number, batch in enumerate(whole):
        ranks = [batches[number] for batches in parts]
        for rank in ranks:
            assert rank.position == batch.position
            assert (rank.step, rank.samples, rank.tokens) == (batch.step, batch.samples, batch.tokens)
            assert rank.samples_by_source == batch.samples_by_source
            assert sum(micro.tokens.shape[0] for micro in rank.microbatches) == batch.samples // size
        for name in ("tokens", "targets", "document_ids", "source_ids", "sample_numbers"):
            assert [row for rank in ranks for row in arrays(rank, name)] == arrays(batch, name)
        assert sum(int(rank.digest, 16) for rank in ranks) % 2**64 == int(batch.digest, 16)
        assert sum(rank.valid_targets for rank in ranks) == batch.valid_targets
        for word in (0, 1):
            assert sum(rank.loaded[word] for rank in ranks) % 2**64 == batch.loaded[word]


def test_sample_numbers_count_through_the_run(corpora: Path) -> None:
    numbers = [number for batch in batches(corpora) for number in arrays(batch, "sample_numbers")]
    assert numbers == list(range(70))


def test_a_batch_that_cannot_be_shared_out_is_refused(corpora: Path) -> None:
    with pytest.raises(ValueError, match="a batch of 4 cannot be shared out equally to 3 ranks"):
        shared_out(corpora, 3, EVEN)
    run = resolve_run(config_of(corpora, [dict(stage) for stage in STAGES]))
    with pytest.raises(ValueError, match="data rank 2 is not one of 2"):
        BatchLoader(run.stream(), run.sources, 2, data_rank=2, data_size=2)
