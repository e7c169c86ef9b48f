"""A file of torch.save, read without running anything in it: its plain data, and its tensors in boxes.

This is the one place that reads a pickle (law C2's exception), and only for a user who has allowed it by name.
`inert_pickle` reads the instructions as data. Storages stay on the disk until a box of a tensor is asked for.

Two containers are known. Since torch 1.6 a zip archive, stored and not compressed: NAME/data.pkl, NAME/data/KEY for
each storage, NAME/byteorder. Before, one stream: three pickles (a magic number, the protocol, the machine), the
object's, one with the storages' keys, then the storages, each behind the count of its elements in 8 bytes.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.config.errors import CheckpointError, ConfigError
from megatron.foreign.inert_pickle import MOST_BYTES, InertPickle, Stub

_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_PROTOCOL = 1001
_ITEM = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_CHUNK = 16 * 2**20
_MOST_DIMENSIONS = 16


@dataclass(frozen=True)
class StorageRecord:
    """What a pickle says of a storage: its key in the file, its elements' dtype and how many there are."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, eq=False)
class TensorRecord:
    """What a pickle says of a tensor: a view of a storage. offset, size and stride count elements."""

    storage: StorageRecord
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def require_allowed(allowed: bool, path: Path) -> None:
    """Raises ConfigError unless the user has allowed pickles by name."""
    if not allowed:
        raise ConfigError(
            f"{path}: files of torch.save are pickles, which other programs run as code when they read them. Here they "
            "are read as data and nothing in them is run; say --allow-pickle to have them read"
        )


class TorchFile:
    """One file of torch.save: `content` is its object, with a TensorRecord for each tensor and a Stub for whatever is
    no plain data. For one thread; close it, or use it as a context."""

    def __init__(self, path: Path) -> None:
        """Reads the object, no tensor. Raises CheckpointError where the file is damaged or of another format."""
        self.path = Path(path)
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        self._size = os.fstat(self._file.fileno()).st_size
        self._places: dict[str, tuple[int, int]] = {}
        self._checksums: dict[str, int] = {}
        self._item_sizes: dict[str, int] = {}
        try:
            self.content = self._read_content()
        except CheckpointError:
            self.close()
            raise

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _at(self, begin: int, count: int) -> bytes:
        """So many bytes of the file. Raises CheckpointError where it has become shorter, or cannot be read."""
        raw = memoryview(bytearray(count))
        self._read_into(raw, begin)
        return bytes(raw)

    def _read_into(self, raw: memoryview, begin: int) -> None:
        done = 0
        try:
            while done < len(raw):
                got = os.preadv(self._file.fileno(), [raw[done : done + _CHUNK]], begin + done)
                if not got:
                    raise CheckpointError(f"{self.path}: ends at byte {begin + done}: it has become shorter")
                done += got
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror or error}") from None

    def _read_content(self) -> Any:
        head = self._at(0, min(4, self._size))
        if head == b"PK\x03\x04":
            return self._from_zip()
        if head[:2] == b"\x80\x02":
            return self._from_stream()
        raise CheckpointError(
            f"{self.path}: begins with {head!r}, so it is no file of torch.save: cut short, or another's?"
        )

    def _from_zip(self) -> Any:
        try:
            with zipfile.ZipFile(self._file) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path}: not a whole zip archive of torch.save: {error}: cut short?") from None
        root = entries[0].filename.split("/")[0] if entries else ""
        for entry in entries:
            self._note(entry, root)
        if "data.pkl" not in self._places:
            raise CheckpointError(f"{self.path}: a zip archive without data.pkl: not a file of torch.save")
        order = self._bytes("byteorder") if "byteorder" in self._places else b"little"
        if order.strip() != b"little":
            raise CheckpointError(f"{self.path}: written on a {order[:16]!r} machine; save it again on another")
        begin, end = self._places["data.pkl"]
        if end - begin > MOST_BYTES:
            raise CheckpointError(f"{self.path}: data.pkl has {end - begin} bytes, and at most {MOST_BYTES} are read")
        return self._pickle(self._at(begin, end - begin), 0).read()

    def _note(self, entry: zipfile.ZipInfo, root: str) -> None:
        """Where an entry's bytes lie. Nothing is unpacked, yet a name that would lead out of a folder is refused."""
        name = entry.filename
        parts = name.split("/")
        if parts[0] != root or ".." in parts or "\\" in name or "" in parts[:-1]:
            raise CheckpointError(f"{self.path}: the archive holds {name!r}, which leads out of it: not of torch.save")
        at = entry.header_offset
        head = self._at(at, 30) if 0 <= at <= self._size - 30 else b""
        begin = at + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        end = begin + entry.file_size
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise CheckpointError(f"{self.path}: {name} is compressed, which torch.save never does: not its file")
        if head[:4] != b"PK\x03\x04" or end > self._size:
            raise CheckpointError(f"{self.path}: {name} reaches to byte {end} of {self._size}: the file is damaged")
        key = "/".join(parts[1:])
        if key in self._places:
            raise CheckpointError(f"{self.path}: the archive holds {name!r} twice: not a file of torch.save")
        self._places[key] = (begin, end)
        self._checksums[key] = entry.CRC

    def _from_stream(self) -> Any:
        words = self._at(0, min(self._size, MOST_BYTES))
        head = self._pickle(words, 0)
        if head.read() != _MAGIC:
            raise CheckpointError(f"{self.path}: a pickle, but not of torch.save: it lacks the magic number")
        at, values = head.position, []
        for _ in range(4):
            reader = self._pickle(words, at)
            values.append(reader.read())
            at = reader.position
        protocol, machine, content, keys = values
        if protocol != _STREAM_PROTOCOL or not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise CheckpointError(f"{self.path}: of protocol {protocol!r}, or of a big-endian machine: cannot be read")
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise CheckpointError(f"{self.path}: its storages have no list of keys: the file is damaged")
        for key in keys:
            count = int.from_bytes(self._at(at, 8), "little") if at + 8 <= self._size else 0
            end = at + 8 + count * self._item_sizes.get(key, 1)
            if end > self._size:
                raise CheckpointError(f"{self.path}: storage {key} ends at byte {end} of {self._size}: cut short?")
            self._places[f"data/{key}"] = (at + 8, end)
            at = end
        return content

    def _pickle(self, words: bytes, begin: int) -> InertPickle:
        return InertPickle(words, str(self.path), _CALLS, self._storage, begin)

    def _storage(self, words: Any) -> StorageRecord:
        """The persistent id of a storage: ("storage", its class, key, device, count of elements[, view])."""
        kind, storage, key, _, count, *view = words
        name = storage.name.rsplit(".", 1)[-1] if isinstance(storage, Stub) else ""
        if kind != "storage" or name not in _ITEM or not isinstance(key, str) or not _whole(count) or any(view):
            raise ValueError("a storage that torch.save does not write")
        self._item_sizes[key] = _ITEM[name].itemsize
        return StorageRecord(key, _ITEM[name], count)

    def _bytes(self, key: str) -> bytes:
        begin, end = self._places[key]
        return self._at(begin, min(end - begin, 64))

    def verify(self) -> None:
        """Compares every part of an archive with its checksum. Raises CheckpointError that names a damaged one.

        The old stream has none.
        """
        for key, wanted in self._checksums.items():
            begin, end = self._places[key]
            found = 0
            for at in range(begin, end, _CHUNK):
                found = zlib.crc32(self._at(at, min(_CHUNK, end - at)), found)
            if found != wanted:
                raise CheckpointError(
                    f"{self.path}: {key}: expected CRC-32 {wanted:08x}, found {found:08x}: the file is damaged"
                )

    def check(self, name: str, record: TensorRecord) -> None:
        """Raises CheckpointError unless the tensor lies in its storage, no element twice, and that in the file."""
        place = self._places.get(f"data/{record.storage.key}")
        if place is None:
            raise CheckpointError(f"{self.path}: tensor {name}: its storage {record.storage.key} is missing")
        there, needed = place[1] - place[0], _span(record) * record.dtype.itemsize
        if needed > there:
            raise CheckpointError(
                f"{self.path}: tensor {name} of {list(record.shape)} {record.dtype} needs {needed} bytes of storage "
                f"{record.storage.key}, which has {there}: the file is damaged"
            )
        reach = 0
        for stride, size in sorted((s, n) for s, n in zip(record.stride, record.shape, strict=True) if n > 1):
            if stride <= reach:
                raise CheckpointError(
                    f"{self.path}: tensor {name} of {list(record.shape)} has strides {list(record.stride)}, so that "
                    "its elements lie upon each other: such a tensor is no weight"
                )
            reach += stride * (size - 1)

    def read(self, name: str, record: TensorRecord, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A new tensor on the CPU: the box of `shape` that begins at `offset`; about its own bytes are read.

        Raises CheckpointError as `check` does, ValueError beyond the tensor.
        """
        self.check(name, record)
        if len(offset) != len(record.shape) or any(
            begin < 0 or n < 0 or begin + n > whole for begin, n, whole in zip(offset, shape, record.shape, strict=True)
        ):
            raise ValueError(f"{name}: no box of {list(shape)} at {list(offset)} in a tensor of {list(record.shape)}")
        box = torch.empty(tuple(shape), dtype=record.dtype)
        if box.numel():
            begin = self._places[f"data/{record.storage.key}"][0]
            first = record.offset + sum(at * step for at, step in zip(offset, record.stride, strict=True))
            at = begin + first * record.dtype.itemsize
            if record.stride == box.stride() or box.numel() == 1:
                self._read_into(memoryview(box.reshape(-1).view(torch.uint8).numpy().data), at)
            else:
                self._fill(box, at, record.stride)
        return box

    def _fill(self, box: Tensor, at: int, stride: tuple[int, ...]) -> None:
        """Copies what lies at byte `at` with these strides, in parts along the widest until they are not too large."""
        size = box.element_size()
        span = 1 + sum((n - 1) * step for n, step in zip(box.shape, stride, strict=True))
        if span * size <= _CHUNK:
            raw = bytearray(self._at(at, span * size))
            box.copy_(torch.frombuffer(raw, dtype=box.dtype).as_strided(box.shape, stride))
            return
        along = max((n for n in range(box.dim()) if box.shape[n] > 1), key=lambda n: stride[n])
        step = max(1, _CHUNK // (stride[along] * size))
        for begin in range(0, box.shape[along], step):
            part = box.narrow(along, begin, min(step, box.shape[along] - begin))
            self._fill(part, at + begin * stride[along] * size, stride)


def _span(record: TensorRecord) -> int:
    """Elements of the storage from its beginning to the tensor's last one."""
    if 0 in record.shape:
        return 0
    return record.offset + 1 + sum((n - 1) * step for n, step in zip(record.shape, record.stride, strict=True))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _rebuilt(arguments: tuple[Any, ...], dtype: torch.dtype | None = None) -> TensorRecord:
    storage, offset, shape, stride, *_ = arguments
    fits = isinstance(storage, StorageRecord) and isinstance(shape, tuple) and isinstance(stride, tuple)
    if not fits or len(shape) != len(stride) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError("a tensor that torch.save does not write")
    if not all(map(_whole, (offset, *shape, *stride))) or prod(shape) >= 2**62:
        raise ValueError("a tensor of impossible sizes")
    return TensorRecord(storage, dtype or storage.dtype, offset, shape, stride)


def _rebuilt_with_dtype(arguments: tuple[Any, ...]) -> Any:
    """_rebuild_tensor_v3: the dtype is named in the seventh place, of a storage without one."""
    named = arguments[6]
    if not isinstance(named, Stub) or named.name not in _DTYPES:
        return Stub("torch._utils._rebuild_tensor_v3", arguments)
    return _rebuilt(arguments[:4], _DTYPES[named.name])


def _parameter(arguments: tuple[Any, ...]) -> Any:
    return arguments[0] if isinstance(arguments[0], TensorRecord) else Stub("torch.nn.Parameter", arguments)


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arguments[0]) if arguments and isinstance(arguments[0], tuple | list) else ()


def _ordered(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise ValueError("an OrderedDict made from a list, as pickles of Python 2 have it")
    return {}


_CALLS = {
    "torch._utils._rebuild_tensor": _rebuilt,
    "torch._utils._rebuild_tensor_v2": _rebuilt,
    "torch._utils._rebuild_tensor_v3": _rebuilt_with_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": lambda arguments: {},
}


def printable(text: str) -> str:
    """A name from a file for a message: itself where it is short and plain, else so that no terminal obeys it."""
    return text if text.isprintable() and len(text) <= 200 else ascii(text)[:200]


def namespace(value: Any) -> dict[str, Any] | None:
    """The attributes of an argparse.Namespace (or types.SimpleNamespace), which a file holds as a Stub; None of
    anything else."""
    if isinstance(value, Stub) and value.name in ("argparse.Namespace", "types.SimpleNamespace"):
        state = value.state
        return {str(key): item for key, item in state.items()} if isinstance(state, dict) else {}
    return None


def flat_tensors(where: str, tree: Any) -> Iterator[tuple[str, TensorRecord]]:
    """Every tensor below nested dictionaries, by its keys joined with dots. Stubs and other values are passed over.

    Raises CheckpointError for containers within themselves, or in two places.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", tree)]
    while waiting:
        prefix, here = waiting.pop()
        if isinstance(here, TensorRecord):
            yield prefix, here
        elif isinstance(here, dict):
            if id(here) in seen and here:
                raise CheckpointError(
                    f"{where}: {printable(prefix)}: the same dictionary lies in two places: not a state of a model"
                )
            seen.add(id(here))
            joined = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in here.items()]
            waiting.extend(reversed(joined))
