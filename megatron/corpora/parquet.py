"""Parquet files to documents, row groups at a time. The only file that imports pyarrow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from megatron.config.errors import DataError, UnavailableError
from megatron.corpora.chat_records import FIELDS
from megatron.corpora.document import BAD_CONTENT_BYTES, BadRecord, Document
from megatron.corpora.read_options import InputFile, ReadOptions
from megatron.corpora.records import kind_of, wanted_document

_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 4096


def row_groups(file: InputFile, options: ReadOptions) -> list[tuple[int, int]]:
    """Rows and bytes (uncompressed, of the columns that are read) of every row group.

    Raises DataError where the file is not whole or a column is missing or of the wrong type.
    """
    with _Opened(file, options) as opened:
        metadata = opened.parquet.metadata
        found = []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            found.append((group.num_rows, sum(size for _, size in _column_sizes(group, opened.columns))))
        return found


def read_row_groups(
    file: InputFile, first: int, count: int, options: ReadOptions, skipped: Counter[str]
) -> Iterator[Document | BadRecord]:
    """The documents of `count` row groups from number `first` on; lines are rows, counted from 1 in these groups."""
    with _Opened(file, options) as opened:
        before = sum(opened.parquet.metadata.row_group(number).num_rows for number in range(first))
        row = 0
        for number in range(first, first + count):
            for batch in opened.batches(number):
                for item in _items(batch, file, options, before + row + 1, row + 1):
                    if isinstance(item, BadRecord) or wanted_document(item, options, skipped):
                        yield item
                row += batch.num_rows


def read_records(
    file: InputFile, first: int, count: int, options: ReadOptions
) -> Iterator[tuple[int, int, dict[str, Any], str]]:
    """The chat records of row groups as plain objects: row in the file, row in these groups (both from 1), record, and
    what is wrong with it ("": nothing). Objects lose their null fields, which a column's other rows have given them.
    """
    with _Opened(file, options) as opened:
        row = sum(opened.parquet.metadata.row_group(number).num_rows for number in range(first))
        line = 0
        for number in range(first, first + count):
            for batch in opened.batches(number):
                for place in range(batch.num_rows):
                    row, line = row + 1, line + 1
                    try:
                        values = {name: batch.column(name)[place].as_py() for name in opened.columns}
                        yield row, line, _without_nulls(values), ""
                    except UnicodeDecodeError as error:
                        yield row, line, {}, f"byte {error.start} of a value is not UTF-8: {error.reason}"


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _column_sizes(group: Any, columns: list[str]) -> list[tuple[str, int]]:
    chunks = [group.column(number) for number in range(group.num_columns)]
    return [
        (chunk.path_in_schema, chunk.total_uncompressed_size)
        for chunk in chunks
        if chunk.path_in_schema.partition(".")[0] in columns
    ]


class _Opened:
    """A parquet file, its columns checked. Use as a context manager."""

    def __init__(self, file: InputFile, options: ReadOptions) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UnavailableError(
                f"{file.path}: parquet files are read by pyarrow, which is not installed: "
                "pip install 'stagemix[parquet]'"
            ) from None
        self._arrow, self._file = pyarrow, file
        try:
            # dictionaries stay dictionaries: a long string that many rows share is held once
            plain = pyarrow.parquet.ParquetFile(file.path, pre_buffer=False)
            self.columns = _checked_columns(plain.schema_arrow, file, options, pyarrow.types)
            plain.close()
            self.parquet = pyarrow.parquet.ParquetFile(
                file.path,
                read_dictionary=[] if options.chat_format else [options.text_field],
                pre_buffer=False,
                buffer_size=1 << 20,
                page_checksum_verification=True,
            )
        except (pyarrow.ArrowException, OSError) as error:
            raise self._damaged(error) from None

    def batches(self, number: int) -> Iterator[Any]:
        """The rows of a row group, a few MiB at a time as far as its mean row tells."""
        group = self.parquet.metadata.row_group(number)
        size = max((size for _, size in _column_sizes(group, self.columns)), default=0)
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * max(1, group.num_rows) // max(1, size)))
        try:
            yield from self.parquet.iter_batches(batch_size=rows, row_groups=[number], columns=self.columns)
        except (self._arrow.ArrowException, OSError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> DataError:
        if isinstance(error, FileNotFoundError):
            return DataError(f"{self._file.path}: it was there when the files were listed, and is gone now")
        if isinstance(error, PermissionError):
            return DataError(f"{self._file.path}: no permission to read it")
        said = " ".join(str(error).split())
        return DataError(f"{self._file.path}: the parquet file is damaged or cut off: {said}. Get it again")

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *error: object) -> None:
        self.parquet.close()


def _checked_columns(schema: Any, file: InputFile, options: ReadOptions, types: Any) -> list[str]:
    """The columns to read. Raises DataError where one is missing, stands twice or has the wrong type."""
    if options.chat_format:
        return _chat_columns(schema, file, options)
    columns = []
    asked = [
        ("text_field", options.text_field),
        ("id_field", options.id_field),
        ("language_field", options.language_field),
        ("source_field", options.source_field),
        ("licence_field", options.licence_field),
    ]
    for option, name in asked:
        if not name:
            continue
        if (times := schema.names.count(name)) != 1:
            if not times and option == "id_field":
                continue
            present = ", ".join(map(repr, schema.names[:8])) or "none"
            problem = "is missing" if not times else f"stands {times} times"
            raise DataError(f"{file.path}: column {name!r} {problem} (columns: {present}): set {option} to another")
        kind = schema.field(name).type
        if types.is_dictionary(kind):
            kind = kind.value_type
        allowed = _is_string(kind, types)
        allowed = allowed or (option == "id_field" and types.is_integer(kind))
        allowed = allowed or (option == "licence_field" and types.is_list(kind) and _is_string(kind.value_type, types))
        if not allowed:
            wanted = {"id_field": "strings or integers", "licence_field": "strings or lists of strings"}
            raise DataError(
                f"{file.path}: column {name!r}: {wanted.get(option, 'strings')} are expected, this is {kind}: set "
                f"{option} to another column, or convert it"
            )
        columns.append(name)
    return list(dict.fromkeys(columns))


def _chat_columns(schema: Any, file: InputFile, options: ReadOptions) -> list[str]:
    """The columns of chat records that are there, of whatever types: each record is checked by itself."""
    if not (found := [name for name in FIELDS if name in schema.names]):
        present = ", ".join(map(repr, schema.names[:8])) or "none"
        raise DataError(f"{file.path}: no column of a chat format (columns: {present}): one of {', '.join(FIELDS)}")
    own = [options.id_field, options.language_field, options.source_field, options.licence_field]
    columns = list(dict.fromkeys([*found, *(name for name in own if name and name in schema.names)]))
    for name in columns:
        if (times := schema.names.count(name)) != 1:
            raise DataError(f"{file.path}: column {name!r} stands {times} times (only one of them can be meant)")
    return columns


def _is_string(kind: Any, types: Any) -> bool:
    return bool(
        types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)
    )


def _items(batch: Any, file: InputFile, options: ReadOptions, row: int, line: int) -> Iterator[Document | BadRecord]:
    """Items of a batch of rows; `row` is the first one's number in the file, `line` in the block."""
    columns = {name: _Values(batch.column(name)) for name in batch.schema.names}
    for place in range(batch.num_rows):
        values: dict[str, object] = {}
        try:
            for name, column in columns.items():
                values[name] = column[place]
            yield _document(values, file, options, row + place)
        except UnicodeDecodeError as error:
            name = next(name for name in columns if name not in values)
            reason = f"column {name!r}: byte {error.start} of the value is not UTF-8: {error.reason}"
            yield BadRecord(file.path, line + place, None, reason, error.object[:BAD_CONTENT_BYTES])
        except _Flaw as flaw:
            content = str(values.get(options.text_field) or "")[:BAD_CONTENT_BYTES].encode("utf-8", "replace")
            yield BadRecord(file.path, line + place, None, str(flaw), content[:BAD_CONTENT_BYTES])


class _Flaw(Exception):
    """Why a row is not a document."""


class _Values:
    """A column's values by position; binary ones as text. Raises UnicodeDecodeError for a string that is not UTF-8."""

    def __init__(self, column: Any) -> None:
        # values of a dictionary are made text once, of a plain column one by one
        self._indices = column.indices if hasattr(column, "indices") else None
        self._values = column.dictionary if self._indices is not None else column
        self._made: dict[int, object] = {}

    def __getitem__(self, place: int) -> object:
        if self._indices is None:
            return _plain(self._values[place])
        index = self._indices[place].as_py()
        if index is None:
            return None
        if index not in self._made:
            self._made[index] = _plain(self._values[index])
        return self._made[index]


def _plain(scalar: Any) -> object:
    value = scalar.as_py()
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _document(values: dict[str, object], file: InputFile, options: ReadOptions, row: int) -> Document:
    text = values[options.text_field]
    if not isinstance(text, str):
        raise _Flaw(f"column {options.text_field!r}: a string is expected, this is {kind_of(text)}: leave the row out")
    if len(text) > options.max_document_bytes // 4 and len(text.encode()) > options.max_document_bytes:
        raise _Flaw(f"the text has more than {options.max_document_bytes} bytes: raise max_document_bytes, or cut it")
    own = values.get(options.id_field)
    licence = values.get(options.licence_field)
    if isinstance(licence, list):
        licence = " AND ".join(str(item) for item in licence if item)
    return Document(
        f"{file.name}@{row}" if own is None else str(own),
        text,
        str(values.get(options.language_field) or ""),
        str(values.get(options.source_field) or ""),
        str(licence or ""),
    )
