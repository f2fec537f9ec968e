"""Read the documents in one file, for each kind of source. Every fault is a DataError with its place."""

from __future__ import annotations

import errno
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from jaxtrain.data.compressed import HEAD_BYTES, open_content
from jaxtrain.data.file_hashes import reading
from jaxtrain.data.file_kinds import known_kind, what_it_is
from jaxtrain.data.optional import require
from jaxtrain.data.store_path import SourcePath
from jaxtrain.errors import DataError, nearest

T = TypeVar("T")
ROWS_AT_ONCE = 1024
ARROW_FILE, ARROW_END = b"ARROW1\0\0", b"\xff\xff\xff\xff\0\0\0\0"
TAR_BLOCK = 512
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

    def add(self, rows: int, count: int, first: str) -> None:
        """Add what was counted elsewhere."""
        self.rows, self.count, self.first = self.rows + rows, self.count + count, self.first or first

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
    with reading(path):
        for text in READERS[kind](path, text_field):
            bad_rows.rows += 1
            if isinstance(text, DataError):
                bad_rows.leave_out(text)
                text = ""
            yield text


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


def _or_fault(value_of: Callable[..., T], *row: Any) -> T | DataError:
    """Return the value of a row, or its fault."""
    try:
        return value_of(*row)
    except DataError as fault:
        return fault


def _text_of_row(row: Any, text_field: str, where: str) -> str:
    """Return the text field of a decoded JSON row; nothing of a blank one."""
    if row is None:
        return ""
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be a JSON object, but this is a {type(row).__name__}")
    if text_field not in row:
        raise DataError(f"{where}: no field {text_field!r}; {nearest(text_field, row)}" if row else f"{where}: an empty object")
    text = row[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {text_field!r} is {_named(text)}, not text")
    return encodable(text, f"{where}: field {text_field!r}")


def encodable(text: str, what: str) -> str:
    """Return the text. Raises DataError where UTF-8 cannot hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds half a surrogate pair ({text[error.start]!a}) at character {error.start}") from error
    return text


def json_rows(path: SourcePath) -> Iterator[tuple[str, Any, int]]:
    """Yield of each line that is not blank its place, its JSON value or fault (see `row_of_line`), and its size in bytes."""
    offset = 0
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                where = f"{path}: line {number}"
                yield where, _or_fault(row_of_line, line, where, offset), len(line)
            offset += len(line)


def _read_jsonl(path: SourcePath, text_field: str) -> Iterator[str | DataError]:
    for where, row, _ in json_rows(path):
        yield row if isinstance(row, DataError) else _or_fault(_text_of_row, row, text_field, where)


def row_of_line(line: bytes, where: str, offset: int) -> Any:
    """Return the JSON value of a line that starts at byte `offset`; None for a blank one: joined files leave a byte order mark
    inside. Raises DataError with the place.
    """
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
                yield from _texts_of_column(batch.column(0), f"of column {text_field!r}", path, number)
                number += batch.num_rows
    except arrow.ArrowException as error:
        raise broken_file(path, "Parquet", error) from error


def _texts_of_column(column: Any, which: str, path: SourcePath, first: int) -> Iterator[str | DataError]:
    """Yield the texts of a column whose rows are numbered from `first` on."""
    for number, text in enumerate(_values(column), first):
        yield text if isinstance(text, str) else DataError(f"{path}: row {number} {which} is {_named(text)}, not text")


def _read_arrow(path: SourcePath, text_field: str) -> Iterator[str | DataError]:
    """Read Arrow IPC data: a stream, as the package datasets writes it, or a file."""
    arrow, ipc = require("pyarrow", "kind=arrow"), require("pyarrow.ipc", "kind=arrow")
    number = 0
    with path.open("rb") as file:
        try:
            is_file = file.read(len(ARROW_FILE)) == ARROW_FILE
            file.seek(-len(ARROW_END), 2)
            if not is_file and file.read() != ARROW_END:
                raise arrow.ArrowInvalid("it has no mark at its end and may be cut short")
            file.seek(0)
            reader = ipc.open_file(file) if is_file else ipc.open_stream(file)
            if text_field not in reader.schema.names:
                raise DataError(f"{path}: no column {text_field!r}; {nearest(text_field, reader.schema.names)}")
            for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
                yield from _texts_of_column(batch.column(text_field), f"of column {text_field!r}", path, number)
                number += batch.num_rows
        except arrow.ArrowException as error:
            raise broken_file(path, "Arrow", error) from error
        except OSError as error:
            if error.errno not in (None, errno.EINVAL):
                raise
            raise broken_file(path, "Arrow", error) from error


def _read_tar(path: SourcePath, text_field: str) -> Iterator[str | DataError]:
    """Read samples as WebDataset's: neighbours in a tar archive whose names are equal up to the first dot.

    The text is that of the member .txt, else the field of the member .json; other members are not read.
    """
    with open_content(path) as file:
        tail: Any = _Tail(file)
        try:
            with tarfile.open(fileobj=tail, mode="r|") as archive:
                for key, members in itertools.groupby(filter(tarfile.TarInfo.isfile, archive), _sample_key):
                    found = {PurePosixPath(member.name).suffix: _content(archive, member) for member in members}
                    yield _or_fault(_text_of_sample, found, text_field, f"{path}: sample {key!r}")
            if tail.last.strip(b"\0") or len(tail.last) < TAR_BLOCK:
                raise tarfile.ReadError("it has no mark at its end and may be cut short")
        except tarfile.TarError as error:
            raise broken_file(path, "tar", error) from error


class _Tail:
    """A file that remembers the last bytes read."""

    def __init__(self, file: IO[bytes]):
        self._file, self.last = file, b""

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self.last = (self.last + content[-TAR_BLOCK:])[-TAR_BLOCK:]
        return content


def _sample_key(member: tarfile.TarInfo) -> str:
    folder, _, name = member.name.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}".lstrip("/")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the content of a member that may hold text; of others nothing."""
    file = archive.extractfile(member) if PurePosixPath(member.name).suffix in (".txt", ".json") else None
    return b"" if file is None else file.read()


def _text_of_sample(found: dict[str, bytes], text_field: str, where: str) -> str:
    if ".txt" in found:
        return _decode_utf8(found[".txt"], f"{where}, .txt").removeprefix(BYTE_ORDER_MARK)
    if ".json" in found:
        return _text_of_row(row_of_line(found[".json"], f"{where}, .json", 0), text_field, f"{where}, .json")
    raise DataError(f"{where}: has {', '.join(sorted(found))}, but neither .txt nor .json")


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
                yield _or_fault(_decode_utf8, record, f"{path}: record {number}")


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
        what = known_kind(file.read(HEAD_BYTES))
    if what and kind not in what:
        return DataError(f"{path}: is no {kind} file but {what}")
    return DataError(f"{path}: broken {kind} file ({str(error).splitlines()[0].partition('; ')[0]})")


READERS: dict[str, Reader] = {
    "stdlib": _read_text,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "array_record": _read_array_record,
    "arrow": _read_arrow,
    "tar": _read_tar,
}
