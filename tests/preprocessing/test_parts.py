"""Parts on the disk, the shares of shards, and what the merge leaves out: against plain definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preprocessing.corpora import read_indexed

from megatron.config.errors import ConfigError, DataError
from megatron.corpora.read_options import InputFile
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.preprocessing.merge import _kept, _ranges, merge
from megatron.preprocessing.options import Shard
from megatron.preprocessing.parts import PartKey, PartWriter, open_part, publish_part, whole_parts
from megatron.preprocessing.quarantine import kind_of
from megatron.preprocessing.work_plan import block_bytes_for, shard_bounds

MIB = 1 << 20


def test_a_part_gives_back_what_was_put_in(tmp_path: Path) -> None:
    key = PartKey(3, 14)
    with PartWriter(tmp_path, key) as writer:
        for low in (0, 50, 53):
            writer.add_ids(np.arange(low, low + 50, dtype=np.uint16))
        signatures = np.arange(6, dtype=np.uint64).reshape(3, 2)
        writer.finish({"tokens": 150}, {"lengths": np.array([1, 2, 147]), "exact": signatures}, b"{}\n")
    assert open_part(tmp_path, key) is None and whole_parts(tmp_path) == 0
    publish_part(tmp_path, key)
    part = open_part(tmp_path, key)
    assert part is not None and whole_parts(tmp_path) == 1 and part.summary["tokens"] == 150
    chunks = list(part.id_chunks(np.dtype(np.uint16)))
    assert np.concatenate(chunks).tolist() == [*range(50), *range(50, 100), *range(53, 103)]
    assert part.array("lengths").tolist() == [1, 2, 147]
    assert part.array("exact").dtype == np.uint64 and part.array("exact").tolist() == signatures.tolist()
    assert part.quarantine() == b"{}\n" and part.has("exact") and not part.has("near")
    content = part.path.read_bytes()
    for cut in (0, 1, 10, len(content) // 2, len(content) - 1):
        part.path.write_bytes(content[:cut])
        assert open_part(tmp_path, key) is None


def test_a_part_left_by_an_error_is_gone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), PartWriter(tmp_path, PartKey(0, 0)) as writer:
        writer.add_ids(np.arange(9, dtype=np.int32))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=20),
    st.lists(st.integers(1, 12), max_size=30),
)
def test_documents_are_left_out_wherever_chunks_are_cut(documents: list[tuple[int, bool]], steps: list[int]) -> None:
    lengths = np.array([length for length, _ in documents])
    keep = np.array([kept for _, kept in documents])
    ids = np.arange(lengths.sum())
    cuts = [cut for cut in np.cumsum(steps).tolist() if cut < len(ids)]
    chunks = np.split(ids, cuts)
    ends = np.cumsum(lengths)
    expected = [
        i for end, (length, kept) in zip(ends, documents, strict=True) if kept for i in range(end - length, end)
    ]
    assert [i for chunk in _kept(iter(chunks), lengths, keep) for i in chunk] == expected


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.txt"])), max_size=12),
    st.integers(1, 9),
    st.integers(1, 15),
)
def test_shards_cover_the_corpus_once_in_order(files: list[tuple[int, str]], count: int, block_bytes: int) -> None:
    inputs = [InputFile(name, name, "text" if "txt" in name else "json-lines", size) for size, name in files]
    bounds = [shard_bounds(inputs, block_bytes, Shard(number, count)) for number in range(1, count + 1)]
    assert bounds[-1][1] == (len(inputs), 0) and bounds[0][0] <= (0, 0)
    for (low, high), (following, _) in zip(bounds, bounds[1:], strict=False):
        assert low <= high == following
    for key in {key for pair in bounds for key in pair if key.block_number}:
        assert inputs[key.file_number].path == "a.jsonl"  # no other can be read from the middle


def test_shards_of_one_large_file_are_of_one_size() -> None:
    inputs = [InputFile("a.jsonl", "a", "json-lines", 640 * MIB)]
    bounds = [shard_bounds(inputs, 10 * MIB, Shard(number, 4)) for number in range(1, 5)]
    assert [low.block_number for low, _ in bounds] == [0, 16, 32, 48]


def test_blocks_are_of_a_size_that_leaves_few_parts() -> None:
    assert block_bytes_for(0) == block_bytes_for(100 * MIB) == 4 * MIB
    assert block_bytes_for(640 * MIB) == 10 * MIB
    assert block_bytes_for(1 << 40) == 64 * MIB
    assert block_bytes_for(10 << 40) == 640 * MIB


def test_shard_words() -> None:
    assert (Shard.parse("3/8"), str(Shard(3, 8))) == (Shard(3, 8), "3/8")
    with pytest.raises(ConfigError, match="from 1 to N"):
        Shard.parse("0/8")
    assert _ranges([1, 2, 3, 5, 8, 9]) == "1-3,5,8-9"


@pytest.mark.parametrize(
    "reason, kind",
    [
        ("field 'text': a string is expected, this is null", "field 'text': a string is expected"),
        ("not JSON: Expecting value at column 7", "not JSON"),
        ("byte 17 (0x80) is not UTF-8: invalid start byte. Convert it", "byte # is not UTF-8"),
        ("the line has 900 bytes, more than 10: raise it", "the line has # bytes"),
    ],
)
def test_reasons_are_counted_without_what_is_particular(reason: str, kind: str) -> None:
    assert kind_of(reason) == kind


def test_tokens_and_lengths_may_come_apart(tmp_path: Path) -> None:
    """As the merge writes them; a document longer than a sequence may be is several sequences of one document."""
    with IndexedDatasetWriter(tmp_path / "p", np.uint16, max_sequence_tokens=4) as writer:
        writer.write_tokens(np.arange(13, dtype=np.uint16), 12)
        writer.write_tokens(np.arange(13, 20, dtype=np.uint16), 19)
        writer.end_documents(np.array([3, 9, 4, 0]))
        writer.end_documents(np.array([4]))
    expected = [[0, 1, 2], list(range(3, 12)), [12, 13, 14, 15], [], [16, 17, 18, 19]]
    assert read_indexed(tmp_path / "p") == expected
    data = IndexedDataset(tmp_path / "p")
    assert [data.tokens(d).tolist() for d in range(5)] == expected
    with pytest.raises(ValueError, match="3 tokens, and 4"), IndexedDatasetWriter(tmp_path / "q", np.uint16) as writer:
        writer.write_tokens(np.arange(4, dtype=np.uint16), 3)
        writer.end_documents(np.array([3]))
    assert not list(tmp_path.glob("q*"))


def test_a_merge_without_parts_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no parts are here to merge"):
        merge(tmp_path / "p")
    assert not list(tmp_path.iterdir())
