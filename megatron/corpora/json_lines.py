"""JSON lines to documents: one object a line, parsed by orjson; what it refuses is explained with the standard json.

orjson takes the last of two equal keys without a word. So the quoted keys are counted in the bytes: in valid JSON
`"text"` is a key or a whole value, as a quote inside a string has a backslash before it. Where there are more than
parsed records, the line is parsed again, exactly.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import orjson

from megatron.corpora.document import BAD_CONTENT_BYTES, BadRecord, Document
from megatron.corpora.lines import LineBatch, LongLine
from megatron.corpora.read_options import InputFile, ReadOptions
from megatron.corpora.records import ARRAY, kind_of, long_line, not_utf8, wanted_document
from megatron.tokenizers.base import first_surrogate


def read_json_lines(
    batches: Iterable[LineBatch | LongLine], file: InputFile, options: ReadOptions, skipped: Counter[str]
) -> Iterator[Document | BadRecord]:
    """The document or the bad record of every line that is not blank."""
    parser = _Parser(file, options, skipped)
    for batch in batches:
        if isinstance(batch, LongLine):
            yield long_line(file, batch, options)
        else:
            yield from parser.parse(batch)


_OBJECT = "an object must stand on one line: convert the file with `jq -c .`"


class _Parser:
    def __init__(self, file: InputFile, options: ReadOptions, skipped: Counter[str]) -> None:
        self._file, self._options, self._skipped = file, options, skipped
        self._keys = [
            _Key(name)
            for name in dict.fromkeys(
                (
                    options.text_field,
                    options.id_field,
                    options.language_field,
                    options.source_field,
                    options.licence_field,
                )
            )
            if name
        ]
        self._plain = not (options.language_field or options.source_field or options.licence_field)
        self._missing: set[str] = set()  # fields that some document of the batch lacks
        self._filters = bool(options.languages or options.licences)

    def parse(self, batch: LineBatch) -> list[Document | BadRecord]:
        offset, lines = batch.offset, batch.lines
        if offset == 0 and lines[0].startswith(codecs.BOM_UTF8):
            lines = [lines[0][3:], *lines[1:]]
            offset = 3
        self._missing.clear()
        found = self._fast(lines, offset, batch.number)
        self._check_duplicates(batch, lines, offset, found)
        documents = [item for item in found if item is not None]
        return [item for item in documents if self._kept(item)] if self._filters else documents

    def _fast(self, lines: list[bytes], offset: int, number: int) -> list[Document | BadRecord | None]:
        """One item a line: nothing but the parser and a few look-ups for a line without a flaw."""
        found: list[Document | BadRecord | None] = []
        add, loads, name = found.append, orjson.loads, self._file.name
        text_field, id_field, plain, language = (
            self._options.text_field,
            self._options.id_field,
            self._plain,
            self._file.language,
        )
        for line in lines:
            try:
                record = loads(line)
                text = record[text_field]
                own = record.get(id_field)
                if type(text) is not str:
                    add(self._exact(line, offset, number + len(found)))
                elif plain and type(own) is str:
                    add(Document(own, text, language))
                elif plain and own is None:
                    self._missing.add(id_field)
                    add(Document(f"{name}@{offset}", text, language))
                else:
                    add(self._document(line, record, offset, number + len(found)))
            except (ValueError, KeyError, TypeError, AttributeError):
                add(self._exact(line, offset, number + len(found)))
            offset += len(line)
        return found

    def _check_duplicates(
        self, batch: LineBatch, lines: list[bytes], offset: int, found: list[Document | BadRecord | None]
    ) -> None:
        documents = sum(type(item) is Document for item in found)
        escaped = four_bytes_at_most(b"\\u00", batch.data) > 0
        doubtful = [key for key in self._keys if not key.settles(batch.data, escaped, documents, self._missing)]
        if not doubtful:
            return
        for place, (line, item) in enumerate(zip(lines, found, strict=True)):
            if type(item) is Document and any(key.in_doubt(line) for key in doubtful):
                found[place] = self._exact(line, offset, batch.number + place)
            offset += len(line)

    def _document(self, line: bytes, record: dict[str, Any], offset: int, number: int) -> Document | BadRecord:
        """The document of a record whose text is a string; other fields may be of any type."""
        try:
            options = self._options
            self._missing.update(key.name for key in self._keys if record.get(key.name) is None)
            own = record.get(options.id_field)
            if type(own) is float:  # orjson makes integers of more than 64 bits floats
                own = json.loads(line)[options.id_field]
            if type(own) is int:
                own = str(own)
            elif own is not None and type(own) is not str:
                raise _Flaw(
                    f"field {options.id_field!r}: a string or an integer is expected, this is {kind_of(own)}: set "
                    "id_field to another field, or to nothing"
                )
            return Document(
                f"{self._file.name}@{offset}" if own is None else own,
                record[options.text_field],
                self._string(record, options.language_field) or self._file.language,
                self._string(record, options.source_field),
                self._licence(record) or self._file.licence,
            )
        except _Flaw as flaw:
            return BadRecord(self._file.path, number, offset, str(flaw), line.removesuffix(b"\n")[:BAD_CONTENT_BYTES])

    def _string(self, record: dict[str, Any], field: str) -> str:
        value = record.get(field) if field else None
        if value is not None and type(value) is not str:
            raise _Flaw(f"field {field!r}: a string is expected, this is {kind_of(value)}")
        return value or ""

    def _licence(self, record: dict[str, Any]) -> str:
        field = self._options.licence_field
        value = record.get(field) if field else None
        if type(value) is list and all(type(item) is str for item in value):
            return " AND ".join(f"({item})" if " OR " in item else item for item in value)
        return self._string(record, field)

    def _kept(self, item: Document | BadRecord) -> bool:
        if isinstance(item, BadRecord):
            return True
        return wanted_document(item, self._options, self._skipped)

    def _exact(self, line: bytes, offset: int, number: int) -> Document | BadRecord | None:
        """What a line is, slowly and in full; None for a blank one."""
        if not line.strip():
            self._skipped["blank line"] += 1
            return None
        try:
            record = _parse_exactly(line, offset, [key.name for key in self._keys])
            if not isinstance(record, dict):
                raise _Flaw(f"a JSON object is expected, this is {kind_of(record)}")
            _check_text(record, self._options.text_field)
            try:
                orjson.loads(line)
            except ValueError as error:
                raise _Flaw(_refusal(record, line, str(error))) from None
            return self._document(line, record, offset, number)
        except _Flaw as flaw:
            reason = str(flaw)
            first = number == 1 and offset in (0, len(codecs.BOM_UTF8))
            if first and line.lstrip().startswith(b"["):
                reason += f"; {ARRAY}"
            elif first and line.strip() == b"{":
                reason += f"; {_OBJECT}"
            return BadRecord(self._file.path, number, offset, reason, line.removesuffix(b"\n")[:BAD_CONTENT_BYTES])


def explained(line: bytes, offset: int, number: int, fields: Sequence[str]) -> str:
    """Why a line that is not blank is no record, for any reader of objects; "" for one that is.

    number: of the line within the block, from 1. fields: none of which may stand twice.
    """
    record: Any = None
    try:
        record = _parse_exactly(line, offset, list(fields))
        if not isinstance(record, dict):
            raise _Flaw(f"a JSON object is expected, this is {kind_of(record)}")
        orjson.loads(line)
    except _Flaw as flaw:
        first = number == 1 and offset in (0, len(codecs.BOM_UTF8))
        if first and line.lstrip().startswith(b"["):
            return f"{flaw}; {ARRAY}"
        return f"{flaw}; {_OBJECT}" if first and line.strip() == b"{" else str(flaw)
    except ValueError as error:
        return _refusal(record, line, str(error))
    return ""


class _Flaw(Exception):
    """Why a line is not a document."""


class _Key:
    """How often a field's name stands in bytes of JSON as a whole string, in whatever spelling."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._quoted = json.dumps(name, ensure_ascii=False).encode("utf-8", "surrogatepass")
        # where it is not in its plainest spelling, it holds one of these escapes
        self._escape = b"\\u00" if name.isascii() else b"\\u"
        self._always_spell = not name.isascii()
        self.countable = self._quoted[1:-1] == name.encode("utf-8", "surrogatepass") and "/" not in name
        self._spelled = re.compile(b'"' + b"".join(_spellings(character) for character in name) + b'"')

    def settles(self, data: bytes, escaped: bool, documents: int, missing: set[str]) -> bool:
        """Whether the key cannot stand twice in one of so many documents, by counting it in all their lines.

        Where no document lacks the field and there are as many keys as documents, each has one. `escaped` says whether
        the lines hold an escape that could spell an ASCII letter.
        """
        if not self.countable:
            return False
        expected = 0 if self.name in missing else documents
        if not (escaped or self._always_spell) and len(self._quoted) >= 4:
            if four_bytes_at_most(self._quoted[:4], data) in (0, expected):
                return True
            if four_bytes_at_most(self._quoted[-4:], data) in (0, expected):
                return True
        return self.count(data) in (0, expected)

    def count(self, data: bytes) -> int:
        """How often it stands there, exactly."""
        if self._escape in data:
            return sum(1 for _ in self._spelled.finditer(data))
        return data.count(self._quoted)

    def in_doubt(self, line: bytes) -> bool:
        """True where the key may stand twice at the top level."""
        if not self.countable:
            return True
        count = self.count(line)
        if count < 2:
            return False
        # nested objects may have the key too: a copy without duplicates has as many of them
        return b"\\u0022" in line or orjson.dumps(orjson.loads(line)).count(self._quoted) != count


def four_bytes_at_most(word: bytes, data: bytes) -> int:
    """How often four bytes stand in many; overlapping places count too. Several times faster than bytes.count."""
    wanted, found = int.from_bytes(word, "little"), 0
    for shift in range(min(4, max(0, len(data) - 3))):
        aligned = np.frombuffer(data, "<u4", count=(len(data) - shift) // 4, offset=shift)
        found += int(np.count_nonzero(aligned == wanted))
    return found


def _spellings(character: str) -> bytes:
    units = character.encode("utf-16-be", "surrogatepass")
    escaped = b"".join(b"\\\\u(?i:%02x%02x)" % (units[at], units[at + 1]) for at in range(0, len(units), 2))
    return b"(?:%s|%s)" % (re.escape(character.encode("utf-8", "surrogatepass")), escaped)


def _parse_exactly(line: bytes, offset: int, fields: list[str]) -> object:
    """The value on a line by the standard parser. Raises _Flaw with the reason: also for a field that stands twice."""
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and offset == 0:
        raise _Flaw("the file is UTF-16: convert it with `iconv -f utf-16 -t utf-8`")
    text = _decoded(line, offset)
    last: list[tuple[str, Any]] = []

    def remember(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        last[:] = pairs  # the outermost object comes last
        return dict(pairs)

    try:
        record = json.loads(text, object_pairs_hook=remember, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise _Flaw(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise _Flaw("the JSON is nested too deeply to be read") from None
    except ValueError as error:
        raise _Flaw(f"not JSON that can be read: {error}") from None
    if isinstance(record, dict):
        keys = [key for key, _ in last]
        for field in fields:
            if keys.count(field) > 1:
                raise _Flaw(
                    f"field {field!r} stands {keys.count(field)} times: only one of them can be meant: keep one"
                )
    return record


def _decoded(content: bytes, offset: int) -> str:
    """Bytes as text. Raises _Flaw with the place in the file of the first byte that is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Flaw(not_utf8(content, offset, error)) from None


def _refuse_constant(name: str) -> NoReturn:
    raise _Flaw(f"{name} is not JSON: write null, or leave the field out")


def _check_text(record: dict[str, Any], field: str) -> None:
    if field not in record:
        present = ", ".join(map(repr, list(record)[:8])) or "none"
        raise _Flaw(f"field {field!r} is missing (fields: {present}): name the one that has the text with --text-field")
    value = record[field]
    if not isinstance(value, str):
        raise _Flaw(f"field {field!r}: a string is expected, this is {kind_of(value)}")


def _refusal(record: dict[str, Any], line: bytes, said: str) -> str:
    """Why orjson refuses what the standard parser takes."""
    for field, value in record.items():
        for part in (field, value) if isinstance(value, str) else (field,):
            if (at := first_surrogate(part)) is not None:
                return (
                    f"field {field!r}: lone surrogate U+{ord(part[at]):04X} at character {at} is not Unicode text: "
                    "replace it (U+FFFD is usual)"
                )
    if "surrogate" in said:
        return "a lone surrogate in a nested field is not Unicode text: replace it (U+FFFD is usual)"
    return f"not JSON that can be read: {said}"
