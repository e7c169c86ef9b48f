"""Targets of masked samples: the extension against its twin, and both against ids and bits laid out by a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from masked_runs import write_masked
from token_files import BACKENDS, backend

from megatron.config.errors import DataError
from megatron.data.assembly import BatchArrays, gather
from megatron.data.document_stream import DocumentRule
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.source_files import SourceFiles

Documents = list[tuple[list[int], list[int]]]


@st.composite
def files_of_documents(draw: st.DrawFn) -> list[Documents]:
    """One to three files of documents with a bit for each token; each file has a token at least."""
    token = st.tuples(st.integers(0, 255), st.integers(0, 1))
    document = st.lists(token, max_size=40).map(lambda pairs: ([t for t, _ in pairs], [b for _, b in pairs]))
    file = st.lists(document, min_size=1, max_size=8).filter(lambda made: any(ids for ids, _ in made))
    return draw(st.lists(file, min_size=1, max_size=3, unique_by=repr))


def opened(folder: Path, files: list[Documents], longest: int = 2**31 - 1) -> SourceFiles:
    prefixes = [write_masked(folder / f"f{i}", file, "uint16", longest) for i, file in enumerate(files)]
    return SourceFiles([IndexedDataset(prefix) for prefix in prefixes], (0, 1), 0)


@pytest.mark.parametrize("name", BACKENDS)
@given(files=files_of_documents(), longest=st.sampled_from([3, 17, 2**31 - 1]), data=st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_target_counts_where_its_own_bit_is_set(
    tmp_path: Path, name: str, files: list[Documents], longest: int, data: st.DataObject
) -> None:
    documents = [document for file in files for document in file]
    source = opened(tmp_path, files, longest)
    places, rows = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 3))
    masked = [row for row in range(rows) if data.draw(st.booleans())]
    samples, wanted = [], []
    for row in range(rows):
        spans: list[tuple[int, int, int, int]] = []
        targets: list[int] = []
        for document in data.draw(
            st.lists(st.sampled_from([i for i, (d, _) in enumerate(documents) if d]), max_size=6)
        ):
            ids, bits = documents[document]
            start = data.draw(st.integers(0, len(ids) - 1))
            end = data.draw(st.integers(start + 1, len(ids)))
            if len(targets) + end - start > places:
                continue
            spans.append((0, document, start, end))
            for place in range(start, end):
                counts = place + 1 < len(ids) and (row not in masked or bits[place + 1])
                targets.append(ids[place + 1] if counts else -100)
        samples.append(spans)
        wanted.append(targets + [-100] * (places - len(targets)))
    out = BatchArrays.empty(rows, places)
    plain = BatchArrays.empty(rows, places)
    with backend(name):
        bounds = gather([source] * rows, samples, out, masked)
        assert bounds.tolist() == gather([source] * rows, samples, plain).tolist()
    assert out.targets.tolist() == wanted
    for field in ("tokens", "document_ids", "position_ids"):
        assert (getattr(out, field) == getattr(plain, field)).all(), "inputs are those of pre-training"


@given(files=files_of_documents(), kept=st.integers(1, 45), data=st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_loss_tokens_are_the_targets_of_what_is_trained_on(
    tmp_path: Path, files: list[Documents], kept: int, data: st.DataObject
) -> None:
    share = data.draw(st.sampled_from([(0, 1), (0, "0.5"), ("0.3", 1)]))
    opened(tmp_path, files)
    from fractions import Fraction

    slice_ = Fraction(share[0]), Fraction(share[1])
    held = Fraction(data.draw(st.sampled_from(["0", "0.3"])))
    source = SourceFiles([IndexedDataset(tmp_path / f"f{i}") for i in range(len(files))], slice_, held)
    documents = [document for file in files for document in file]
    out = set(source.held_out_documents().tolist())
    trained = [documents[n] for n in range(source.first, source.last) if n not in out]
    assert source.loss_tokens(True) == sum(sum(bits[1:]) for _, bits in trained)
    assert source.loss_tokens(False) == sum(max(0, len(ids) - 1) for ids, _ in trained)
    # padded: a sample of `kept` places has the targets of its first `kept` places
    whole = [document for document in trained if 2 <= len(document[0]) <= kept]
    assert source.loss_tokens(True, DocumentRule(kept, "drop")) == sum(sum(bits[1:]) for _, bits in whole)
    cut = [document for document in trained if len(document[0]) >= 2]
    assert source.loss_tokens(True, DocumentRule(kept, "truncate")) == sum(sum(bits[1 : kept + 1]) for _, bits in cut)


def test_counting_goes_on_where_a_part_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    file = [([7] * n, rng.integers(0, 2, n).tolist()) for n in rng.integers(0, 60, 200).tolist()]
    source = opened(tmp_path, [file])
    monkeypatch.setattr("megatron.data.loss_mask._COUNTED_AT_ONCE", 50)
    assert source.targets_by_document(True).tolist() == [sum(bits[1:]) for _, bits in file]


def test_masks_that_do_not_fit_their_tokens_are_refused(tmp_path: Path) -> None:
    source = opened(tmp_path, [[([1] * 40, [1] * 40)]])
    with backend("native"):
        from megatron.data.native import native

        extension: Any = native()
        arrays = [file.arrays for file in source.files]  # type: ignore[attr-defined]
        for masks in ([np.zeros(4, np.uint8)], [np.zeros(5, np.uint8)] * 2, [np.zeros(10, np.uint8)[::2]]):
            with pytest.raises(ValueError, match="mask"):
                extension.TokenFiles(arrays, masks)
        extension.TokenFiles(arrays, [np.zeros(5, np.uint8)])


def test_a_damaged_mask_is_found_when_it_is_first_read(tmp_path: Path) -> None:
    source = opened(tmp_path, [[([1] * 40, [1] * 40)]])
    (tmp_path / "f0.mask").write_bytes(b"\xff\xff\xfe\xff\xff")
    with pytest.raises(DataError, match="mask"):
        gather([source], [[(0, 0, 0, 8)]], BatchArrays.empty(1, 8), [0])
