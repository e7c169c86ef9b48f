"""Folders are their files in sorted order, without what is outside, ignored, binary or filtered out."""

from __future__ import annotations

import gzip
import os
from collections import Counter
from pathlib import Path

import pytest

from megatron.config.errors import ConfigError, DataError
from megatron.corpora.reading import corpus_bytes, read_documents
from megatron.corpora.selection import ReadOptions, select_files


def read(path: Path, **options: object) -> list[tuple[str, str]]:
    return [(d.id, d.text) for d in read_documents([path], ReadOptions(**options))]


def made(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_a_folder_is_its_files_in_sorted_order(tmp_path: Path) -> None:
    files = {"b.py": b"b\r\n", "a/z.py": b"\xef\xbb\xbfz", "a/é.txt": "é".encode(), "a.py": b""}
    made(tmp_path, {**files, ".git/HEAD": b"\xff", "a/__pycache__/x.pyc": b"\xff", "node_modules/x.js": b"x"})
    expected = [("a.py", ""), ("a/z.py", "\ufeffz"), ("a/é.txt", "é"), ("b.py", "b\r\n")]
    assert read(tmp_path) == expected
    assert read(tmp_path, suffixes=(".py",)) == [e for e in expected if e[0].endswith(".py")]
    assert corpus_bytes(select_files([tmp_path])) == 3 + 4 + 2


def test_links_are_safe(tmp_path: Path) -> None:
    made(tmp_path, {"in/a.txt": b"a", "out.txt": b"secret", "in/sub/b.txt": b"b", "outside/x.txt": b"secret"})
    links = {
        "b.txt": "../out.txt",
        "c.txt": "a.txt",
        "d.txt": "missing",
        "loop": ".",
        "self": "self",
        "away": "../outside",
        "again": "sub",
        "up.txt": f"{tmp_path}/in/../out.txt",
        "proc": "/proc/self/environ",
    }
    for name, target in links.items():
        os.symlink(target, tmp_path / "in" / name)
    os.mkfifo(tmp_path / "in" / "pipe")
    skipped: Counter[str] = Counter()
    found = [(d.id, d.text) for d in read_documents([tmp_path / "in"], skipped=skipped)]
    assert found == [("a.txt", "a"), ("c.txt", "a"), ("sub/b.txt", "b")]
    assert skipped == {
        "link that leaves the folder": 3,
        "link that leads nowhere": 2,
        "link to a folder": 3,
        "not a regular file": 1,
    }
    os.symlink("in", tmp_path / "named")  # a folder that is named itself may be a link
    assert read(tmp_path / "named") == found


def test_binary_files_pointers_and_archives_are_counted(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    files = {
        "a.py": b"a",
        "b.png": b"\x89PNG\0",
        "c.bin": b"pointer",
        "d.zip": b"PK",
        "late.dat": b"a" * 9000 + b"\xff\0",
    }
    made(tmp_path, {**files, "lfs.psd": pointer, "e.tar.gz": b"x", "_SUCCESS": b"", "m.1.gz": gzip.compress(b"manual")})
    skipped: Counter[str] = Counter()
    found = [(d.id, d.text) for d in read_documents([tmp_path], skipped=skipped)]
    assert found == [("a.py", "a"), ("c.bin", "pointer"), ("m.1.gz", "manual")]
    assert skipped == {"binary file": 2, "git LFS pointer": 1, "archive": 2, "marker file": 1}


def test_languages_sizes_and_licences(tmp_path: Path) -> None:
    mit = (
        b"Permission is hereby granted, free of charge, to any person obtaining a copy\nof this software ... The above "
        b"copyright notice and this permission notice shall be included"
    )
    gpl = b"GNU GENERAL PUBLIC LICENSE\n   Version 3, 29 June 2007\n"
    spdx = b"// SPDX-License-Identifier: (Apache-2.0 OR MIT) */\n"
    files = {"LICENSE": mit, "a.py": b"a" * 10, "g/COPYING": gpl, "g/b.py": b"b" * 20, "g/deep/c.rs": spdx, "d.c": b""}
    made(tmp_path, files)
    found = {d.id: (d.language, d.licence) for d in read_documents([tmp_path])}
    assert found == {
        "LICENSE": ("Text", "MIT"),
        "a.py": ("Python", "MIT"),
        "d.c": ("C", "MIT"),
        "g/COPYING": ("Text", "GPL-3.0-only"),
        "g/b.py": ("Python", "GPL-3.0-only"),
        "g/deep/c.rs": ("Rust", "(Apache-2.0 OR MIT)"),
    }
    assert [name for name, _ in read(tmp_path, languages=("python", "Rust"))] == ["a.py", "g/b.py", "g/deep/c.rs"]
    assert [name for name, _ in read(tmp_path, licences=("MIT",), languages=("Python", "Rust", "C"))] == [
        "a.py",
        "d.c",
        "g/deep/c.rs",
    ]
    assert [name for name, _ in read(tmp_path, min_file_bytes=10, max_file_bytes=20)] == ["a.py", "g/b.py"]
    with pytest.raises(DataError, match=r"passes the filters \(6 file below min_file_bytes\)"):
        read(tmp_path, min_file_bytes=10**6)
    with pytest.raises(ConfigError, match="language 'Pyhton' is not known: did you mean 'Python'"):
        read(tmp_path, languages=("Pyhton",))


def test_data_files_among_others(tmp_path: Path) -> None:
    made(
        tmp_path,
        {"package.json": b'{\n "text": "a"}', "data.json": b'{"text": "b"}\n', "x/c.jsonl": b'{"text": "c"}\n'},
    )
    assert read(tmp_path) == [("data.json@0", "b"), ("package.json", '{\n "text": "a"}'), ("x/c.jsonl@0", "c")]


@pytest.mark.parametrize(
    "name", ["c.jsonl.xz", "c.tar", "c.tar.gz", "c.tar.zst", "c.zip", "c.7z", "c.jsonl.bz2", "c.arrow"]
)
def test_B1_formats_that_are_not_read_are_named(tmp_path: Path, name: str) -> None:
    made(tmp_path, {name: b"x", "a.py": b"a"})
    with pytest.raises(DataError, match=rf"{name}: .*not read: (unpack|convert) it"):
        read(tmp_path / name)
    if ".jsonl." in name:  # a shard that would be missed
        with pytest.raises(DataError, match=rf"{name}: .*not read: unpack it"):
            read(tmp_path)


def test_globs_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, {"a.txt": b"a", "s/b.txt": b"b", "s/t/c.txt": b"c", "[x].txt": b"x"})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list").write_bytes(b"s/b.txt\r\n\n*.txt\ns/t")

    def texts(*inputs: str, files_from: str | None = None) -> str:
        return "".join(d.text for d in read_documents(inputs, files_from=files_from))

    assert texts("*.txt") == "xa"
    assert texts("**/*.txt") == "xabc"
    assert texts("[x].txt") == "x"  # a file of that very name comes first
    assert texts(files_from="list") == "bxac"
    assert texts("a.txt", "s", files_from="list") == "abcbxac"
    with pytest.raises(DataError, match=r"\*\.none: the glob matches nothing"):
        texts("*.none")
    with pytest.raises(DataError, match="nolist: the list of files cannot be read"):
        texts(files_from="nolist")
    (tmp_path / "empty").write_bytes(b"\n")
    with pytest.raises(DataError, match="empty: the list of files names none"):
        texts(files_from="empty")
    read_end, write_end = os.pipe()
    os.write(write_end, b"a.txt\n")
    os.close(write_end)
    with os.fdopen(read_end) as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert texts(files_from="-") == "a"


def test_B1_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    made(tmp_path, {"ok.txt": b"fine", "z.txt": "naïve ".encode() + b"caf\xe9!"})
    with pytest.raises(DataError, match=r"z\.txt: byte 10 \(0xe9\) is not UTF-8"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"ok\.txt: .*more than 3 bytes"):
        read(tmp_path / "ok.txt", max_document_bytes=3)
    name = os.fsdecode(b"caf\xe9.txt")
    made(tmp_path / "sub", {name: b"x"})
    assert read(tmp_path / "sub") == [("caf\\xe9.txt", "x")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_B1_no_permission_is_named(tmp_path: Path) -> None:
    made(tmp_path, {"a.txt": b"a"})
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DataError, match=r"a\.txt: no permission"):
        read(tmp_path)
