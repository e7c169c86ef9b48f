"""The few file operations that a checkpoint is made of, each durable when it returns. Tests replace this object."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from megatron.checkpoint.manifest import Seal
from megatron.checkpoint.tensor_format import file_bytes
from megatron.config.durable_files import sync_path
from megatron.config.errors import IO_REMEDIES, CheckpointError, StorageError

Tensors = Mapping[str, torch.Tensor]
_CHUNK = 16 * 2**20
_REMOVALS = 20


class Storage:
    """Durable writes: what a method wrote is on the disk when it returns, or StorageError names path and reason.

    A file's seal is of the bytes meant, hashed on their way to the file: what a disk made of them, reading shows.
    """

    def make_folder(self, path: Path) -> None:
        """A folder and its parents. It is durable only after `sync_folder` of its parent."""
        with io_errors(path, "create the folder"):
            path.mkdir(parents=True, exist_ok=True)

    def write_bytes(self, path: Path, data: bytes) -> Seal:
        """One new file with these bytes, fsynced."""
        with io_errors(path, f"write {len(data):,} bytes"):
            return _write(path, [data])

    def write_tensors(self, path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Seal:
        """One new safetensors file, fsynced. Tensors of any device and stride; one at a time is copied."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with io_errors(path, f"write {size:,} bytes of tensors"):
            return _write(path, file_bytes(tensors, metadata or {}))

    def write_pieces(self, path: Path, pieces: Iterable[bytes | memoryview]) -> Seal:
        """One new file of these pieces one after another, fsynced; a piece may go before the next one is made."""
        with io_errors(path, "write"):
            return _write(path, pieces)

    def copy_file(self, source: Path, target: Path) -> Seal:
        """A new copy of a file, fsynced."""
        with io_errors(target, f"copy {source} to"), open(source, "rb") as file:
            return _write(target, iter(lambda: file.read(_CHUNK), b""))

    def sync_folder(self, path: Path) -> None:
        """Makes the folder's entries durable."""
        with io_errors(path, "fsync the folder"):
            sync_path(path)

    def rename(self, source: Path, target: Path) -> None:
        """One atomic rename inside a file system, durable."""
        with io_errors(target, f"rename {source.name} to"):
            os.rename(source, target)
            for parent in {source.parent, target.parent}:
                sync_path(parent)

    def remove_folder(self, path: Path) -> None:
        """Deletes a folder that no one reads any more. A rank of a killed job may still write in it for a moment."""
        with io_errors(path, "remove"):
            for _ in range(_REMOVALS):
                try:
                    shutil.rmtree(path)
                except FileNotFoundError:
                    continue  # an entry went while it was walked
                except OSError as error:
                    if error.errno != errno.ENOTEMPTY:
                        raise
                    time.sleep(0.1)
                else:
                    return
            if path.exists():
                shutil.rmtree(path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises CheckpointError where it is not one."""
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from None


@contextmanager
def io_errors(path: Path, action: str) -> Iterator[None]:
    """Turns an I/O error into a StorageError that names the path, the reason and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number is None:
            raise
        remedy = IO_REMEDIES.get(number, "see to the disk")
        raise StorageError(
            f"{path}: cannot {action}: {os.strerror(number)}{_room(path, number)}; what was saved before is untouched: "
            f"{remedy}, then start the run again"
        ) from error


def _room(path: Path, number: int) -> str:
    """How much a full disk holds, and how much of it is free; empty where that is not what is wrong."""
    folder = next((parent for parent in path.parents if parent.is_dir()), None)
    if folder is None or number != errno.ENOSPC:
        return ""
    try:
        disk = shutil.disk_usage(folder)
    except OSError:
        return ""
    return f" ({disk.free:,} of the disk's {disk.total:,} bytes are free)"


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> Seal:
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
            del piece  # the tensor behind it may go before the next one is copied
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _error_number(error: Exception) -> int | None:
    """The errno of an I/O error; the safetensors library gives it in words only."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    match = re.search(r"os error (\d+)", str(error))
    return int(match.group(1)) if match else None
