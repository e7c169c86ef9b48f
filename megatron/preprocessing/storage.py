"""Errors of the disk, in words."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.config.errors import IO_REMEDIES, StorageError

_REMEDIES = {**IO_REMEDIES, errno.EFBIG: "raise the limit on the size of files (ulimit -f), or write to another disk"}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns an OSError into a StorageError with the file (`path` where the error names none), reason and remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = _REMEDIES.get(error.errno or 0, "see to the disk")
        raise StorageError(f"{error.filename or path}: {reason}: {remedy}") from error
