"""Corpora are read whole, in order, or refused with file and place. Oracle: the files as written here, byte by byte."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.config.errors import DataError
from megatron.data.corpus import ReadOptions, ReadProgress, corpus_bytes, read_corpora, read_corpus


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def read(path: Path, **options: object) -> list[tuple[str, str]]:
    return [(d.id, d.text) for d in read_corpus(path, ReadOptions(**options))]


def test_a_folder_is_its_files_in_sorted_order(tmp_path: Path) -> None:
    for name, content in [("b.py", b"b\r\n"), ("a/z.py", b"\xef\xbb\xbfz"), ("a/é.txt", "é".encode()), ("a.py", b"")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_bytes(b"\xff")
    expected = [("a.py", ""), ("a/z.py", "\ufeffz"), ("a/é.txt", "é"), ("b.py", "b\r\n")]
    assert read(tmp_path) == expected
    assert read(tmp_path, suffixes=(".py",)) == [e for e in expected if e[0].endswith(".py")]
    assert corpus_bytes([tmp_path]) == 3 + 4 + 2


def test_links_that_leave_the_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out.txt").write_text("secret")
    (tmp_path / "in" / "a.txt").write_text("a")
    os.symlink("../out.txt", tmp_path / "in" / "b.txt")
    os.symlink("a.txt", tmp_path / "in" / "c.txt")
    os.symlink("missing", tmp_path / "in" / "d.txt")
    os.symlink(".", tmp_path / "in" / "loop")
    assert read(tmp_path / "in") == [("a.txt", "a"), ("c.txt", "a")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8), ascii=st.booleans())
def test_json_lines_come_back_exactly(tmp_path: Path, texts: list[str], ascii: bool) -> None:
    content = b"".join(json.dumps({"text": t, "n": 1}, ensure_ascii=ascii).encode() + b"\n" for t in texts)
    (tmp_path / "c.jsonl").write_bytes(content)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(content))
    assert [t for _, t in read(tmp_path / "c.jsonl")] == texts
    assert [t for _, t in read(tmp_path / "c.jsonl.gz")] == texts


def test_ids_fields_blank_lines_and_progress(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(lines({"id": "one", "body": "a"}) + b"\n  \n" + lines({"body": "b"}, {"id": 7, "body": "c"})[:-1])
    assert read(path, text_field="body") == [("one", "a"), ("c.jsonl:4", "b"), ("7", "c")]
    progress = ReadProgress()
    list(read_corpora([path, path], ReadOptions(text_field="body"), progress))
    assert progress.bytes_read == 2 * path.stat().st_size and progress.files_read == 2
    assert progress.skipped == {"blank line": 4}


BAD_LINES = [
    (b'{"text": "a"\n', r"line 2, column \d+: not JSON"),
    (b"\x80\n", r"line 2: byte 14 \(0x80\) is not UTF-8"),
    (b'["text"]\n', "line 2: a JSON object is expected, this is a list"),
    (b'{"tekst": "a"}\n', r"line 2: field 'text' is missing \(fields: 'tekst'\).*--text-field"),
    (b'{"text": 5}\n', "line 2: field 'text': a string is expected, this is a number"),
    (b'{"text": null}\n', "line 2: field 'text': a string is expected, this is null"),
    (b'{"text": true}\n', "line 2: field 'text': a string is expected, this is true or false"),
    (b'{"text": "ab\\ud83d"}\n', r"line 2: field 'text': lone surrogate U\+D83D at character 2"),
    (b"[" * 100_000 + b"\n", "line 2"),
    (b'{"text": ' + b"9" * 5000 + b"}\n", "line 2"),
]


@pytest.mark.parametrize(("line", "said"), BAD_LINES)
@pytest.mark.parametrize("packed", [False, True])
def test_B1_a_bad_line_is_named(tmp_path: Path, line: bytes, said: str, packed: bool) -> None:
    content = lines({"text": "a"}) + line + lines({"text": "b"})
    path = tmp_path / ("c.jsonl.gz" if packed else "c.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=said) as caught:
        read(path)
    assert str(path) in str(caught.value) and caught.value.exit_code == 3


def test_B1_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "ok.txt").write_text("fine")
    (tmp_path / "z.txt").write_bytes("naïve ".encode() + b"caf\xe9!")
    with pytest.raises(DataError, match=r"z\.txt: byte 10 \(0xe9\) is not UTF-8"):
        read(tmp_path)


def test_B1_a_damaged_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    whole = gzip.compress(lines(*({"text": os.urandom(40).hex()} for _ in range(300))))
    for cut in (1, 4, 9, len(whole) // 2):
        path.write_bytes(whole[:-cut])
        with pytest.raises(DataError, match=r"c\.jsonl\.gz: the gzip file was cut off"):
            read(path)
    for place in (len(whole) // 2, len(whole) - 6):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(bytes(damaged))
        with pytest.raises(DataError, match=r"c\.jsonl\.gz"):
            read(path)
    path.write_bytes(b"not gzip")
    with pytest.raises(DataError, match="damaged"):
        read(path)


def test_B1_missing_and_empty_corpora_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none: no such file or folder"):
        read(tmp_path / "none")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder: the corpus is empty"):
        read(tmp_path / "folder")
    for name, content in [("a.jsonl", b""), ("b.jsonl", b"\n\n"), ("c.jsonl.gz", gzip.compress(b""))]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: the corpus is empty"):
            read(tmp_path / name)
    with pytest.raises(DataError, match="no input"):
        list(read_corpora([]))
    (tmp_path / "d.jsonl.zst").write_bytes(b"x")
    with pytest.raises(DataError, match="not read"):
        read(tmp_path / "d.jsonl.zst")
