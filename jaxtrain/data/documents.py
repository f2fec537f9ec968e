"""Read the documents in one file, for each kind of source. Every fault is a DataError with its place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtrain.data.compressed import HEAD_BYTES, open_content
from jaxtrain.data.file_hashes import unreadable
from jaxtrain.data.file_kinds import what_it_is
from jaxtrain.data.optional import require
from jaxtrain.data.store_path import SourcePath
from jaxtrain.errors import DataError, nearest

ROWS_AT_ONCE = 1024
BYTE_ORDER_MARK = "\ufeff"
ALL_BAD_ROWS = 1000  # if the first this many rows are all bad, the configured kind or field is wrong

Reader = Callable[[SourcePath, str], Iterator[str | DataError]]
"""(file, name of the text field) -> the text or the fault of each row in order. Faults of the whole file are raised."""


@dataclass
class BadRows:
    """Counts the bad rows of a source, which are left out."""

    largest_share: float = 0.0
    """Largest tolerated share of bad rows; 0: the first bad row raises."""
    rows: int = 0
    """Rows read so far, bad ones included."""
    count: int = 0
    first: str = ""
    """Fault and place of the first bad row; empty if there is none."""

    def leave_out(self, fault: DataError) -> None:
        """Count a bad row. Raises its fault if none is tolerated; DataError if the first ALL_BAD_ROWS rows are all bad."""
        if not self.largest_share:
            raise fault
        self.first = self.first or str(fault)[:300]
        self.count += 1
        if self.count == self.rows == ALL_BAD_ROWS:
            raise DataError(f"each of the first {ALL_BAD_ROWS:,} rows is bad; the first: {self.first}") from fault

    def check(self, name: str) -> None:
        """Raise DataError if the share of bad rows in the source `name` is above the largest."""
        if self.count > self.largest_share * self.rows:
            raise DataError(
                f"{name}: {self.count:,} of {self.rows:,} rows are bad, more than max_bad_rows={self.largest_share:g} of them; "
                f"the first: {self.first}"
            )


def read_documents(kind: str, path: SourcePath, text_field: str, bad_rows: BadRows | None = None) -> Iterator[str]:
    """Yield the documents of a file in order, empty ones included (so that a document's number is its row's number).

    A bad row counts as an empty document where `bad_rows` tolerates it. Raises DataError with the file and the byte, line or
    row.
    """
    bad_rows = BadRows() if bad_rows is None else bad_rows
    try:
        for text in READERS[kind](path, text_field):
            bad_rows.rows += 1
            if isinstance(text, DataError):
                bad_rows.leave_out(text)
                text = ""
            yield text
    except OSError as error:
        raise unreadable(path, error) from error


def _decode_utf8(content: bytes, where: str, offset: int = 0) -> str:
    """Return `content` as text. Raises DataError with the byte where it stops being UTF-8, counted from `offset`."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            raise DataError(
                f"{where}: ends at byte {offset + len(content)} in the middle of a character; was it cut short?"
            ) from error
        byte = content[error.start]
        raise DataError(
            f"{where}: byte {offset + error.start} (0x{byte:02x}) is not UTF-8; convert the file, e.g. iconv -f latin1 -t utf-8"
        ) from error


@contextmanager
def open_text(path: SourcePath) -> Iterator[Any]:
    """Open a text file, decompressed. Raises DataError that names its kind if it is not text."""
    with open_content(path) as file:
        if what := what_it_is(file.peek(HEAD_BYTES)[:HEAD_BYTES]):
            raise DataError(f"{path}: is {what}")
        yield file


def _read_text(path: SourcePath, text_field: str) -> Iterator[str]:
    with open_text(path) as file:
        yield _decode_utf8(file.read(), str(path)).removeprefix(BYTE_ORDER_MARK)


def _named(value: Any) -> str:
    """Return a name, for errors, of a value that is not text."""
    if isinstance(value, UnicodeDecodeError):
        return f"broken UTF-8 (byte {value.start} of it)"
    return "null" if value is None else f"a {type(value).__name__}"


def _text_of_row(row: Any, text_field: str, where: str) -> str:
    """Return the text field of a decoded JSON row."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be a JSON object, but this is a {type(row).__name__}")
    if text_field not in row:
        raise DataError(f"{where}: no field {text_field!r}; {nearest(text_field, row)}" if row else f"{where}: an empty object")
    text = row[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {text_field!r} is {_named(text)}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: field {text_field!r} has half a surrogate pair at character {error.start}") from error
    return text


def _read_jsonl(path: SourcePath, text_field: str) -> Iterator[str | DataError]:
    offset = 0
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                try:
                    text = _text_of_line(line, text_field, f"{path}: line {number}", offset)
                except DataError as fault:
                    text = fault
                yield text
            offset += len(line)


def _text_of_line(line: bytes, text_field: str, where: str, offset: int) -> str:
    """Return the text field of a JSON line that starts at byte `offset`. Joined files leave a byte order mark inside."""
    row = row_of_line(line, where, offset)
    return "" if row is None else _text_of_row(row, text_field, where)


def row_of_line(line: bytes, where: str, offset: int) -> Any:
    """Return the JSON value of a line that starts at byte `offset`; None for a blank one. Raises DataError with the place."""
    text = _decode_utf8(line, where, offset).lstrip(BYTE_ORDER_MARK)
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        one_value = offset == 0 and text.strip() in ("[", "{")
        way_out = "; a row is one whole line: jq -c '.[]' writes the items of an array so" if one_value else ""
        raise DataError(f"{where}: not JSON ({error}){way_out}") from error
    if row is None:
        raise DataError(f"{where}: a row must be a JSON object, but this is null")
    return row


@contextmanager
def open_parquet(path: SourcePath) -> Iterator[Any]:
    """Open a Parquet file. Raises pyarrow's ArrowException where it is none."""
    parquet = require("pyarrow.parquet", "kind=parquet")
    with ExitStack() as stack:
        opened = path if isinstance(path, Path) else stack.enter_context(path.open())
        yield stack.enter_context(parquet.ParquetFile(opened))


def _read_parquet(path: SourcePath, text_field: str) -> Iterator[str | DataError]:
    arrow = require("pyarrow", "kind=parquet")
    try:
        with open_parquet(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise DataError(f"{path}: no column {text_field!r}; {nearest(text_field, names)}")
            number = 0
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[text_field]):
                for text in _values(batch.column(0)):
                    if isinstance(text, str):
                        yield text
                    else:
                        yield DataError(f"{path}: row {number} of column {text_field!r} is {_named(text)}, not text")
                    number += 1
    except arrow.ArrowException as error:
        raise broken_file(path, "Parquet", error) from error


def _values(column: Any) -> list[Any]:
    """Return the values of a column; for a text that is not UTF-8, the error in its place."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(item) for item in column]


def _value(item: Any) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError as error:
        return error


def _read_array_record(path: SourcePath, text_field: str) -> Iterator[str | DataError]:
    module = require("array_record.python.array_record_module", "kind=array_record")
    if not isinstance(path, Path):
        raise DataError(f"{path}: kind=array_record is read from files alone; copy it, or use parquet or jsonl")
    with _open_array_record(module, path) as reader:
        count = reader.num_records()
        for start in range(0, count, ROWS_AT_ONCE):
            try:
                records = reader.read(range(start, min(start + ROWS_AT_ONCE, count)))
            except Exception as error:  # the library's exception class depends on its C++ status
                raise broken_file(path, "ArrayRecord", error) from error
            for number, record in enumerate(records, start):
                try:
                    text = _decode_utf8(record, f"{path}: record {number}")
                except DataError as fault:
                    text = fault
                yield text


@contextmanager
def _open_array_record(module: Any, path: SourcePath) -> Iterator[Any]:
    try:
        reader = module.ArrayRecordReader(str(path))
        if not reader.ok():
            reader.close()  # a broken file looks empty; only closing it reports why
    except Exception as error:
        raise broken_file(path, "ArrayRecord", error) from error
    try:
        yield reader
    finally:
        with suppress(Exception):  # every record was checked when it was read
            reader.close()


def broken_file(path: SourcePath, kind: str, error: Exception) -> DataError:
    """Return the error for a file that is not a whole one of `kind`; names its true kind if known."""
    with path.open("rb") as file:
        what = what_it_is(file.read(HEAD_BYTES))
    if what and kind not in what:
        return DataError(f"{path}: is no {kind} file but {what}")
    return DataError(f"{path}: broken {kind} file ({str(error).splitlines()[0].partition('; ')[0]})")


READERS: dict[str, Reader] = {
    "stdlib": _read_text,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "array_record": _read_array_record,
}
