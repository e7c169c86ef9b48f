"""Real files of this machine: the standard library and installed packages' metadata, counted independently."""

from __future__ import annotations

import gzip
import json
import os
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from megatron.corpora.blocks import cut_blocks, read_block
from megatron.corpora.document import BadRecord, Document
from megatron.corpora.selection import ReadOptions, select_files

LIBRARY = Path(sysconfig.get_path("stdlib"))
PACKAGES = Path(sysconfig.get_path("purelib"))
PASSED_BY = {"__pycache__", "node_modules", ".git", "site-packages", "dist-packages"}


def all_of(inputs: list[Path], options: ReadOptions, block_bytes: int) -> list[Document | BadRecord]:
    blocks = cut_blocks(select_files(inputs, options=options), options, block_bytes)
    return [item for block in blocks for item in read_block(block, options)]


@pytest.fixture(scope="module")
def sources() -> dict[str, bytes]:
    """Python files of the standard library by path, read by a plain walk."""
    found: dict[str, bytes] = {}
    for folder, folders, names in os.walk(LIBRARY):
        folders[:] = [name for name in folders if name not in PASSED_BY]
        for name in names:
            path = Path(folder, name)
            if name.endswith(".py") and path.is_file() and path.resolve().is_relative_to(LIBRARY.resolve()):
                found[path.relative_to(LIBRARY).as_posix()] = path.read_bytes()
    return found


def test_the_standard_library_as_a_code_tree(sources: dict[str, bytes]) -> None:
    options = ReadOptions(suffixes=(".py",), gitignore=False)
    items = all_of([LIBRARY], options, 1 << 20)
    items = [item for item in items if not ({"site-packages", "dist-packages"} & set(place(item).split("/")))]
    assert len(items) == len(sources) > 500
    for item, (name, content) in zip(items, sorted(sources.items()), strict=True):
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            assert isinstance(item, BadRecord) and item.file == str(LIBRARY / name)
        else:
            assert isinstance(item, Document) and (item.id, item.text, item.language) == (name, text, "Python")
    assert sum(len(item.text.encode()) for item in items if isinstance(item, Document)) > 8_000_000


def place(item: Document | BadRecord) -> str:
    return item.id if isinstance(item, Document) else Path(item.file).relative_to(LIBRARY).as_posix()


def test_the_standard_library_through_every_format(sources: dict[str, bytes], tmp_path: Path) -> None:
    texts = {}
    for name, content in sorted(sources.items()):
        try:
            texts[name] = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
    lines = b"".join(
        json.dumps({"path": name, "content": text}, ensure_ascii=number % 2 == 0).encode() + b"\n"
        for number, (name, text) in enumerate(texts.items())
    )
    files = {"c.jsonl": lines, "c.jsonl.gz": gzip.compress(lines, 1), "c.jsonl.zst": zstandard.compress(lines)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        pass
    else:
        table = pa.table({"path": list(texts), "content": list(texts.values())})
        pq.write_table(table, tmp_path / "c.parquet", row_group_size=200, compression="zstd")
    options = ReadOptions(text_field="content", id_field="path")
    for path in tmp_path.iterdir():
        items = all_of([path], options, 700_000)
        assert [(item.id, item.text) for item in items if isinstance(item, Document)] == list(texts.items()), path


def test_metadata_of_installed_packages_as_prose() -> None:
    paths = sorted(path for path in PACKAGES.glob("*.dist-info/METADATA") if path.is_file())
    if not paths:
        pytest.skip("no package is installed here")
    expected = Counter(path.read_bytes().decode() for path in paths)
    options = ReadOptions()
    found = all_of([PACKAGES / "*.dist-info" / "METADATA"], options, 50_000)
    assert Counter(item.text for item in found if isinstance(item, Document)) == expected
    paragraphs = all_of([PACKAGES / "*.dist-info" / "METADATA"], ReadOptions(text_documents="blank-line"), 50_000)
    joined = "".join(path.read_bytes().decode() + "\n\n" for path in paths)
    # the words are all there and in order; a paragraph never holds a blank line
    assert " ".join(item.text for item in paragraphs if isinstance(item, Document)).split() == joined.split()
    assert not any(not line.strip() for item in paragraphs for line in item.text.split("\n"))
