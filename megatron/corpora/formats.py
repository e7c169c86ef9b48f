"""Which reader a file goes to, by its name; and the formats that are not read, by theirs."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import orjson

from megatron.config.errors import DataError
from megatron.corpora.compressed import compression_of, name_inside, open_stream
from megatron.corpora.languages import language_of
from megatron.corpora.read_options import InputFile, Kind, ReadOptions

JSON_LINES = (".jsonl", ".ndjson")
_PEEK_BYTES = 1 << 16

_UNREAD_COMPRESSION = {".xz": "xz -d", ".bz2": "bzip2 -d", ".lz4": "lz4 -d", ".lzma": "xz -d", ".br": "brotli -d"}
_ARCHIVES = {
    ".zip": "unzip",
    ".tar": "tar -xf",
    ".tgz": "tar -xzf",
    ".tbz2": "tar -xjf",
    ".txz": "tar -xJf",
    ".7z": "7z x",
    ".rar": "unrar x",
    ".Z": "uncompress",
}
_CORPUS_ENDINGS = (*JSON_LINES, ".json", ".parquet", ".txt", ".md", ".csv", ".tsv", ".warc", ".arrow")
# what Spark and others leave beside their files
_MARKERS = {"_SUCCESS", "_metadata", "_common_metadata", "_committed", "_started"}


def unread_format(name: str) -> str | None:
    """The command that unpacks a file of a format that is not read; None for a file that is."""
    lower = name.lower()
    if name_inside(lower).endswith(".tar"):
        return f"tar -xf {name}"
    ending = os.path.splitext(name)[1]
    command = _ARCHIVES.get(ending) or _ARCHIVES.get(ending.lower()) or _UNREAD_COMPRESSION.get(ending.lower())
    return f"{command} {name}" if command else None


def named_file(path: Path) -> InputFile:
    """A file that was named itself, not found in a folder. Raises DataError where its format is not read."""
    if (command := unread_format(path.name)) is not None:
        raise DataError(
            f"{path}: files of this kind are not read: unpack it with `{command}`, or convert it to .jsonl.zst"
        )
    if path.suffix.lower() in (".arrow", ".feather", ".avro", ".orc", ".warc", ".lance", ".h5", ".npy"):
        raise DataError(f"{path}: {path.suffix} files are not read: convert it to .parquet or .jsonl.zst")
    kind = _kind(path.name)
    if name_inside(path.name).lower().endswith(".json"):
        kind = "json-lines"
    return _input_file(str(path), readable_name(path.name), kind, path.stat().st_size)


def found_file(
    path: str, name: str, size: int, options: ReadOptions, skipped: Counter[str], licence: str
) -> InputFile | None:
    """A file that was found in a folder, or None, counted, where it is passed over.

    Raises DataError for a corpus in a compression that is not read, as it would be missed without a word.
    """
    base = os.path.basename(path)
    if options.suffixes and not base.endswith(options.suffixes):
        return None
    if base in _MARKERS or (base.startswith(".") and base.endswith(".crc")):
        skipped["marker file"] += 1
        return None
    if (command := unread_format(base)) is not None:
        if os.path.splitext(base)[0].lower().endswith(_CORPUS_ENDINGS):
            raise DataError(f"{path}: files of this kind are not read: unpack it with `{command}`")
        skipped["archive"] += 1
        return None
    kind = _kind(base)
    if base.lower().endswith(".json") and _holds_documents(path, options):
        kind = "json-lines"
    if kind == "text":
        file = _input_file(path, name, kind, size, licence)
        return file if wanted_text(file, options, skipped) else None
    if options.languages and not options.language_field:
        skipped["language not asked for"] += 1
        return None
    return _input_file(path, name, kind, size)


def wanted_text(file: InputFile, options: ReadOptions, skipped: Counter[str]) -> bool:
    """Whether a text or code file passes the filters on size and language; counts it where not."""
    if file.size < options.min_file_bytes:
        skipped["file below min_file_bytes"] += 1
    elif options.max_file_bytes is not None and file.size > options.max_file_bytes:
        skipped["file above max_file_bytes"] += 1
    elif options.languages and file.language.lower() not in {name.lower() for name in options.languages}:
        skipped["language not asked for"] += 1
    else:
        return True
    return False


def readable_name(name: str) -> str:
    """A file's name as Unicode text: bytes of it that are not UTF-8 as backslash escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _kind(name: str) -> Kind:
    inside = name_inside(name).lower()
    if inside.endswith(JSON_LINES) or (compression_of(name) and inside.endswith(".json")):
        return "json-lines"
    return "parquet" if name.lower().endswith((".parquet", ".pq")) else "text"


def _input_file(path: str, name: str, kind: Kind, size: int, licence: str = "") -> InputFile:
    return InputFile(path, name, kind, size, language_of(name_inside(name)) if kind == "text" else "", licence)


def _holds_documents(path: str, options: ReadOptions) -> bool:
    """Whether the first line of a .json file is an object with the text field: then the file is JSON lines."""
    with open_stream(path) as stream:
        line = stream.read(_PEEK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0]
    if options.chat_format and line.startswith(b"["):
        return True  # whose reader says how to make lines of it: to pass it over would lose a whole data set
    try:
        record = orjson.loads(line)
    except ValueError:
        # a first document that is longer than what was read
        return len(line) > _PEEK_BYTES // 2 and line.startswith(b'{"' + options.text_field.encode() + b'":')
    if options.chat_format:
        return isinstance(record, dict)
    return isinstance(record, dict) and isinstance(record.get(options.text_field), str)
