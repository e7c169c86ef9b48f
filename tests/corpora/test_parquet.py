"""Parquet rows are read exactly, or refused with file, row and column. Oracle: pyarrow's read of the whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.config.errors import DataError
from megatron.corpora.blocks import absolute_line, cut_blocks, read_block
from megatron.corpora.document import BadRecord
from megatron.corpora.reading import read_documents
from megatron.corpora.selection import ReadOptions, select_files

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def read(path: Path, **options: object) -> list[tuple[str, str]]:
    return [(d.id, d.text) for d in read_documents([path], ReadOptions(**options))]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=40),
    group=st.integers(1, 50),
    kind=st.sampled_from(["string", "large_string", "binary", "dictionary"]),
    compression=st.sampled_from(["snappy", "zstd", "gzip", "none"]),
    block_bytes=st.sampled_from([1, 300, 1 << 20]),
)
def test_rows_come_back_exactly(
    tmp_path: Path, texts: list[str], group: int, kind: str, compression: str, block_bytes: int
) -> None:
    path = tmp_path / "c.parquet"
    column = pa.array(texts)
    if kind == "dictionary":
        column = column.dictionary_encode()
    elif kind != "string":
        column = column.cast(getattr(pa, kind)())
    table = pa.table({"n": list(range(len(texts))), "text": column, "id": [f"d{n}" for n in range(len(texts))]})
    pq.write_table(table, path, row_group_size=group, compression=compression, use_dictionary=kind == "dictionary")
    whole = pq.read_table(path)
    assert whole.num_rows == len(texts)
    options = ReadOptions()
    blocks = list(cut_blocks(select_files([path]), options, block_bytes))
    found = [(item.id, item.text) for block in blocks for item in read_block(block, options)]
    assert found == list(zip(whole["id"].to_pylist(), texts, strict=True))
    if block_bytes == 1:
        assert len(blocks) == pq.ParquetFile(path).num_row_groups


def test_columns_of_metadata_and_filters(tmp_path: Path) -> None:
    table = pa.table(
        {
            "content": ["a", "b", "c"],
            "path": [7, 2**62, None],
            "lang": ["Python", "C", None],
            "repo": ["r/a", None, "r/c"],
            "licenses": [["MIT", "ISC"], ["GPL-3.0-only"], []],
        }
    )
    path = tmp_path / "c.parquet"
    pq.write_table(table, path)
    fields = {
        "text_field": "content",
        "id_field": "path",
        "language_field": "lang",
        "source_field": "repo",
        "licence_field": "licenses",
    }
    found = [(d.id, d.text, d.language, d.source, d.licence) for d in read_documents([path], ReadOptions(**fields))]
    assert found == [
        ("7", "a", "Python", "r/a", "MIT AND ISC"),
        (str(2**62), "b", "C", "", "GPL-3.0-only"),
        ("c.parquet@3", "c", "", "r/c", ""),
    ]
    skipped: Counter[str] = Counter()
    options = ReadOptions(**fields, licences=("MIT", "ISC"), languages=("python",))
    assert [d.text for d in read_documents([path], options, skipped=skipped)] == ["a"]
    assert sum(skipped.values()) == 2


def test_B1_bad_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    good = pa.array([b"a", b"b", b"caf\xe9", b"d", None, b"f" * 60])
    for column in (good, good.view(pa.string())):  # the second claims to be UTF-8 and is not
        pq.write_table(pa.table({"text": column}), path, row_group_size=2)
        options = ReadOptions(max_document_bytes=50)
        found = []
        for block in cut_blocks(select_files([path]), options, 1):
            for item in read_block(block, options):
                bad = isinstance(item, BadRecord)
                found.append((absolute_line(block, item.line), item.reason[:34]) if bad else (item.id, item.text))
        assert found == [
            ("c.parquet@1", "a"),
            ("c.parquet@2", "b"),
            (3, "column 'text': byte 3 of the value is not UTF-8"[:34]),
            ("c.parquet@4", "d"),
            (5, "column 'text': a string is expected"[:34]),
            (6, "the text has more than 50 bytes: raise"[:34]),
        ]
        with pytest.raises(DataError, match=r"c\.parquet: line 3: column 'text': byte 3"):
            read(path)


def test_B1_bad_columns_and_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": [1, 2], "id": ["a", "b"], "lists": [["a"], ["b"]], "x": ["a", "b"]}), path)
    with pytest.raises(DataError, match=r"column 'text': strings are expected, this is int64: set text_field"):
        read(path)
    with pytest.raises(
        DataError, match=r"column 'body' is missing \(columns: 'text', 'id', 'lists', 'x'\): set text_field"
    ):
        read(path, text_field="body")
    with pytest.raises(DataError, match=r"column 'lists': strings or integers are expected, this is list"):
        read(path, text_field="x", id_field="lists")
    with pytest.raises(DataError, match=r"column 'lang' is missing"):
        read(path, text_field="x", language_field="lang")
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(DataError, match=r"column 'text' stands 2 times"):
        read(path)
    pq.write_table(
        pa.table({"text": [f"{n} text" * 20 for n in range(50)]}), path, write_page_checksum=True, use_dictionary=False
    )
    whole = path.read_bytes()
    for cut in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"c\.parquet: the parquet file is damaged or cut off"):
            read(path)
    path.write_bytes(whole)
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    end = chunk.data_page_offset + chunk.total_compressed_size
    for place in range(end - chunk.total_compressed_size // 2, end, 7):  # behind the page's header, which has no sum
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(bytes(damaged))
        with pytest.raises(DataError, match=r"c\.parquet: the parquet file is damaged"):
            read(path)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match="the corpus is empty"):
        read(path)
