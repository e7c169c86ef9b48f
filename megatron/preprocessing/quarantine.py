"""Bad records set aside: `P.quarantine.jsonl`, one object a record, in the order of the corpus.

Fields: file, line (of the file, from 1; null for a whole file), byte (offset in the file's decompressed stream),
reason, and the record's content, as `text`, or as `base64` where it is not UTF-8; at most 1 MiB of it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from megatron.corpora.document import BadRecord

_PENDING = "line_is_counted_later"
_CHUNK_BYTES = 8 << 20


def quarantine_line(record: BadRecord, first_line: int | None) -> bytes:
    """The record as a line of the quarantine file.

    `first_line` is the number in the file of the block's first line. Where it is not known, neither is the record's
    line yet: `with_lines` counts it.
    """
    try:
        content = {"text": record.content.decode("utf-8")}
    except UnicodeDecodeError:
        content = {"base64": base64.b64encode(record.content).decode("ascii")}
    fields: dict[str, Any] = {"file": record.file, "line": None, "byte": record.byte, "reason": record.reason}
    if record.line is not None:
        if first_line is None:
            fields[_PENDING] = True
        else:
            fields["line"] = first_line + record.line - 1
    return _encoded(fields | content)


def with_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of the quarantine file in order, each with the number of its line in its file.

    Reads each plain file up to its last bad record once, to count line ends.
    """
    counter: _LineCounter | None = None
    for line in lines:
        fields = json.loads(line)
        if not fields.pop(_PENDING, False):
            yield line
            continue
        if counter is None or counter.path != fields["file"]:
            if counter is not None:
                counter.close()
            counter = _LineCounter(fields["file"])
        fields["line"] = counter.line_at(fields["byte"])
        yield _encoded(fields)
    if counter is not None:
        counter.close()


def kind_of(reason: str) -> str:
    """The reason without what is particular to one record: numbers, brackets, and all that follows its first clause.

    "field 'text': a string is expected, this is null" gives "field 'text': a string is expected".
    """
    field = re.match(r"field '[^']*': ", reason)
    start = field.end() if field else 0
    clause = re.split(r"[:;,.] ", re.sub(r" ?\([^)]*\)", "", reason[start:]))[0]
    return reason[:start] + re.sub(r"U\+[0-9A-F]+|(?<![-\w])\d+", "#", clause)


class _LineCounter:
    """Line numbers at growing offsets of one file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by `with_lines`
        self._at = self._ends = 0

    def line_at(self, offset: int) -> int:
        while self._at < offset:
            content = self._file.read(min(_CHUNK_BYTES, offset - self._at))
            if not content:
                break
            self._ends += content.count(b"\n")
            self._at += len(content)
        return self._ends + 1

    def close(self) -> None:
        self._file.close()


def _encoded(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode() + b"\n"
