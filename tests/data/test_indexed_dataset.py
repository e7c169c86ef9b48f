"""Megatron's .bin/.idx, both ways. The oracle is the format's definition, laid out by hand with `struct`."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.config.errors import ConfigError, DataError
from megatron.data.indexed_dataset import IndexedDataset, check_vocab
from megatron.data.indexed_format import dtype_for_vocab
from megatron.data.indexed_writer import IndexedDatasetWriter

HEADER_BYTES = 34
CODES = {"B": 1, "b": 2, "h": 3, "i": 4, "q": 5, "H": 8}


def by_hand(
    prefix: Path,
    sequences: list[list[int]],
    document_index: list[int] | None = None,
    letter: str = "H",
    **lies: object,
) -> Path:
    """The two files as the format defines them; `lies` overwrite single fields."""
    width = struct.calcsize("<" + letter)
    sizes = lies.get("sizes", [len(s) for s in sequences])
    pointers, at = [], 0
    for sequence in sequences:
        pointers.append(at)
        at += width * len(sequence)
    pointers = lies.get("pointers", pointers)
    index = document_index if document_index is not None else list(range(len(sequences) + 1))
    Path(f"{prefix}.idx").write_bytes(
        lies.get("magic", b"MMIDIDX\x00\x00")
        + struct.pack("<Q", lies.get("version", 1))
        + struct.pack("<B", lies.get("code", CODES[letter]))
        + struct.pack("<Q", lies.get("sequence_count", len(sequences)))
        + struct.pack("<Q", lies.get("index_count", len(index)))
        + struct.pack(f"<{len(sizes)}i", *sizes)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(index)}q", *index)
        + lies.get("tail", b"")
    )
    ids = [i for sequence in sequences for i in sequence]
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(ids)}{letter}", *ids))
    return prefix


@pytest.mark.parametrize("letter", sorted(CODES))
def test_reads_files_laid_out_by_hand(tmp_path: Path, letter: str) -> None:
    data = IndexedDataset(by_hand(tmp_path / "a.b", [[1, 2, 3], [], [4], [5, 6]], letter=letter))
    assert (data.document_count, data.token_count, len(data)) == (4, 6, 4)
    assert data.dtype == np.dtype("<" + letter)
    assert data.document_lengths().tolist() == [3, 0, 1, 2]
    assert data.document_starts().tolist() == [0, 3, 3, 4, 6]
    assert [data.tokens(d).tolist() for d in range(4)] == [[1, 2, 3], [], [4], [5, 6]]
    assert data.tokens(0, 1, 3).tolist() == [2, 3]
    assert data.document_lengths().dtype == np.int32  # the mapped sizes themselves
    assert data.document_starts().dtype == np.int64
    assert data.manifest is None


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    prefix = by_hand(tmp_path / "p", [[1, 2], [3], [4, 5], [6]], document_index=[0, 2, 2, 3, 4])
    data = IndexedDataset(prefix)
    assert [data.tokens(d).tolist() for d in range(4)] == [[1, 2, 3], [], [4, 5], [6]]
    assert data.document_lengths().tolist() == [3, 0, 2, 1]
    assert [data.document_length(d) for d in range(4)] == [3, 0, 2, 1]


def test_tokens_are_views_and_bounds_are_checked(tmp_path: Path) -> None:
    data = IndexedDataset(by_hand(tmp_path / "p", [[1, 2, 3], [4]]))
    view = data.tokens(0)
    assert view.base is not None and not view.flags.writeable
    for document, start, end in [(2, 0, 0), (-1, 0, 0), (0, 0, 4), (0, 2, 1), (0, -1, 1)]:
        with pytest.raises(IndexError):
            data.tokens(document, start, end)


def test_finds_megatrons_suffix_and_says_what_is_missing(tmp_path: Path) -> None:
    by_hand(tmp_path / "code_text_document", [[1]])
    assert IndexedDataset(tmp_path / "code").token_count == 1
    assert pickle.loads(pickle.dumps(IndexedDataset(tmp_path / "code"))).token_count == 1
    with pytest.raises(DataError, match="no such file.*preprocess_data"):
        IndexedDataset(tmp_path / "none")
    with pytest.raises(DataError, match="without its suffix"):
        IndexedDataset(tmp_path / "code_text_document.bin")
    (tmp_path / "half.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match="did not finish"):
        IndexedDataset(tmp_path / "half")
    Path(tmp_path / "code_text_document.bin").unlink()
    with pytest.raises(DataError, match=r"\.bin: no such file"):
        IndexedDataset(tmp_path / "code")


SEQUENCES = [[1, 2, 3], [4, 5], [6]]


@pytest.mark.parametrize(
    ("lies", "said"),
    [
        ({"magic": b"MMIDIDY\x00\x00"}, "magic"),
        ({"version": 2}, "version"),
        ({"code": 0}, "dtype code"),
        ({"code": 9}, "dtype code"),
        ({"code": 6}, "float64 cannot hold token ids"),
        ({"code": 7}, "float32 cannot hold token ids"),
        ({"code": 1}, "pointer of sequence 1"),
        ({"code": 4}, "pointer of sequence 1"),
        ({"sequence_count": 0}, "no documents"),
        ({"sequence_count": 4}, "file size"),
        ({"sequence_count": 2**63}, "file size"),
        ({"index_count": 1}, "document index count"),
        ({"index_count": 5}, "file size"),
        ({"index_count": 2**64 - 1}, "file size"),
        ({"tail": b"\0"}, "file size"),
        ({"tail": b"\0\0\0"}, "multimodal"),
        ({"sizes": [3, -2, 1]}, "size of sequence 1 = -2"),
        ({"sizes": [3, 2, 2]}, "needs 14"),
        ({"sizes": [3, 2, 0]}, "not a pair"),
        ({"sizes": [2, 3, 1]}, "pointer of sequence 1"),
        ({"sizes": [2**31 - 1] * 3}, "pointer of sequence 1"),
        ({"pointers": [0, 10, 6]}, "pointer of sequence 1"),
        ({"pointers": [2, 6, 10]}, "pointer of sequence 0"),
        ({"pointers": [0, 6, -1]}, "pointer of sequence 2"),
        ({"pointers": [0, 6, 2**62]}, "pointer of sequence 2"),
        ({"document_index": [1, 1, 2, 3]}, "first must be 0"),
        ({"document_index": [0, 1, 2, 2]}, "must be the sequence count 3"),
        ({"document_index": [0, 1, 2, 9]}, "must be the sequence count 3"),
        ({"document_index": [0, 2, 1, 3]}, "document index 2 = 1"),
        ({"document_index": [0, -1, 2, 3]}, "document index 1 = -1"),
        ({"document_index": [0, 7, 2, 3]}, "document index 2"),
    ],
)
def test_B1_a_lying_idx_is_named(tmp_path: Path, lies: dict, said: str) -> None:
    prefix = by_hand(tmp_path / "p", SEQUENCES, **lies)
    with pytest.raises(DataError, match=said) as caught:
        IndexedDataset(prefix)
    assert f"{prefix}.idx" in str(caught.value) or f"{prefix}.bin" in str(caught.value)
    assert caught.value.exit_code == 3


def test_B1_every_truncation_is_an_error(tmp_path: Path) -> None:
    prefix = by_hand(tmp_path / "p", SEQUENCES)
    for suffix in (".idx", ".bin"):
        whole = Path(f"{prefix}{suffix}").read_bytes()
        for length in range(len(whole)):
            Path(f"{prefix}{suffix}").write_bytes(whole[:length])
            with pytest.raises(DataError):
                IndexedDataset(prefix)
        Path(f"{prefix}{suffix}").write_bytes(whole)
    assert IndexedDataset(prefix).token_count == 6


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, HEADER_BYTES + 6 * 4 + 13 * 8), byte=st.integers(0, 255), cut=st.integers(0, 40))
def test_B1_fuzzed_idx_is_refused_or_reads_within_bounds(tmp_path: Path, place: int, byte: int, cut: int) -> None:
    prefix = by_hand(tmp_path / "p", [[1, 2], [3], [], [4, 5, 6], [7], [8]])
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    content[place % len(content)] = byte
    Path(f"{prefix}.idx").write_bytes(bytes(content[: len(content) - cut if cut < 20 else None]))
    try:
        data = IndexedDataset(prefix)
    except DataError:
        return
    read = [i for d in range(data.document_count) for i in data.tokens(d).tolist()]
    assert len(read) == data.token_count == sum(data.document_lengths())


def test_all_documents_empty_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        IndexedDataset(by_hand(tmp_path / "p", [[], []]))


def documents() -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(st.integers(0, 65499), max_size=9), min_size=1, max_size=12).filter(lambda d: any(d))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(docs=documents(), dtype=st.sampled_from(["uint16", "int32", "int64"]))
def test_writes_what_the_format_defines(tmp_path: Path, docs: list[list[int]], dtype: str) -> None:
    with IndexedDatasetWriter(tmp_path / "w", dtype, overwrite=True) as writer:
        for document in docs:
            writer.add_document(document)
    by_hand(tmp_path / "h", docs, letter={"uint16": "H", "int32": "i", "int64": "q"}[dtype])
    for suffix in (".idx", ".bin"):
        assert (tmp_path / f"w{suffix}").read_bytes() == (tmp_path / f"h{suffix}").read_bytes()
    data = IndexedDataset(tmp_path / "w")
    assert [data.tokens(d).tolist() for d in range(len(docs))] == docs
    assert data.manifest is not None
    for suffix, field in ((".bin", "bin_sha256"), (".idx", "idx_sha256")):
        assert data.manifest[field] == hashlib.sha256((tmp_path / f"w{suffix}").read_bytes()).hexdigest()
    assert data.manifest["max_token_id"] == max(i for d in docs for i in d)
    assert data.manifest["tokens"] == sum(map(len, docs)) and data.manifest["documents"] == len(docs)


def test_batches_equal_single_documents(tmp_path: Path) -> None:
    docs = [[1, 2, 3], [], [9]]
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as one:
        for document in docs:
            one.add_document(document)
    with IndexedDatasetWriter(tmp_path / "b", np.uint16) as many:
        many.add_documents(np.array([1, 2, 3, 9], np.uint16), [3, 0, 1])
    for suffix in (".idx", ".bin", ".json"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_a_document_longer_than_a_sequence_may_be_is_several(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "p", np.uint16, max_sequence_tokens=4) as writer:
        writer.add_document(list(range(11)))
        writer.add_document([7])
    by_hand(tmp_path / "h", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10], [7]], document_index=[0, 3, 4])
    assert (tmp_path / "p.idx").read_bytes() == (tmp_path / "h.idx").read_bytes()
    data = IndexedDataset(tmp_path / "p")
    assert data.tokens(0).tolist() == list(range(11)) and data.document_lengths().tolist() == [11, 1]


def test_nothing_is_published_after_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="65536 does not fit"),
        IndexedDatasetWriter(tmp_path / "p", np.uint16) as writer,
    ):
        writer.add_document([1])
        writer.add_document([65536])
    with pytest.raises(DataError, match="-1 does not fit"), IndexedDatasetWriter(tmp_path / "p", np.int32) as writer:
        writer.add_document([-1])
    with pytest.raises(DataError, match="empty"), IndexedDatasetWriter(tmp_path / "p", np.int32):
        pass
    with pytest.raises(DataError, match="float32"):
        IndexedDatasetWriter(tmp_path / "p", np.float32)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_and_second_writer_are_refused(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "p", np.uint16) as writer:
        writer.add_document([1])
    with pytest.raises(ConfigError, match="overwrite"):
        IndexedDatasetWriter(tmp_path / "p", np.uint16)
    with IndexedDatasetWriter(tmp_path / "p", np.uint16, overwrite=True) as writer:
        with pytest.raises(DataError, match="another process"):
            IndexedDatasetWriter(tmp_path / "p", np.uint16, overwrite=True)
        assert IndexedDataset(tmp_path / "p").tokens(0).tolist() == [1]  # until the new one is whole
        writer.add_document([2])
    assert IndexedDataset(tmp_path / "p").tokens(0).tolist() == [2]


def test_fingerprint_is_of_the_content_not_the_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            writer.add_document([1, 2])
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document([1, 3])
    prints = [IndexedDataset(tmp_path / name).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]
    for name in "abc":
        (tmp_path / f"{name}.json").unlink()
    sampled = [IndexedDataset(tmp_path / name).fingerprint for name in "abc"]
    assert sampled[0] == sampled[1] != sampled[2]


def test_sampled_fingerprint_sees_ends_and_length(tmp_path: Path) -> None:
    prints = set()
    for first, last, count in [(0, 0, 500_000), (1, 0, 500_000), (0, 1, 500_000), (0, 0, 500_001)]:
        ids = np.zeros(count, np.uint16)
        ids[0], ids[-1] = first, last
        by_hand(tmp_path / "p", [ids.tolist()])
        prints.add(IndexedDataset(tmp_path / "p").fingerprint)
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("documents", 7, "documents = 7"),
        ("tokens", 7, "tokens = 7"),
        ("bin_bytes", 7, "bin_bytes = 7"),
        ("dtype", "int32", "dtype = 'int32'"),
        ("format", 2, "format 1"),
        ("bin_sha256", None, "bin_sha256"),
    ],
)
def test_B1_a_manifest_of_other_files_is_named(tmp_path: Path, field: str, value: object, said: str) -> None:
    with IndexedDatasetWriter(tmp_path / "p", np.uint16) as writer:
        writer.add_document([1, 2])
    manifest = json.loads((tmp_path / "p.json").read_text())
    (tmp_path / "p.json").write_text(json.dumps({**manifest, field: value}))
    with pytest.raises(DataError, match=said):
        IndexedDataset(tmp_path / "p")
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        IndexedDataset(tmp_path / "p")
    (tmp_path / "p.json").write_text(json.dumps({**manifest, "idx_sha256": "0" * 64}))
    with pytest.raises(DataError, match="idx_sha256"):
        _ = IndexedDataset(tmp_path / "p").fingerprint


def test_B1_a_token_id_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    data = IndexedDataset(by_hand(tmp_path / "p", [[1, 2], [3, 400, 5], [6]]))
    check_vocab(data, 401)
    with pytest.raises(DataError, match=r"p\.bin: document 1, position 1: token id 400 .*0\.\.399"):
        check_vocab(data, 400)
    negative = IndexedDataset(by_hand(tmp_path / "n", [[1, 2], [-3]], letter="i"))
    with pytest.raises(DataError, match="document 1, position 0: token id -3"):
        check_vocab(negative, 10)
    with IndexedDatasetWriter(tmp_path / "w", np.int32) as writer:
        writer.add_document([5, 6, 7])
    check_vocab(IndexedDataset(tmp_path / "w"), 8)
    with pytest.raises(DataError, match="document 0, position 2: token id 7"):
        check_vocab(IndexedDataset(tmp_path / "w"), 7)


def test_dtype_follows_megatrons_rule() -> None:
    assert dtype_for_vocab(65499) == np.uint16
    assert dtype_for_vocab(65500) == np.int32
