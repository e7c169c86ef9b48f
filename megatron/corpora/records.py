"""What the readers of all formats do with a record: words for its flaws, and the filters on what it says of itself."""

from __future__ import annotations

import codecs
from collections import Counter

from megatron.corpora.document import BadRecord, Document
from megatron.corpora.licences import licences_allowed
from megatron.corpora.lines import LongLine
from megatron.corpora.read_options import InputFile, ReadOptions

ARRAY = "the file's top level is a JSON array, and JSON lines are one object a line: convert it with `jq -c '.[]'`"


def wanted_document(document: Document, options: ReadOptions, skipped: Counter[str]) -> bool:
    """Whether language and licence are among those asked for; counts it where not."""
    if options.languages and document.language.lower() not in {name.lower() for name in options.languages}:
        skipped["language not asked for"] += 1
        return False
    if options.licences and not licences_allowed(document.licence, options.licences):
        skipped["licence not allowed" if document.licence else "licence unknown"] += 1
        return False
    return True


def long_line(file: InputFile, line: LongLine, options: ReadOptions, what: str = "line") -> BadRecord:
    """A line longer than `max_document_bytes` as a bad record."""
    reason = (
        f"the {what} has {line.size} bytes, more than {options.max_document_bytes}: raise max_document_bytes, or cut "
        "the document"
    )
    begin = line.head.removeprefix(codecs.BOM_UTF8).lstrip()
    if file.kind == "json-lines" and line.offset == 0 and begin.startswith(b"["):
        reason += f"; {ARRAY}"
    return BadRecord(file.path, line.number, line.offset, reason, line.head)


def not_utf8(content: bytes, offset: int, error: UnicodeDecodeError) -> str:
    """What to say of bytes that begin at `offset` of their file and are not UTF-8."""
    return (
        f"byte {offset + error.start} (0x{content[error.start]:02x}) is not UTF-8: {error.reason}. Convert the file to "
        "UTF-8, or leave it out"
    )


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
