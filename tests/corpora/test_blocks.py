"""All blocks, one after another, are the corpus, at any block size. Oracle: plain loops over the bytes."""

from __future__ import annotations

import gzip
import json
import pickle
import re
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.config.errors import ConfigError, DataError
from megatron.corpora.blocks import absolute_line, cut_blocks, read_block
from megatron.corpora.document import BadRecord
from megatron.corpora.selection import ReadOptions, select_files

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
IN_TMP = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_in_blocks(paths: list[Path], options: ReadOptions, block_bytes: int) -> tuple[list[tuple], Counter[str]]:
    """What every item says, with lines of the file, and what was skipped; every block travels as to a worker."""
    found: list[tuple] = []
    skipped: Counter[str] = Counter()
    numbers: list[tuple[int, int]] = []
    for block in cut_blocks(select_files(paths, options=options), options, block_bytes):
        block = pickle.loads(pickle.dumps(block))
        numbers.append((block.file_number, block.block_number))
        for item in read_block(block, options, skipped):
            if isinstance(item, BadRecord):
                found.append((absolute_line(block, item.line), item.byte, item.content))
            else:
                found.append((item.id, item.text))
    assert numbers == sorted(set(numbers))
    assert all(number == 0 or (file, number - 1) in numbers for file, number in numbers)
    return found, skipped


def expected_lines(content: bytes, name: str, limit: int, json_lines: bool) -> tuple[list[tuple], int]:
    """Items of a file of lines by a plain loop, and how many lines are blank."""
    found: list[tuple] = []
    blank = offset = 0
    lines = content.split(b"\n")
    for number, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, start=1):
        if len(line) > limit:
            found.append((number, offset, line))
        elif not line.strip():
            blank += 1
        elif json_lines:
            try:
                text = json.loads(line)["text"]
                found.append((f"{name}@{offset}", text))
            except (ValueError, KeyError):
                found.append((number, offset, line))
        else:
            found.append((f"{name}@{offset}", line.removesuffix(b"\r").decode()))
        offset += len(line) + 1
    return found, blank


JSON_LINE = st.one_of(
    st.text(max_size=30).filter(str.isprintable).map(lambda text: json.dumps({"text": text}).encode()),
    st.sampled_from([b"", b" ", b"\r", b"{}", b"{", b'{"text": "' + b"long " * 30 + b'"}']),
)
TEXT_LINE = st.one_of(
    st.sampled_from([b"", b"", b" \t", b"\r", b"a" * 130, b"\x0b"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), max_size=12).map(str.encode),
)


def joined(line: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    ends = st.sampled_from([b"\n", b"\n", b"\r\n"])
    whole = st.lists(st.tuples(line, ends), max_size=25).map(lambda pairs: b"".join(a + b for a, b in pairs))
    return st.tuples(whole, line | st.just(b"")).map(b"".join)


@IN_TMP
@given(content=joined(JSON_LINE), block_bytes=st.integers(1, 400), limit=st.sampled_from([20, 100, 1 << 20]))
def test_blocks_of_json_lines(tmp_path: Path, content: bytes, block_bytes: int, limit: int) -> None:
    for ending, pack in PACK.items():
        path = tmp_path / f"c.jsonl{ending}"
        path.write_bytes(pack(content))
        found, skipped = read_in_blocks([path], ReadOptions(max_document_bytes=limit), block_bytes)
        expected, blank = expected_lines(content, path.name, limit, json_lines=True)
        assert found == expected
        assert skipped["blank line"] == blank


@IN_TMP
@given(content=joined(TEXT_LINE), block_bytes=st.integers(1, 300), limit=st.sampled_from([8, 100, 1 << 20]))
def test_blocks_of_text_lines(tmp_path: Path, content: bytes, block_bytes: int, limit: int) -> None:
    for ending, pack in PACK.items():
        path = tmp_path / f"c.txt{ending}"
        path.write_bytes(pack(content))
        options = ReadOptions(text_documents="line", max_document_bytes=limit)
        found, skipped = read_in_blocks([path], options, block_bytes)
        expected, blank = expected_lines(content, path.name, limit, json_lines=False)
        assert (found, skipped["blank line"]) == (expected, blank)


@IN_TMP
@given(content=joined(TEXT_LINE), block_bytes=st.integers(1, 300))
def test_blocks_of_paragraphs(tmp_path: Path, content: bytes, block_bytes: int) -> None:
    # a paragraph by one regular expression over the whole: lines that are not blank, next to each other
    blank = rb"[ \t\r\x0b\x0c]*(?:\n|\Z)"
    pattern = re.compile(rb"(?:(?!%s)[^\n]*(?:\n|\Z))+" % blank)
    for ending, pack in PACK.items():
        path = tmp_path / f"c.txt{ending}"
        path.write_bytes(pack(content))
        expected = [
            (f"{path.name}@{match.start()}", match[0].removesuffix(b"\n").removesuffix(b"\r").decode())
            for match in pattern.finditer(content)
            if match[0]
        ]
        assert read_in_blocks([path], ReadOptions(text_documents="blank-line"), block_bytes)[0] == expected


@IN_TMP
@given(content=joined(TEXT_LINE), sizes=st.lists(st.integers(1, 300), min_size=2, max_size=2))
def test_long_paragraphs_are_the_same_at_any_block_size(tmp_path: Path, content: bytes, sizes: list[int]) -> None:
    options = ReadOptions(text_documents="blank-line", max_document_bytes=25)
    found = []
    for ending, pack in PACK.items():
        path = tmp_path / "c.txt"
        path.unlink(missing_ok=True)
        path = path.with_name(f"c.txt{ending}")
        path.write_bytes(pack(content))
        for size in sizes:
            items = read_in_blocks([path], options, size)[0]
            found.append([(str(item[0]).replace(ending, ""), *item[1:]) for item in items])
        path.unlink()
    assert all(items == found[0] for items in found)
    for item in found[0]:
        if len(item) == 3:  # a bad record: these bytes stand at that place, and are too long
            assert content[item[1] :].startswith(item[2]) and len(item[2]) > 25
        else:
            assert len(item[1].encode()) <= 25


def test_small_files_share_a_block_and_order_is_kept(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}.py").write_text("x" * 100)
    (tmp_path / "10.jsonl").write_text('{"text": "j"}\n' * 50)
    options = ReadOptions()
    files = select_files([tmp_path], options=options)
    blocks = list(cut_blocks(files, options, 450))
    assert [(block.file_number, block.block_number) for block in blocks] == [
        *((n, 0) for n in (0, 4, 8)),
        *((10, n) for n in range(2)),
        *((n, 0) for n in (11, 15, 19)),
    ]
    ids = [item.id.partition("@")[0] for block in blocks for item in read_block(block, options)]
    assert ids == [f"{n:02}.py" for n in range(10)] + ["10.jsonl"] * 50 + [f"{n:02}.py" for n in range(10, 20)]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_blocks_that_are_not_wanted_keep_the_numbers_of_the_others(tmp_path: Path, ending: str) -> None:
    content = b"".join(json.dumps({"text": str(n)}).encode() + b"\n" for n in range(300))
    path = tmp_path / f"c.jsonl{ending}"
    path.write_bytes(PACK[ending](content))
    files, options = select_files([path]), ReadOptions()
    whole = list(cut_blocks(files, options, 500))
    assert len(whole) > 8
    some = list(cut_blocks(files, options, 500, lambda file, block: block % 3 == 1))
    for one, other in zip(whole, some, strict=True):
        if one.block_number % 3 == 1:
            assert one == other
        else:
            assert other.payload is None
            assert (one.file_number, one.block_number, one.first_line) == (
                other.file_number,
                other.block_number,
                other.first_line,
            )


def test_B1_files_that_change_or_vanish_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a"}\n' * 10)
    options = ReadOptions()
    files = select_files([path])
    blocks = list(cut_blocks(files, options, 1 << 20))
    path.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl: the file has become shorter"):
        list(read_block(blocks[0], options))
    path.unlink()
    with pytest.raises(DataError, match=r"c\.jsonl: .*gone now"):
        list(read_block(blocks[0], options))
    with pytest.raises(DataError, match="gone now"):
        list(cut_blocks(files, options, 1 << 20))
    with pytest.raises(ConfigError, match="block_bytes = 0"):
        list(cut_blocks(files, options, 0))
