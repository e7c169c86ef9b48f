"""The few file operations that a checkpoint is made of, each durable when it returns. Tests replace this object."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron.config.durable_files import sync_path
from megatron.config.errors import CheckpointError, StorageError

Tensors = Mapping[str, torch.Tensor]


class Storage:
    """Durable writes: what a method wrote is on the disk when it returns, or StorageError names path and reason."""

    def make_folder(self, path: Path) -> None:
        """A folder and its parents. It is durable only after `sync_folder` of its parent."""
        with io_errors(path, "create the folder"):
            path.mkdir(parents=True, exist_ok=True)

    def write_bytes(self, path: Path, data: bytes) -> None:
        """One new file with these bytes, fsynced."""
        with io_errors(path, "write"), open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def write_tensors(self, path: Path, tensors: Tensors) -> None:
        """One new safetensors file, fsynced. Tensors are written from the CPU, contiguous, each with its own memory."""
        with io_errors(path, "write"):
            save_file({name: _own_memory(tensor) for name, tensor in tensors.items()}, path)
            sync_path(path)

    def copy_file(self, source: Path, target: Path) -> None:
        """A new copy of a file, fsynced."""
        with io_errors(target, f"copy {source} to"):
            shutil.copyfile(source, target)
            sync_path(target)

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
        """Deletes a folder that no one reads any more."""
        with io_errors(path, "remove"):
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
        remedy = "free some space" if number in (errno.ENOSPC, errno.EDQUOT) else "see to the disk"
        raise StorageError(
            f"{path}: cannot {action}: {os.strerror(number)}; what was saved before is untouched: "
            f"{remedy}, then start the run again"
        ) from error


def _error_number(error: Exception) -> int | None:
    """The errno of an I/O error; the safetensors library gives it in words only."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    match = re.search(r"os error (\d+)", str(error))
    return int(match.group(1)) if match else None


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().to("cpu").contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()
