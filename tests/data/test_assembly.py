"""Samples read from files: the extension against its twin, and both against ids laid out by a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from token_files import BACKENDS, FakeFile, backend

from megatron.config.errors import DataError
from megatron.config.schema import SourceSection
from megatron.data.assembly import (
    BatchArrays,
    assemble,
    assemble_batch,
    batch_digest,
    batch_digest_twin,
    gather,
    loaded_sums,
)
from megatron.data.epoch_index import SourceOrder
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.ledger import fingerprint_word, order_sums
from megatron.data.samples import Sample
from megatron.data.source_files import SourceFiles
from megatron.data.source_stream import EpochSpan
from megatron.data.sources import OpenSource

DTYPES = ["uint8", "int8", "int16", "uint16", "int32", "int64"]


def written(prefix: Path, documents: list[list[int]], dtype: str = "uint16", longest: int = 2**31 - 1) -> Path:
    with IndexedDatasetWriter(prefix, dtype, overwrite=True, max_sequence_tokens=longest) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
    return prefix


def opened(*prefixes: Path) -> SourceFiles:
    return SourceFiles([IndexedDataset(prefix) for prefix in prefixes], (0, 1), 0)


def by_hand(documents: list[list[int]], spans: list[tuple[int, int, int, int]], places: int) -> dict[str, list[int]]:
    """One sample by a loop over its places."""
    rows: dict[str, list[int]] = {name: [] for name in ("tokens", "targets", "document_ids", "position_ids")}
    for number, (_, document, start, end) in enumerate(spans):
        for position, place in enumerate(range(start, end)):
            following = documents[document][place + 1 : place + 2]
            for name, value in zip(
                rows, (documents[document][place], *(following or [-100]), number, position), strict=True
            ):
                rows[name].append(value)
    padding = places - len(rows["tokens"])
    rows["tokens"] += [0] * padding
    rows["targets"] += [-100] * padding
    rows["document_ids"] += [len(spans)] * padding
    rows["position_ids"] += range(padding)
    return rows


def filled(rows: int, places: int) -> BatchArrays:
    """Arrays with something else in them, so that a place that is not written is seen."""
    out = BatchArrays.empty(rows, places)
    for array in vars(out).values():
        array[...] = -7
    return out


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[list[list[int]]], str, int]:
    """Documents of one to three files with a token at least in each, a dtype, and the longest sequence."""
    dtype = draw(st.sampled_from(DTYPES))
    ids = st.integers(0, min(2**31, int(np.iinfo(dtype).max)))
    document = st.lists(ids, max_size=40)
    files = draw(st.lists(st.lists(document, min_size=1, max_size=8).filter(any), min_size=1, max_size=3))
    return files, dtype, draw(st.sampled_from([3, 17, 2**31 - 1]))


@pytest.mark.parametrize("name", BACKENDS)
@given(corpus=corpora(), data=st.data())
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_of_samples_are_what_a_loop_reads(tmp_path: Path, name: str, corpus: Any, data: st.DataObject) -> None:
    files, dtype, longest = corpus
    documents = [document for file in files for document in file]
    prefixes = [written(tmp_path / f"f{i}", file, dtype, longest) for i, file in enumerate(files)]
    # files of equal content are refused in one source, so each is a source of its own file, repeated by number
    sources = [opened(prefix) for prefix in prefixes] if len(files) > 1 else [opened(*prefixes)]
    firsts = np.cumsum([0, *(len(file) for file in files)]).tolist()
    places, rows = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 3))
    chosen, spans, expected, bounds = [], [], [], [0]
    for row in range(rows):
        number = data.draw(st.integers(0, len(sources) - 1))
        own = documents[firsts[number] : firsts[number + 1]]
        sample: list[tuple[int, int, int, int]] = []
        left = places
        for document in data.draw(st.lists(st.sampled_from([i for i, d in enumerate(own) if d]), max_size=6)):
            start = data.draw(st.integers(0, len(own[document]) - 1))
            end = data.draw(st.integers(start + 1, len(own[document])))
            if end - start <= left:
                sample.append((0, document, start, end))
                left -= end - start
                bounds.append((row + 1) * places - left)
        if left:
            bounds.append((row + 1) * places)
        chosen.append(sources[number])
        spans.append(sample if data.draw(st.booleans()) else np.array(sample, dtype=np.int64).reshape(-1, 4))
        expected.append(by_hand(own, sample, places))
    out = filled(rows, places)
    with backend(name):
        found = gather(chosen, spans, out)
    assert found.dtype == np.int32 and found.tolist() == bounds
    for row, wanted in enumerate(expected):
        for field, values in wanted.items():
            assert getattr(out, field)[row].tolist() == values, field


@pytest.mark.parametrize("name", BACKENDS)
def test_documents_are_numbered_through_several_files(tmp_path: Path, name: str) -> None:
    files = opened(
        written(tmp_path / "a", [[1, 2, 3], []]), written(tmp_path / "b", [[300, 301]], "int32", 1),
        written(tmp_path / "c", [[], [7], [8, 9]], "uint8"),
    )  # fmt: skip
    out = filled(1, 6)
    with backend(name):
        bounds = gather([files], [[(0, 5, 0, 2), (0, 0, 1, 3), (0, 2, 0, 1), (3, 4, 0, 1)]], out)
    assert out.tokens.tolist() == [[8, 9, 2, 3, 300, 7]]
    assert out.targets.tolist() == [[9, -100, 3, -100, 301, -100]]
    assert bounds.tolist() == [0, 2, 4, 5, 6]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("span", "error"),
    [
        ((0, 3, 0, 1), IndexError),
        ((0, -1, 0, 1), IndexError),
        ((0, 2**62, 0, 1), IndexError),
        ((0, 0, 0, 5), IndexError),
        ((0, 0, 4, 5), IndexError),
        ((0, 0, 2**62, 2**62 + 1), IndexError),
        ((0, 1, 0, 1), IndexError),
        ((0, 0, -1, 1), ValueError),
        ((0, 0, 2, 2), ValueError),
        ((0, 0, 3, 1), ValueError),
        ((0, 0, -(2**63), 2**63 - 1), ValueError),
        ((0, 2, 0, 9), ValueError),
    ],
)
def test_spans_outside_are_refused(tmp_path: Path, name: str, span: tuple[int, ...], error: type[Exception]) -> None:
    files = opened(written(tmp_path / "a", [[1, 2, 3, 4], [], list(range(9))]))
    with backend(name), pytest.raises(error):
        gather([files], [[span]], filled(1, 8))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_file_that_changes_under_the_map_is_refused(tmp_path: Path, name: str) -> None:
    prefix = written(tmp_path / "a", [[1, 2], [3, 4, 5]])
    files = opened(prefix)
    gather([files], [[(0, 1, 0, 3)]], filled(1, 3))
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    for at in (*range(34, 42), *range(42, 58)):  # sizes and pointers of both sequences
        content[at] = 0x7F
    with Path(f"{prefix}.idx").open("r+b") as file:  # in place: the mapped pages change with it
        file.write(content)
    with backend(name), pytest.raises((DataError, IndexError, ValueError)):
        gather([files], [[(0, 1, 0, 3)]], filled(1, 3))


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    files = opened(written(tmp_path / "a", [[1, 2, 3, 4]]))
    good = BatchArrays.empty(1, 4)
    read_only = np.zeros((1, 4), np.int64)
    read_only.flags.writeable = False
    with backend("native"):
        for field, wrong in [
            ("tokens", np.zeros((1, 4), np.int32)),
            ("targets", np.zeros((1, 8), np.int64)[:, ::2]),
            ("document_ids", np.zeros((1, 3), np.int32)),
            ("position_ids", read_only),
            ("targets", np.zeros((1, 4), ">i8")),
        ]:
            with pytest.raises(ValueError, match=f"{field}|rows"):
                gather([files], [[(0, 0, 0, 4)]], BatchArrays(**{**vars(good), field: wrong}))


def test_files_that_are_not_mapped_are_read_by_the_twin() -> None:
    files = SourceFiles([FakeFile([5, 9])], (0, 1), 0)
    out = filled(1, 4)
    assert gather([files], [[(0, 1, 2, 6)]], out).tolist() == [0, 4]
    assert out.tokens.tolist() == [[1002, 1003, 1004, 1005]] and out.targets.tolist() == [[1003, 1004, 1005, 1006]]


class Backwards:
    """A rule that turns a span around; the end of a document stays last."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, list[int], bool]] = []

    def rearrange(self, place: tuple[int, int, int], ids: Any, ends: bool) -> Any:
        self.asked.append((place, ids.tolist(), ends))
        return np.concatenate([ids[: len(ids) - ends][::-1], ids[len(ids) - ends :]])


@pytest.mark.parametrize("name", BACKENDS)
def test_rearranged_spans_get_the_targets_of_their_new_order(tmp_path: Path, name: str) -> None:
    data = IndexedDataset(written(tmp_path / "a", [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10]]))
    order = SourceOrder([data], seed=1, piece_tokens=8, cache_dir=None)
    source = OpenSource("a", 3, SourceSection(data=["a"]), 8, order)
    rule, pieces = Backwards(), [EpochSpan(5, 0, 0, 2), EpochSpan(5, 0, 2, 5), EpochSpan(5, 1, 0, 4)]
    sample = Sample(0, "s", "a", 3, pieces, (1, 2), rule)  # type: ignore[arg-type]
    with backend(name):
        one = assemble(sample, source, 9)
        out = filled(2, 9)
        bounds = assemble_batch([Sample(1, "s", "a", 3, pieces), sample], {"a": source}, out)
    assert rule.asked[:2] == [((5, 0, 2), [3, 4, 5], False), ((5, 1, 0), [7, 8, 9, 10], True)]
    assert one.tokens.tolist() == [1, 2, 5, 4, 3, 9, 8, 7, 10]
    assert one.targets.tolist() == [2, 3, 4, 3, -100, 8, 7, 10, -100]
    assert one.cu_seqlens.tolist() == [0, 2, 5, 9] and one.source_id == 3
    assert out.tokens.tolist() == [[1, 2, 3, 4, 5, 7, 8, 9, 10], one.tokens.tolist()]
    assert out.targets.tolist() == [[2, 3, 4, 5, 6, 8, 9, 10, -100], one.targets.tolist()]
    assert bounds.tolist() == [0, 2, 5, 9, 11, 14, 18]


@given(st.integers(0, 2**64 - 1), st.integers(1, 70), st.integers(1, 4))
def test_the_digest_of_a_batch_is_its_twins_and_adds_up(number: int, places: int, rows: int) -> None:
    tokens = np.random.default_rng(places).integers(-(2**62), 2**62, (rows, places))
    numbers = [(number + row) % 2**64 for row in range(rows)]
    whole = batch_digest(numbers, tokens)
    assert whole == batch_digest_twin(numbers, tokens)
    parts = sum(int(batch_digest([n], tokens[row : row + 1]), 16) for row, n in enumerate(numbers))
    assert int(whole, 16) == parts % 2**64


def test_loaded_sums_of_all_ranks_are_the_streams_own() -> None:
    batch = [Sample(100 + place, "s", name, 0, []) for place, name in enumerate("abbab")]
    words = {name: fingerprint_word(name) for name in "ab"}
    cursors = [640, 64, 80, 656, 96]  # a stood at 640 and b at 64 before the batch
    fingerprints = np.array([words[sample.source] for sample in batch], dtype=np.uint64)
    own = order_sums(range(100, 105), fingerprints, cursors, 16)
    after = {"a": 672, "b": 112}
    ranks = [loaded_sums(batch, places, after, words, 16) for places in ([0, 3], [1, 2, 4])]
    assert tuple(sum(rank[i] for rank in ranks) % 2**64 for i in range(2)) == own
    twice = [loaded_sums(batch, places, after, words, 16) for places in ([0, 3, 3], [1, 2, 4])]
    assert tuple(sum(rank[i] for rank in twice) % 2**64 for i in range(2)) != own
