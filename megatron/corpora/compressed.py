"""Byte streams out of plain, gzip and Zstandard files, read in bounded steps; a cut-off or damaged file is an error.

zstandard's own readers take a cut-off file for a whole one, so the frames are walked here beside the decoder.
Formats: RFC 1952 (gzip), RFC 8878 (Zstandard).
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import BinaryIO, Literal, Protocol, cast

import zstandard

from megatron.config.errors import DataError

Compression = Literal["", "gz", "zst"]

READ_BYTES = 1 << 18  # of compressed input at a time
LONGEST_WINDOW = 1 << 27  # bytes; what `zstd --long` uses, and what zstd itself decompresses without being told to

_FRAME, _SKIPPABLE = 0xFD2FB528, 0x184D2A50
_DICTIONARY_ID_BYTES = (0, 1, 2, 4)


class ByteStream(Protocol):
    """Decompressed bytes, one after another."""

    def read(self, size: int, /) -> bytes:
        """Between 1 and `size` bytes, or none at the end. Raises DataError where the file is damaged or cut off."""


def compression_of(name: str) -> Compression:
    """How a file is compressed, by its name."""
    lower = name.lower()
    return "gz" if lower.endswith((".gz", ".gzip")) else "zst" if lower.endswith((".zst", ".zstd")) else ""


def name_inside(name: str) -> str:
    """The name without the ending of its compression: "a.jsonl" for "a.jsonl.gz"."""
    return name.rpartition(".")[0] if compression_of(name) else name


def open_file(path: str) -> BinaryIO:
    """The raw bytes of a file. Raises DataError where it is gone or may not be read."""
    try:
        return open(path, "rb", buffering=0)
    except PermissionError:
        raise DataError(f"{path}: no permission to read it") from None
    except FileNotFoundError:
        raise DataError(f"{path}: it was there when the files were listed, and is gone now") from None
    except (IsADirectoryError, NotADirectoryError):
        raise DataError(f"{path}: a file is expected; it has changed since the files were listed") from None


@contextmanager
def open_stream(path: str) -> Iterator[ByteStream]:
    """The bytes of a file, decompressed by its name's ending."""
    with open_file(path) as raw:
        compression = compression_of(path)
        yield GzipStream(path, raw) if compression == "gz" else ZstdStream(path, raw) if compression == "zst" else raw


class GzipStream:
    """The members of a gzip file, one after another; zeros after the last one are padding, as gzip itself has it."""

    def __init__(self, path: str, raw: BinaryIO) -> None:
        self._path, self._raw = path, raw
        self._input = b""
        self._at = 0  # offset in the file of the end of _input
        self._members = 0
        self._decoder = None if self._between_members() else zlib.decompressobj(31)

    def read(self, size: int, /) -> bytes:
        while self._decoder is not None:
            try:
                content = self._decoder.decompress(self._input, size)
            except zlib.error as error:
                raise self._damaged(str(error)) from None
            ended = self._decoder.eof
            self._input = self._decoder.unused_data if ended else self._decoder.unconsumed_tail
            if ended:
                self._members += 1
                self._decoder = None if self._between_members() else zlib.decompressobj(31)
            elif not content and not self._input and not self._fill():
                raise DataError(
                    f"{self._path}: the gzip file was cut off at byte {self._at}: its end is missing. Get it again"
                )
            if content:
                return content
        return b""

    def _fill(self) -> bool:
        self._input = self._raw.read(READ_BYTES)
        self._at += len(self._input)
        return bool(self._input)

    def _between_members(self) -> bool:
        """True at the file's end; else the next member begins at `_input`."""
        while True:
            if not self._input and not self._fill():
                if self._at == 0:
                    raise DataError(f"{self._path}: the gzip file was cut off at byte 0: it is empty. Get it again")
                return True
            if self._members and self._input[0] == 0:
                self._input = self._input.lstrip(b"\0")
                if self._input:
                    raise self._damaged("bytes that are not gzip after the zeros at its end")
                continue
            if len(self._input) < 2:
                more = self._raw.read(READ_BYTES)
                self._at += len(more)
                self._input += more
            if not b"\x1f\x8b".startswith(self._input[:2]):
                where = "after the end of the gzip data" if self._members else "at its begin"
                raise self._damaged(f"bytes that are not gzip {where}")
            return False

    def _damaged(self, what: str) -> DataError:
        at = self._at - len(self._input)
        return DataError(f"{self._path}: the gzip file is damaged near byte {at}: {what}. Get it again")


class ZstdStream:
    """The frames of a Zstandard file, one after another; skippable frames give nothing."""

    def __init__(self, path: str, raw: BinaryIO) -> None:
        self._path = path
        self._frames = _CheckedFrames(path, raw)
        self._reader = zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW).stream_reader(
            cast(BinaryIO, self._frames), read_size=READ_BYTES, read_across_frames=True
        )

    def read(self, size: int, /) -> bytes:
        try:
            content: bytes = self._reader.read(size)
        except zstandard.ZstdError as error:
            at = self._frames.at
            raise DataError(
                f"{self._path}: the Zstandard file is damaged before byte {at}: {error}. Get it again"
            ) from None
        if not content:
            self._frames.finish()
        return content


class _CheckedFrames:
    """Hands a file to the decoder and follows its frames and blocks, so that its end is known to be one."""

    def __init__(self, path: str, raw: BinaryIO) -> None:
        self._path, self._raw = path, raw
        self.at = 0  # bytes handed out
        self._whole = True  # False inside a frame
        self._walk = self._frames()
        self._need = next(self._walk)  # bytes that the walk waits for; negative: to be passed over
        self._held = b""  # of the bytes that it waits for
        self._offset = 0  # where in the file those begin

    def read(self, size: int = -1, /) -> bytes:
        content = self._raw.read(size if size > 0 else READ_BYTES)
        if not content:
            self.finish()
        self._follow(content)
        self.at += len(content)
        return content

    def finish(self) -> None:
        """Raises DataError unless what was handed out ends with a frame."""
        if not self._whole or self._held or not self.at:
            raise DataError(
                f"{self._path}: the Zstandard file was cut off at byte {self.at}: "
                f"{'the end of its last frame is missing' if self.at else 'it is empty'}. Get it again"
            )

    def _follow(self, content: bytes) -> None:
        place = 0
        while place < len(content):
            if self._need < 0:
                step = min(-self._need, len(content) - place)
                self._need += step
                place += step
                if self._need == 0:
                    self._need = self._walk.send(b"")
            else:
                taken = content[place : place + self._need - len(self._held)]
                self._held += taken
                place += len(taken)
                if len(self._held) == self._need:
                    held, self._held = self._held, b""
                    self._offset = self.at + place - len(held)
                    self._need = self._walk.send(held)

    def _frames(self) -> Generator[int, bytes, None]:
        """A walk over the file: yields how many bytes it must see (or, negative, pass over), and is sent them."""
        while True:
            self._whole = True
            magic = int.from_bytes((yield 4), "little")
            self._whole = False
            if magic & 0xFFFFFFF0 == _SKIPPABLE:
                if size := int.from_bytes((yield 4), "little"):
                    yield -size
                continue
            if magic != _FRAME:
                raise self._damaged("bytes that are not a Zstandard frame")
            (descriptor,) = yield 1
            single, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
            window = 0
            if not single:
                (exponent_and_mantissa,) = yield 1
                base = 1 << (10 + (exponent_and_mantissa >> 3))
                window = base + base // 8 * (exponent_and_mantissa & 7)
            if dictionary := _DICTIONARY_ID_BYTES[descriptor & 3]:
                yield dictionary
            if content_size := (single, 2, 4, 8)[descriptor >> 6]:
                size = int.from_bytes((yield content_size), "little")
                window = max(window, size if single else 0)
            self._check_window(window)
            last = 0
            while not last:
                header = int.from_bytes((yield 3), "little")
                last, kind, size = header & 1, header >> 1 & 3, header >> 3
                if kind == 3:
                    raise self._damaged("a block of a kind that does not exist")
                if kind == 1 or size:
                    yield -(1 if kind == 1 else size)
            if checksum:
                yield 4

    def _check_window(self, window: int) -> None:
        if window > LONGEST_WINDOW:
            raise DataError(
                f"{self._path}: a Zstandard frame (its header ends at byte {self._offset}) needs a window of {window} "
                f"bytes, more than the {LONGEST_WINDOW} that are allowed: compress it again with `zstd --long=27`"
            )

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{self._path}: the Zstandard file is damaged at byte {self._offset}: {what}. Get it again")
