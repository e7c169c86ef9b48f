"""A compressed file that is cut off or damaged is an error at every byte. Oracle: the pieces it was made of."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path

import pytest
import zstandard

from megatron.config.errors import DataError
from megatron.corpora.compressed import open_stream
from megatron.corpora.reading import read_documents

PIECES = [b"".join(json.dumps({"text": f"{n} " * 9}).encode() + b"\n" for n in range(a, a + 5)) for a in (0, 5, 10)]
SKIPPABLE = b"\x5a\x2a\x4d\x18\x05\0\0\0seven"[:13]


def zst(content: bytes, checksum: bool = True, size: bool = True, level: int = 3) -> bytes:
    return zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=size).compress(content)


def everything(path: Path, size: int = 1000) -> bytes:
    with open_stream(str(path)) as stream:
        return b"".join(iter(lambda: stream.read(size), b""))


FRAMES = {
    "gz": [gzip.compress(piece) for piece in PIECES],
    "zst": [zst(PIECES[0]), zst(PIECES[1], checksum=False), zst(PIECES[2], size=False)],
}


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_B1_a_file_cut_off_at_any_byte_is_an_error_but_between_members(tmp_path: Path, kind: str) -> None:
    whole = b"".join(FRAMES[kind])
    legal = {sum(map(len, FRAMES[kind][:n])): b"".join(PIECES[:n]) for n in (1, 2, 3)}
    path = tmp_path / f"c.jsonl.{kind}"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        if cut in legal:
            assert everything(path) == legal[cut]
        else:
            with pytest.raises(DataError, match=rf"c\.jsonl\.{kind}: the \w+ file was cut off at byte {cut}\b"):
                everything(path)
            with pytest.raises(DataError, match=rf"c\.jsonl\.{kind}"):
                list(read_documents([path]))


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_B1_bytes_behind_the_end_are_an_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"c.jsonl.{kind}"
    whole = b"".join(FRAMES[kind])
    for garbage in (b"garbage", b"x", b"\x1f", b"\x28\xb5\x2f\xfe", b"\0\0x", os.urandom(50).replace(b"\0", b"1")):
        path.write_bytes(whole + garbage)
        with pytest.raises(DataError, match=rf"c\.jsonl\.{kind}: .*(damaged|cut off).* byte \d+"):
            everything(path)
    path.write_bytes(b"not compressed")
    with pytest.raises(DataError, match="damaged"):
        everything(path)


def test_zeros_behind_a_gzip_file_are_padding(tmp_path: Path) -> None:
    (tmp_path / "c.gz").write_bytes(FRAMES["gz"][0] + b"\0" * 300_000)
    assert everything(tmp_path / "c.gz") == PIECES[0]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_B1_a_flipped_byte_never_gives_other_bytes(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"c.{kind}"
    content = PIECES[0] * 3
    whole = gzip.compress(content) if kind == "gz" else zst(content)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        path.write_bytes(bytes(damaged))
        try:
            read = everything(path)
        except DataError as error:
            assert str(path) in str(error)
        else:  # gzip's header has a time and flags that nothing protects, zst's frame header an unused bit
            assert read == content


def test_frames_of_every_kind_are_read(tmp_path: Path) -> None:
    random.seed(5)
    path = tmp_path / "c.zst"
    incompressible = random.randbytes(300_000)
    parts = [b"a" * 2_000_000, incompressible, b"", b"x", PIECES[0] * 5000, incompressible[:5]]
    frames = [zst(part, checksum=n % 2 == 0, size=n % 3 == 0, level=1 + 6 * (n % 3)) for n, part in enumerate(parts)]
    long = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    ).compress(incompressible)
    empty_skippable = b"\x50\x2a\x4d\x18\0\0\0\0"
    path.write_bytes(SKIPPABLE + empty_skippable + SKIPPABLE.join(frames) + long + empty_skippable)
    for size in (999, 1 << 20):
        assert everything(path, size) == b"".join(parts) + incompressible
    (tmp_path / "c.gz").write_bytes(b"".join(gzip.compress(part, level) for level, part in enumerate(parts)))
    assert everything(tmp_path / "c.gz", 4096) == b"".join(parts)
    path.write_bytes(SKIPPABLE[:-1])
    with pytest.raises(DataError, match="cut off at byte 12"):
        everything(path)


def test_B1_windows_larger_than_the_limit_are_refused_by_name(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True, write_content_size=False)
    ).compressobj()
    (tmp_path / "c.zst").write_bytes(compressor.compress(b"abc" * 100) + compressor.flush())
    with pytest.raises(DataError, match=r"c\.zst: .*a window of 268435456 bytes.*zstd --long=27"):
        everything(tmp_path / "c.zst")
