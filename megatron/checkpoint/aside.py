"""A folder that is made beside its place under a name that stays, and put there whole by one rename.

The name stays so that what a killed process has made is found again; a lock keeps two processes from making it at once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.checkpoint.storage import io_errors
from megatron.config.durable_files import sync_path
from megatron.config.errors import ConfigError
from megatron.preprocessing.locks import locked


def aside_of(output: Path) -> Path:
    """Where the folder `output` is made: hidden, on the same file system."""
    return _beside(output, "partial")


@contextmanager
def made_aside(output: Path) -> Iterator[Path]:
    """Locks `output` for this process and gives the path of its aside folder, there or not.

    A replacement that was killed between its two renames is finished first. Raises ConfigError where another process
    is making the same folder, StorageError.
    """
    lock = _beside(output, "lock")
    with io_errors(output.parent, "create the folder"):
        output.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock, shared=False) as held:
        if held is None:
            raise ConfigError(
                f"{output}: another process is writing it now: wait until it has ended, or choose another --output"
            )
        old = _beside(output, "old")
        with io_errors(output, "put back"):
            if old.exists() and not output.exists():
                os.rename(old, output)
        try:
            yield aside_of(output)
        finally:
            lock.unlink(missing_ok=True)  # still held: whoever waits for it looks whether it is the same file


def would_replace(output: Path, overwrite: bool) -> bool:
    """Whether `output` holds anything. Raises ConfigError where it does, and `overwrite` was not said."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not overwrite:
        raise ConfigError(f"{output}: exists already: choose another --output, or say --overwrite")
    return True


def check_apart(read: Path, output: Path, reads: str = "--input", writes: str = "--output") -> None:
    """Refuses an output folder that is, holds or lies within what is read: it would change or replace its own source.

    Links are followed; neither path has to be there. reads, writes: the two options' names. Raises ConfigError.
    """
    source, target = read.resolve(), output.resolve()
    if source == target:
        how = f"is the same path as {reads} {read}"
    elif source in target.parents:
        how = f"lies inside {reads} {read}"
    elif target in source.parents:
        how = f"holds {reads} {read}"
    else:
        return
    raise ConfigError(
        f"{writes} {output}: {how}: writing there would change or replace what is read:"
        f" choose a folder beside it, neither inside it nor around it"
    )


def publish(aside: Path, output: Path, last: Callable[[], None] = lambda: None) -> None:
    """Makes everything in `aside` durable and renames it to `output`; what lies there is replaced. StorageError.

    last: called when all is durable, just before the rename: to remove what only an unfinished folder needs.
    """
    old = _beside(output, "old")
    with io_errors(output, "publish"):
        for path in aside.rglob("*"):
            sync_path(path)
        last()
        sync_path(aside)
        shutil.rmtree(old, ignore_errors=True)
        if output.exists():
            os.rename(output, old)
        os.rename(aside, output)
        sync_path(output.parent)
        shutil.rmtree(old, ignore_errors=True)


def remove(aside: Path) -> None:
    """Removes a folder whatever state it is in. StorageError."""
    with io_errors(aside, "remove"):
        if aside.exists():
            shutil.rmtree(aside)


def _beside(output: Path, what: str) -> Path:
    return output.parent / f".{output.name}.{what}"
