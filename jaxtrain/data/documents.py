"""Reads the documents in one file, for each kind of source. Every fault is a DataError that says where it is."""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from jaxtrain.data.file_hashes import unreadable
from jaxtrain.errors import DataError, nearest

ROWS_AT_ONCE = 1024

Reader = Callable[[Path, str], Iterator[str]]


def require(module: str, needed_by: str) -> Any:
    """Imports an optional package, or raises a DataError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise DataError(f"{needed_by} needs the package {package}: pip install 'jaxtrain[data]'") from error


def read_documents(kind: str, path: Path, text_field: str) -> Iterator[str]:
    """The documents of a file in order, empty ones too (so that a document's number is its row's number).

    Raises DataError with the file, and the byte, line or row, of whatever is wrong.
    """
    try:
        yield from READERS[kind](path, text_field)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: broken gzip file ({error})") from error
    except OSError as error:
        raise unreadable(path, error) from error


def decode_utf8(content: bytes, where: str, offset: int = 0) -> str:
    """`content` as text. Raises DataError with the byte where it stops being UTF-8, counted from `offset`."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise DataError(
            f"{where}: byte {offset + error.start} (0x{byte:02x}) is not UTF-8; convert the file, e.g. iconv -f latin1 -t utf-8"
        ) from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _read_text(path: Path, text_field: str) -> Iterator[str]:
    with _open(path) as file:
        yield decode_utf8(file.read(), str(path))


def _text_of_row(row: Any, text_field: str, where: str) -> str:
    """The text field of a decoded JSON row."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be a JSON object, but this is a {type(row).__name__}")
    if text_field not in row:
        raise DataError(f"{where}: no field {text_field!r}; {nearest(text_field, row)}" if row else f"{where}: an empty object")
    text = row[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {text_field!r} is a {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: field {text_field!r} has half a surrogate pair at character {error.start}") from error
    return text


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}: line {number}"
            text = decode_utf8(line, where, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({error})") from error
            yield _text_of_row(row, text_field, where)


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    parquet = require("pyarrow.parquet", "kind=parquet")
    arrow = require("pyarrow", "kind=parquet")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise DataError(f"{path}: no column {text_field!r}; {nearest(text_field, names)}")
            number = 0
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        kind = "null" if text is None else f"a {type(text).__name__}"
                        raise DataError(f"{path}: row {number} of column {text_field!r} is {kind}, not text")
                    yield text
                    number += 1
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: broken Parquet file ({str(error).splitlines()[0]})") from error


def _read_array_record(path: Path, text_field: str) -> Iterator[str]:
    module = require("array_record.python.array_record_module", "kind=array_record")
    with _open_array_record(module, path) as reader:
        count = reader.num_records()
        for start in range(0, count, ROWS_AT_ONCE):
            try:
                records = reader.read(range(start, min(start + ROWS_AT_ONCE, count)))
            except Exception as error:  # the library raises whatever its C++ status says
                raise _broken_array_record(path, error) from error
            for number, record in enumerate(records, start):
                yield decode_utf8(record, f"{path}: record {number}")


@contextmanager
def _open_array_record(module: Any, path: Path) -> Iterator[Any]:
    try:
        reader = module.ArrayRecordReader(str(path))
        if not reader.ok():
            reader.close()  # a broken file looks empty; only closing it says why
    except Exception as error:
        raise _broken_array_record(path, error) from error
    try:
        yield reader
    finally:
        with suppress(Exception):  # every record was checked when it was read
            reader.close()


def _broken_array_record(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: broken ArrayRecord file ({str(error).splitlines()[0].partition('; ')[0]})")


READERS: dict[str, Reader] = {
    "stdlib": _read_text,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "array_record": _read_array_record,
}
