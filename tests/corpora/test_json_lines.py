"""JSON lines are read exactly, or refused with file, line and reason. Oracle: the standard json, line by line."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.config.errors import DataError
from megatron.corpora.blocks import absolute_line, cut_blocks, read_block
from megatron.corpora.document import BadRecord, Document
from megatron.corpora.reading import corpus_bytes, read_documents
from megatron.corpora.selection import ReadOptions, select_files


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def read(path: Path, **options: object) -> list[tuple[str, str]]:
    return [(d.id, d.text) for d in read_documents([path], ReadOptions(**options))]


def items(path: Path, block_bytes: int = 1 << 20, **options: object) -> list[tuple[Document | BadRecord, int | None]]:
    """Documents and bad records, each with its line of the file."""
    chosen = ReadOptions(**options)
    found = []
    for block in cut_blocks(select_files([path], options=chosen), chosen, block_bytes):
        for item in read_block(block, chosen):
            line = absolute_line(block, item.line) if isinstance(item, BadRecord) else None
            found.append((item, line))
    return found


def packed(path: Path, content: bytes) -> Path:
    """The content as a file, compressed as its name says."""
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(content))
    return path


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8), ascii=st.booleans())
def test_texts_come_back_exactly(tmp_path: Path, texts: list[str], ascii: bool) -> None:
    content = b"".join(json.dumps({"text": t, "n": 1}, ensure_ascii=ascii).encode() + b"\n" for t in texts)
    for name in ("c.jsonl", "c.jsonl.gz", "c.jsonl.zst", "c.ndjson", "c.json", "c.json.gz"):
        assert [t for _, t in read(packed(tmp_path / name, content))] == texts


def test_ids_fields_blank_lines_and_line_ends(tmp_path: Path) -> None:
    first, rest = lines({"id": "one", "body": "a"}), lines({"body": "b"}, {"id": 2**70, "body": "c"})
    path = packed(tmp_path / "c.jsonl", first + b"\n  \r\n" + rest[:-1])
    at = len(first) + 5
    skipped: Counter[str] = Counter()
    options = ReadOptions(text_field="body")
    found = [(d.id, d.text) for d in read_documents([path, path], options, skipped=skipped)]
    assert found == 2 * [("one", "a"), (f"c.jsonl@{at}", "b"), (str(2**70), "c")]
    assert skipped == {"blank line": 4}
    assert corpus_bytes(select_files([path, path])) == 2 * path.stat().st_size
    packed(path, b"\xef\xbb\xbf" + first.replace(b"\n", b"\r\n") + rest)
    assert [text for _, text in read(path, text_field="body")] == ["a", "b", "c"]


def test_metadata_and_filters(tmp_path: Path) -> None:
    records = [
        {"text": "a", "lang": "Python", "src": "x", "lic": ["MIT", "Apache-2.0 OR GPL-2.0-only"]},
        {"text": "b", "lang": "C", "src": None, "lic": "GPL-3.0-only"},
        {"text": "c"},
    ]
    path = packed(tmp_path / "c.jsonl", lines(*records))
    fields = {"language_field": "lang", "source_field": "src", "licence_field": "lic"}
    found = [(d.text, d.language, d.source, d.licence) for d in read_documents([path], ReadOptions(**fields))]
    licence = "MIT AND (Apache-2.0 OR GPL-2.0-only)"
    assert found == [("a", "Python", "x", licence), ("b", "C", "", "GPL-3.0-only"), ("c", "", "", "")]
    skipped: Counter[str] = Counter()
    options = ReadOptions(**fields, licences=("mit", "Apache-2.0"))
    assert [d.text for d in read_documents([path], options, skipped=skipped)] == ["a"]
    assert skipped == {"licence not allowed": 1, "licence unknown": 1}
    assert [text for _, text in read(path, **fields, languages=("c",))] == ["b"]
    with pytest.raises(DataError, match=r"line 1: field 'lic': a string is expected, this is a list"):
        list(read_documents([packed(path, lines({"text": "a", "lic": ["MIT", 5]}))], ReadOptions(**fields)))


BAD_LINES = [
    (b'{"text": "a"\n', r"line 2: not JSON: .* at column \d+"),
    (b"\x80\n", r"line 2: byte 14 \(0x80\) is not UTF-8"),
    (b'{"text": "\xed\xa0\xbd"}\n', r"line 2: byte 24 \(0xed\) is not UTF-8"),
    (b'["text"]\n', "line 2: a JSON object is expected, this is a list"),
    (b'"text"\n', "line 2: a JSON object is expected, this is a string"),
    (b"5\n", "line 2: a JSON object is expected, this is a number"),
    (b'{"tekst": "a"}\n', r"line 2: field 'text' is missing \(fields: 'tekst'\).*--text-field"),
    (b'{"text": 5}\n', "line 2: field 'text': a string is expected, this is a number"),
    (b'{"text": null}\n', "line 2: field 'text': a string is expected, this is null"),
    (b'{"text": true}\n', "line 2: field 'text': a string is expected, this is true or false"),
    (b'{"text": "a", "id": [1]}\n', "line 2: field 'id': a string or an integer is expected, this is a list"),
    (b'{"text": "a", "id": 1.5}\n', "line 2: field 'id': a string or an integer is expected, this is a number"),
    (b'{"text": "ab\\ud83d"}\n', r"line 2: field 'text': lone surrogate U\+D83D at character 2"),
    (b'{"text": "ab", "title": "\\udc00"}\n', r"line 2: field 'title': lone surrogate U\+DC00"),
    (b'{"text": "ab", "m": {"x": ["\\udc00"]}}\n', r"line 2: a lone surrogate in a nested field"),
    (b'{"text": "a", "score": NaN}\n', "line 2: NaN is not JSON"),
    (b'{"text": "a", "score": -Infinity}\n', "line 2: -Infinity is not JSON"),
    (b'{"text": "a", "text": "b"}\n', "line 2: field 'text' stands 2 times"),
    (b'{"text": "a", "te\\u0078t": "b"}\n', "line 2: field 'text' stands 2 times"),
    (b'{"id": 1, "text": "a", "id": 1}\n', "line 2: field 'id' stands 2 times"),
    (b'{"text": "a", "x": "\\u0022text", "text": "b"}\n', "line 2: field 'text' stands 2 times"),
    (b'{"id": 1, "text": "a", "id": 1, "m": {"id": 2}}\n', "line 2: field 'id' stands 2 times"),  # as many as lines
    (b'{"text": "a"} {"text": "b"}\n', "line 2: not JSON: Extra data"),
    (b'\xef\xbb\xbf{"text": "a"}\n', "line 2: not JSON: Unexpected UTF-8 BOM"),
    (b"[" * 100_000 + b"\n", "line 2: the JSON is nested too deeply"),
    (b'{"text": ' + b"9" * 5000 + b"}\n", "line 2"),
    (b'{"text": "' + b"a" * 3000 + b'"}\n', "line 2: the line has 3012 bytes, more than 2500"),
]


@pytest.mark.parametrize(("line", "said"), BAD_LINES)
@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst"])
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_B1_a_bad_line_is_named(tmp_path: Path, line: bytes, said: str, name: str, block_bytes: int) -> None:
    path = packed(tmp_path / name, lines({"text": "a"}) + line + lines({"text": "b"}))
    limit = 2500 if "2500" in said else 64 << 20
    with pytest.raises(DataError, match=said) as caught:
        read(path, max_document_bytes=limit)
    assert str(path) in str(caught.value) and caught.value.exit_code == 3
    (first, _), (bad, number), (last, _) = items(path, block_bytes, max_document_bytes=limit)
    assert isinstance(first, Document) and isinstance(last, Document) and (first.text, last.text) == ("a", "b")
    assert isinstance(bad, BadRecord) and number == 2 and bad.byte == 14
    assert bad.content == line.removesuffix(b"\n")


def test_B1_other_shapes_of_json_are_named(tmp_path: Path) -> None:
    array = json.dumps([{"text": "a"}, {"text": "b"}])
    for content in (array, json.dumps([{"text": "a"}], indent=1), "\ufeff" + array):
        with pytest.raises(DataError, match=r"line 1: .*top level is a JSON array.*jq -c '\.\[\]'"):
            read(packed(tmp_path / "c.json", content.encode()))
        with pytest.raises(DataError, match=r"more than 20.*top level is a JSON array"):
            read(packed(tmp_path / "c.jsonl", array.encode()), max_document_bytes=20)
    with pytest.raises(DataError, match=r"line 1: .*one line: convert the file with `jq -c \.`"):
        read(packed(tmp_path / "c.jsonl", json.dumps({"text": "a"}, indent=2).encode()))
    with pytest.raises(DataError, match="UTF-16"):
        read(packed(tmp_path / "c.jsonl", lines({"text": "a"}).decode().encode("utf-16")))


KEYS = ["text", "id", "t", "meta", "x text", "te\\u0078t", "\\u0069d", '\\"text', "te\\/xt"]
VALUES = st.sampled_from(['"a"', '"text"', '"id"', '"\\"text\\": 1"', '"\\u0022text\\u0022"', "1", "null", '"é"', "[]"])
OBJECTS = st.recursive(
    VALUES,
    lambda inner: st.lists(st.tuples(st.sampled_from(KEYS), inner), max_size=4).map(
        lambda pairs: "{" + ", ".join(f'"{key}" : {value}' for key, value in pairs) + "}"
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(
        st.lists(st.tuples(st.sampled_from(KEYS), OBJECTS), max_size=4).map(
            lambda pairs: "{" + ",".join(f'"{key}":{value}' for key, value in [("text", '"whole"'), *pairs]) + "}"
        ),
        min_size=1,
        max_size=5,
    ),
    field=st.sampled_from(["text", "t", "x text", '"text', "te/xt"]),
)
def test_keys_that_stand_twice_are_found_however_spelled(tmp_path: Path, records: list[str], field: str) -> None:
    path = packed(tmp_path / "c.jsonl", "\n".join(records).encode())
    for (item, _), record in zip(items(path, text_field=field), records, strict=True):
        pairs = json.loads(record, object_pairs_hook=lambda found: found)  # the keys as they stand, twice or not
        keys = [key for key, _ in pairs]
        values = json.loads(record)
        good = (
            keys.count(field) == 1
            and keys.count("id") <= 1
            and isinstance(values[field], str)
            and (values.get("id") is None or type(values["id"]) in (str, int))
        )
        assert isinstance(item, Document) == good, (record, item)
        if isinstance(item, Document):
            assert item.text == values[field]


def test_missing_and_empty_corpora_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none: no such file or folder"):
        read(tmp_path / "none")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder: the corpus is empty"):
        read(tmp_path / "folder")
    for name, content in [("a.jsonl", b""), ("b.jsonl", b"\n\n"), ("c.jsonl.gz", b""), ("d.jsonl.zst", b"")]:
        with pytest.raises(DataError, match=f"{name}: the corpus is empty"):
            read(packed(tmp_path / name, content))
    with pytest.raises(DataError, match="no input"):
        list(read_documents([]))
