"""What an unfinished export keeps beside its files, so that the next start goes on: of what, and what is written.

`record.json` says what is being made; a folder made of something else is begun anew. `written.jsonl` has one line for
each tensor that is in its file, with a checksum of its values: only what still has that checksum counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_RECORD, _WRITTEN = ".export-record.json", ".export-written.jsonl"


class ExportRecord:
    """The record in an aside folder. Threads may add to it at once."""

    def __init__(self, folder: Path, of: Mapping[str, Any]) -> None:
        """Opens the record of making `of` in `folder`, which exists and is empty or was matched by `continues`."""
        self._folder = folder
        self.written = _read_written(folder)
        if not (folder / _RECORD).exists():
            (folder / _RECORD).write_text(json.dumps(of, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        self._descriptor = os.open(folder / _WRITTEN, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        os.write(self._descriptor, b"\n")  # a last line that was cut off must not spoil the next

    @staticmethod
    def continues(folder: Path, of: Mapping[str, Any]) -> bool:
        """Whether what lies in `folder` is an unfinished making of just this."""
        try:
            found = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(found == json.loads(json.dumps(of)))

    def add(self, tensor: str, checksum: int) -> None:
        """Notes a tensor that is wholly in its file."""
        line = json.dumps({"tensor": tensor, "crc32": checksum}) + "\n"
        os.write(self._descriptor, line.encode())

    def close(self) -> None:
        """Leaves the record for the next start."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def remove(self) -> None:
        """The folder is finished: it shall hold no trace of the record."""
        self.close()
        (self._folder / _RECORD).unlink(missing_ok=True)
        (self._folder / _WRITTEN).unlink(missing_ok=True)


def _read_written(folder: Path) -> dict[str, int]:
    """Checksums by tensor; lines that were cut off are left out."""
    found: dict[str, int] = {}
    try:
        lines = (folder / _WRITTEN).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return found
    for line in lines:
        try:
            entry = json.loads(line)
            found[str(entry["tensor"])] = int(entry["crc32"])
        except (ValueError, KeyError, TypeError):
            continue
    return found
