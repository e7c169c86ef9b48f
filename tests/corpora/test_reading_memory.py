"""Bombs and endless lines are read in bounded memory. The limit is the operating system's, on a process of its own."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

SCRIPT = """
import resource, sys, json
from pathlib import Path
from megatron.corpora.blocks import cut_blocks, read_block, absolute_line
from megatron.corpora.document import BadRecord
from megatron.corpora.selection import ReadOptions, select_files
import megatron.corpora.parquet
if sys.argv[1].endswith(".parquet"):
    import pyarrow.parquet
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = used + (int(sys.argv[2]) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
options = ReadOptions(max_document_bytes=4 << 20, text_documents=sys.argv[3])
said = []
for block in cut_blocks(select_files([sys.argv[1]]), options, 1 << 20):
    for item in read_block(block, options):
        bad = isinstance(item, BadRecord)
        said.append([absolute_line(block, item.line), item.reason[:60]] if bad else len(item.text))
print(json.dumps(said))
"""


def read_under(path: Path, mebibytes: int, text_documents: str = "file") -> list[object]:
    command = [sys.executable, "-c", SCRIPT, str(path), str(mebibytes), text_documents]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    said: list[object] = json.loads(ended.stdout)
    return said


def bomb(path: Path, pieces: list[tuple[bytes, int]]) -> Path:
    """A file of pieces, each so many times, compressed as its name says and never whole in memory."""
    openers = {".zst": zstandard.open, ".gz": lambda path, mode: gzip.GzipFile(path, mode, 1)}
    with openers.get(path.suffix, open)(path, "wb") as file:
        for piece, times in pieces:
            for _ in range(times):
                file.write(piece)
    return path


MEBIBYTE = b"a" * (1 << 20)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS as Linux has it")
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_B1_a_line_of_150_megabytes_is_passed_over(tmp_path: Path, ending: str) -> None:
    first, last = b'{"text": "one"}\n', b'"}\n{"text": "three"}'
    path = bomb(tmp_path / f"c.jsonl{ending}", [(first, 1), (b'{"text": "', 1), (MEBIBYTE, 150), (last, 1)])
    size = 10 + 150 * 2**20 + 2
    said = f"the line has {size} bytes, more than 4194304: raise max_document_bytes"[:60]
    assert read_under(path, 64) == [3, [2, said], 5]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS as Linux has it")
def test_B1_text_bombs_are_bad_records(tmp_path: Path) -> None:
    path = bomb(tmp_path / "c.txt.zst", [(MEBIBYTE, 150)])
    assert read_under(path, 64) == [[None, "c.txt.zst has more than 4194304 bytes: raise max_document_by"[:60]]]
    path = bomb(tmp_path / "d.txt.zst", [(b"line\n" * 200_000, 80), (b"\nend", 1)])
    said = "the paragraph has 79999999 bytes, more than 4194304: raise max_document_bytes"[:60]
    assert read_under(path, 64, "blank-line") == [[1, said], 3]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS as Linux has it")
def test_a_large_parquet_group_of_shared_strings_is_streamed(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    # 400 rows that share two strings of 1 MiB: 400 MiB once each row has its own
    values = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 200), pa.array(["a" * 2**20, "b" * 2**20]))
    pq.write_table(pa.table({"text": values}), tmp_path / "c.parquet", dictionary_pagesize_limit=1 << 23)
    assert read_under(tmp_path / "c.parquet", 200) == [2**20] * 400
