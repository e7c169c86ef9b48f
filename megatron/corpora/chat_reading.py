"""Blocks of chat records to conversations: JSON lines and parquet rows. Runs in a worker."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import orjson

from megatron.corpora.blocks import Block, batches_of
from megatron.corpora.chat_records import FIELDS, Conversation, Flaw, RecordPlace, conversation_of, learned_messages
from megatron.corpora.document import BAD_CONTENT_BYTES, BadRecord, Document
from megatron.corpora.json_lines import explained
from megatron.corpora.lines import LineBatch, LongLine
from megatron.corpora.payloads import Rows, WholeFiles
from megatron.corpora.read_options import InputFile, ReadOptions
from megatron.corpora.records import kind_of, long_line, wanted_document

# keys that stand once in a record, and seldom inside one
_ONCE = {key: f'"{key}"'.encode() for key in FIELDS}


def read_chats(block: Block, options: ReadOptions, skipped: Counter[str]) -> Iterator[Conversation | BadRecord]:
    """The conversations and bad records of a block, in order. `skipped` counts what is neither."""
    payload = block.payload
    if isinstance(payload, WholeFiles):
        skipped["file of no chat format (JSON lines and parquet are read)"] += len(payload.files)
        return
    if isinstance(payload, Rows):
        from megatron.corpora.parquet import read_records

        for row, line, record, flaw in read_records(payload.file, payload.first, payload.count, options):
            content = json.dumps(record, default=str).encode()[:BAD_CONTENT_BYTES]
            place = RecordPlace(payload.file.path, line, None, content)
            item = _conversation(record, f"{payload.file.name}@{row}", place, options, flaw)
            if isinstance(item, BadRecord) or _wanted(item, options, skipped):
                yield item
        return
    assert payload is not None  # only blocks that were wanted are read
    if payload.file.kind != "json-lines":
        skipped["file of no chat format (JSON lines and parquet are read)"] += 1
        return
    for batch in batches_of(payload, options):
        if isinstance(batch, LongLine):
            yield long_line(payload.file, batch, options)
            continue
        for item in _of_lines(batch, payload.file, options, skipped):
            if isinstance(item, BadRecord) or _wanted(item, options, skipped):
                yield item


def _of_lines(
    batch: LineBatch, file: InputFile, options: ReadOptions, skipped: Counter[str]
) -> Iterator[Conversation | BadRecord]:
    offset = batch.offset
    for number, line in enumerate(batch.lines, start=batch.number):
        start, content = offset, line
        offset += len(line)
        if start == 0 and content.startswith(codecs.BOM_UTF8):
            content, start = content[3:], 3
        if not content.strip():
            skipped["blank line"] += 1
            continue
        place = RecordPlace(file.path, number, start, content.removesuffix(b"\n")[:BAD_CONTENT_BYTES])
        record, flaw = _parsed(content, start, number)
        yield _conversation(record, f"{file.name}@{start}", place, options, flaw)


def _parsed(line: bytes, offset: int, number: int) -> tuple[dict[str, Any], str]:
    """The record on a line, and what is wrong with it: "" for nothing."""
    try:
        record = orjson.loads(line)
    except ValueError:
        record = None
    twice = isinstance(record, dict) and any(key in record and line.count(word) > 1 for key, word in _ONCE.items())
    if not isinstance(record, dict) or twice:
        reason = explained(line, offset, number, FIELDS)
        return record if isinstance(record, dict) else {}, reason
    return record, ""


def _conversation(
    record: dict[str, Any], own_id: str, place: RecordPlace, options: ReadOptions, flaw: str
) -> Conversation | BadRecord:
    try:
        if flaw:
            raise Flaw(flaw)
        messages, tools = conversation_of(record, options.chat_format)
        given = record.get(options.id_field) if options.id_field else None
        return Conversation(
            id=str(given) if isinstance(given, str | int) else own_id,
            messages=messages,
            tools=tools,
            place=place,
            learned=learned_messages(messages),
            language=_word(record, options.language_field),
            source=_word(record, options.source_field),
            licence=_licence(record, options.licence_field),
        )
    except Flaw as reason:
        return BadRecord(place.file, place.line, place.byte, str(reason), place.content)


def _word(record: dict[str, Any], field: str) -> str:
    value = record.get(field) if field else None
    if value is not None and not isinstance(value, str):
        raise Flaw(f"field {field!r}: a string is expected, this is {kind_of(value)}")
    return value or ""


def _licence(record: dict[str, Any], field: str) -> str:
    value = record.get(field) if field else None
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " AND ".join(f"({item})" if " OR " in item else item for item in value)
    return _word(record, field)


def _wanted(item: Conversation, options: ReadOptions, skipped: Counter[str]) -> bool:
    if not (options.languages or options.licences):
        return True
    document = Document(item.id, "", item.language, item.source, item.licence)
    return wanted_document(document, options, skipped)
