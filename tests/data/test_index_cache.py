"""Epoch index files: shared, whole or absent, verified, and the same whoever builds them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_files import BACKENDS, FakeFile, backend, needs_native

from megatron.config.errors import StorageError
from megatron.data import index_cache
from megatron.data.epoch_index import SourceOrder, Span

LENGTHS = [(7 * i) % 40 for i in range(3000)]


def make(cache: Path | None, **changes: Any) -> SourceOrder:
    options: dict[str, Any] = {"files": [FakeFile(LENGTHS)], "seed": 1, "piece_tokens": 16, "cache_dir": cache}
    return SourceOrder(**{**options, **changes})


def whole(order: SourceOrder, epoch: int = 0) -> list[Span]:
    return order.pieces_at(epoch, 0, order.epoch_tokens)


def only_file(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


def test_M6_a_second_run_with_another_name_and_place_builds_nothing(tmp_path: Path) -> None:
    expected = whole(make(tmp_path / "cache"))
    before = only_file(tmp_path / "cache").stat()
    moved = FakeFile(LENGTHS)
    moved.prefix = tmp_path / "elsewhere"  # type: ignore[attr-defined]
    assert whole(make(tmp_path / "cache", files=[moved])) == expected
    after = only_file(tmp_path / "cache").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_M6_all_that_the_order_depends_on_is_in_the_name(tmp_path: Path) -> None:
    orders = [
        make(tmp_path),
        make(tmp_path, seed=2),
        make(tmp_path, piece_tokens=17),
        make(tmp_path, document_slice=(Decimal("0.1"), 1)),
        make(tmp_path, document_slice=(0, Decimal("0.9"))),
        make(tmp_path, holdout_fraction=Decimal("0.1")),
        make(tmp_path, files=[FakeFile(LENGTHS, "b")]),
    ]
    for order in orders:
        order.prepare(0)
    orders[0].prepare(1)
    assert len(list(tmp_path.iterdir())) == len(orders) + 1
    same = make(
        tmp_path, document_slice=(Decimal("0.00"), Decimal("1.0")), holdout_fraction=Decimal("0.000"), threads=3
    )
    assert same.fingerprint == orders[0].fingerprint
    same.prepare(0)
    assert len(list(tmp_path.iterdir())) == len(orders) + 1


def test_an_index_is_a_fiftieth_of_a_shuffled_sample_index(tmp_path: Path) -> None:
    make(tmp_path, piece_tokens=2**20).prepare(0)
    assert only_file(tmp_path).stat().st_size == 128 + 4 * -(-len(LENGTHS) // 32)


@needs_native
def test_both_backends_write_the_same_file(tmp_path: Path) -> None:
    contents = []
    for name in BACKENDS:
        with backend(name):
            make(tmp_path / name, threads=2).prepare(5)
        contents.append((only_file(tmp_path / name).name, only_file(tmp_path / name).read_bytes()))
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    "damage", ["bit in magic", "bit in header", "bit in checksum", "bit in padding", "bit in sums"]
)
def test_a_flipped_bit_is_named_and_repaired(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = whole(make(tmp_path))
    path = only_file(tmp_path)
    good = path.read_bytes()
    place = {"bit in magic": 0, "bit in header": 30, "bit in checksum": 90, "bit in padding": 120, "bit in sums": -3}
    bad = bytearray(good)
    bad[place[damage]] ^= 4
    path.write_bytes(bad)
    assert whole(make(tmp_path)) == expected
    told = capsys.readouterr().err
    assert str(path) in told
    assert "damaged" in told
    assert path.read_bytes() == good
    assert only_file(tmp_path) == path


@pytest.mark.parametrize("size", [0, 5, 127, 128, 500])
def test_a_truncated_file_is_named_and_repaired(tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    expected = whole(make(tmp_path))
    path = only_file(tmp_path)
    good = path.read_bytes()
    for content in (good[:size], good + b"\0"):
        path.write_bytes(content)
        assert whole(make(tmp_path)) == expected
        assert f"{path} is damaged (it has {len(content)} bytes" in capsys.readouterr().err
        assert path.read_bytes() == good


def test_a_file_under_another_index_name_is_not_believed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path).prepare(0)
    first = only_file(tmp_path)
    make(tmp_path).prepare(1)
    (second,) = set(tmp_path.iterdir()) - {first}
    good = second.read_bytes()
    second.write_bytes(first.read_bytes())
    make(tmp_path).prepare(1)
    assert "header" in capsys.readouterr().err
    assert second.read_bytes() == good


def test_a_read_only_cache_serves_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = whole(make(tmp_path))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    # a superuser writes where the mode forbids it, so that the refusal is simulated
    monkeypatch.setattr(index_cache.tempfile, "mkstemp", refuse)
    assert whole(make(tmp_path)) == expected
    with pytest.raises(StorageError, match=r"Read-only file system.*Set \[data\] cache"):
        make(tmp_path).prepare(1)


def test_a_cache_that_cannot_be_a_folder_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be read"):
        make(tmp_path / "file").prepare(0)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(index_cache.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        make(tmp_path).prepare(0)
    assert list(tmp_path.iterdir()) == []


def test_an_order_of_one_stride_needs_no_file(tmp_path: Path) -> None:
    order = make(tmp_path, files=[FakeFile([3] * 32)])
    assert len(whole(order)) == 32
    assert list(tmp_path.iterdir()) == []


def test_an_opened_index_is_not_built_again(tmp_path: Path) -> None:
    order = make(tmp_path)
    expected = whole(order)
    only_file(tmp_path).unlink()
    assert whole(order) == expected
    assert list(tmp_path.iterdir()) == []


PROGRAM = """
import sys, os
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from token_files import FakeFile
from megatron.data import index_cache
from megatron.data.epoch_index import SourceOrder
lengths = [(7 * i) % 40 for i in range(3000)]
order = SourceOrder([FakeFile(lengths)], seed=1, piece_tokens=16, cache_dir=Path(sys.argv[2]))
if sys.argv[3] == "hang":
    os.fsync = lambda _: (print("writing", flush=True), __import__("time").sleep(60))
for epoch in range(int(sys.argv[4])):
    order.prepare(epoch)
"""


def start(tests: Path, cache: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(tests), str(cache), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_racing_builders_all_succeed_and_agree(tmp_path: Path, repository: Path) -> None:
    racers = [start(repository / "tests", tmp_path / "cache", "race", "40") for _ in range(4)]
    for racer in racers:
        _, told = racer.communicate(timeout=100)
        assert (racer.returncode, told) == (0, "")
    assert len(list((tmp_path / "cache").iterdir())) == 40
    alone = make(tmp_path / "alone")
    for epoch in range(40):
        alone.prepare(epoch)
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "cache" / path.name).read_bytes()


def test_a_build_killed_midway_is_as_if_it_never_was(tmp_path: Path, repository: Path) -> None:
    victim = start(repository / "tests", tmp_path, "hang", "1")
    try:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "writing\n"
    finally:
        os.kill(victim.pid, signal.SIGKILL)
        victim.communicate(timeout=60)
    assert only_file(tmp_path).name.endswith(".partial")
    assert whole(make(tmp_path)) == whole(make(None))
    assert len([path for path in tmp_path.iterdir() if path.suffix == ".order"]) == 1


def test_leftovers_of_killed_builds_are_cleared_after_a_day(tmp_path: Path) -> None:
    make(tmp_path).prepare(0)
    name = only_file(tmp_path).name
    old, recent, foreign = (tmp_path / f".{stem}.partial" for stem in (f"{name}.old", f"{name}.recent", "other"))
    for path in (old, recent, foreign):
        path.write_bytes(b"half")
    for path in (old, foreign):
        os.utime(path, (time.time() - 90_000,) * 2)
    (tmp_path / name).unlink()
    make(tmp_path).prepare(0)
    assert not old.exists()
    assert recent.exists()
    assert foreign.exists()


def test_strides_of_more_than_four_billion_tokens_keep_every_bit(tmp_path: Path) -> None:
    """Few huge pieces: an entry takes eight bytes where four could not hold it."""
    sums = np.array([0, 2**40, 2**40 + 5, 2**41], dtype=np.uint64)
    key = index_cache.IndexKey("ab" * 32, 7, 32 * 4, 2**39, 2**42)
    path = tmp_path / key.file_name
    index_cache.publish(path, key, sums)
    assert index_cache.read_index(path, key).tolist() == sums.tolist()
    assert path.stat().st_size == 128 + 8 * 4
    small = index_cache.IndexKey("cd" * 32, 7, 32 * 3, 2**20, 900)
    index_cache.publish(tmp_path / small.file_name, small, np.array([0, 100, 700], dtype=np.uint64))
    assert index_cache.read_index(tmp_path / small.file_name, small).tolist() == [0, 100, 700]
    assert (tmp_path / small.file_name).stat().st_size == 128 + 4 * 3
