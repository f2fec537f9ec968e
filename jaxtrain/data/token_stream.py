"""A token stream on disk: one flat file of ids, and a small JSON file beside it that describes them.

Documents are joined as [separator, a1..an, separator, b1..bm, separator]: every token, and every closing separator, is then
predicted exactly once when the stream is cut into windows that share one token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.data.documents import BadRows
from jaxtrain.data.file_hashes import file_hashes, reading, short_hash, unreadable
from jaxtrain.data.mapped import map_array
from jaxtrain.data.store_path import SourcePath, StorePath
from jaxtrain.data.store_tokens import StoreTokens, block_cache
from jaxtrain.data.token_part import FileTokens, TokenPart
from jaxtrain.data.tokenizers import Tokenizer
from jaxtrain.errors import DataError

FORMAT = "jaxtrain-tokens-1"
GZIP_SAMPLE_BYTES = 1 << 26  # gzip -9 reads about 20 MB/s, and this much text determines its ratio well enough
STORED_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
OLDER_LACK: dict[str, Any] = {"split_rule": "", "rows": 0, "bad_rows": 0, "first_bad_row": ""}
"""Fields that older files lack, with what they mean."""


@dataclass
class StreamMetadata:
    """The content of the JSON file beside a token stream."""

    format: str
    split: str
    """"train" or "validation"."""
    dtype: str
    """uint16 if the vocabulary fits, else uint32; little-endian."""
    vocab_size: int
    """Number of the tokenizer's ids."""
    tokenizer: str
    """Name of the tokenizer that made the stream."""
    tokenizer_fingerprint: str
    separator: int
    """The id between documents; -1: none."""
    count: int = 0
    """Tokens in the stream, separators included."""
    largest_id: int = -1
    """Largest id in the stream; -1 if it is empty."""
    documents: int = 0
    utf8_bytes: int = 0
    """Bytes of the documents' text; 0: unknown."""
    gzip_bytes: int = 0
    """Bytes of gzip -9 of the first gzip_input_bytes of the joined documents; 0: not measured."""
    gzip_input_bytes: int = 0
    sha256: str = ""
    """SHA-256 of the whole .bin file."""
    split_rule: str = ""
    """How the documents were split (see `split.split_rule`); empty: unknown."""
    rows: int = 0
    """Rows read for both splits together, bad ones included."""
    bad_rows: int = 0
    """How many of the rows were left out."""
    first_bad_row: str = ""
    """Fault and place of the first bad row."""

    @property
    def bad_rows_in_words(self) -> str:
        """Count and first fault of the rows left out; empty if none was."""
        return f"{self.bad_rows:,} of {self.rows:,} rows, the first: {self.first_bad_row}" if self.bad_rows else ""


class StreamWriter:
    """Writes one stream. `close` adds the closing separator and the JSON file."""

    def __init__(self, path: Path, split: str, tokenizer: Tokenizer, tokenizer_name: str, split_rule: str = ""):
        """Open `path` (a .bin) for writing; gzip is measured only for split="validation". Raises OSError."""
        self._path = path
        self._told = StreamMetadata(
            FORMAT,
            split,
            dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer_name,
            tokenizer_fingerprint=tokenizer.fingerprint,
            separator=tokenizer.separator,
            split_rule=split_rule,
        )
        self._digest = hashlib.sha256()
        self._gzip = zlib.compressobj(9, wbits=31) if split == "validation" else None
        self._file = path.open("wb")

    def extend(self, ids: np.ndarray, documents: int, utf8_bytes: int, contents: Iterable[bytes] = ()) -> None:
        """Add documents: their ids, each after a separator, their number, and their text, for split="validation" alone."""
        self._write(ids)
        self._told.documents += documents
        self._told.utf8_bytes += utf8_bytes
        for content in contents:
            if self._gzip is not None and self._told.gzip_input_bytes < GZIP_SAMPLE_BYTES:
                self._told.gzip_bytes += len(self._gzip.compress(content))
                self._told.gzip_input_bytes += len(content)

    def _write(self, ids: np.ndarray) -> None:
        if not ids.size:
            return
        content = np.ascontiguousarray(ids, STORED_DTYPES[self._told.dtype])
        self._file.write(content.data)
        self._digest.update(content.data)
        self._told.count += ids.size
        self._told.largest_id = max(self._told.largest_id, int(ids.max()))

    def close(self, bad_rows: BadRows | None = None) -> StreamMetadata:
        """End the stream, and write its JSON file, with the source's `bad_rows`. Raises OSError."""
        told, bad_rows = self._told, bad_rows or BadRows()
        if told.documents:
            self._write(np.array([told.separator]))
        self._file.close()
        if self._gzip is not None:
            told.gzip_bytes += len(self._gzip.flush())
        told.sha256 = self._digest.hexdigest()
        told.rows, told.bad_rows, told.first_bad_row = bad_rows.rows, bad_rows.count, bad_rows.first
        fields = dataclasses.asdict(told)
        text = json.dumps(fields | {"digest": short_hash(fields)}, indent=2) + "\n"
        self._path.with_suffix(".json").write_text(text, encoding="utf-8")
        return told

    def abandon(self) -> None:
        """Close the file without finishing the stream."""
        self._file.close()


def read_metadata(path: SourcePath) -> StreamMetadata:
    """Read the JSON file beside the .bin file `path`. Raises DataError where it is missing or broken."""
    json_path = path.with_suffix(".json")
    try:
        content = json.loads(json_path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no {json_path.name} beside it, which describes its bytes; make both with "
            f"`jaxtrain tokenize`, or save the ids as .npy"
        ) from error
    except OSError as error:
        raise unreadable(json_path, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{json_path}: not JSON ({error})") from error
    content = content if isinstance(content, dict) else {}
    kinds = {field.name: {"str": str, "int": int}[str(field.type)] for field in dataclasses.fields(StreamMetadata)}
    fields: dict[str, Any] = {name: content.get(name, OLDER_LACK.get(name)) for name in kinds}
    wrong = [name for name, kind in kinds.items() if not isinstance(fields[name], kind)]
    if wrong:
        raise DataError(f"{json_path}: field {wrong[0]!r} is missing or of the wrong type; make the file again")
    metadata = StreamMetadata(**fields)
    digest = short_hash({name: value for name, value in content.items() if name != "digest"})
    if content.get("digest", digest) != digest:
        raise DataError(f"{json_path}: its contents do not have the checksum in its field 'digest'; make the file again")
    if metadata.format != FORMAT or metadata.dtype not in STORED_DTYPES:
        raise DataError(f"{json_path}: format {metadata.format!r} of {metadata.dtype} is not {FORMAT!r}; make the file again")
    return metadata


def open_stream(path: SourcePath, cache_dir: Path, most_bytes: int = 0) -> tuple[TokenPart, StreamMetadata]:
    """Open a .bin file with its JSON file beside it, and check that it is whole. Its ids are a read-only memory map, or read
    from a store.

    The checksum is computed again only if size or modification time changed since it last matched; of a file in a store it is
    believed, and `most_bytes` of its blocks are kept in `cache_dir`. Raises DataError where the file is missing, cut short or
    altered.
    """
    metadata = read_metadata(path)
    dtype = STORED_DTYPES[metadata.dtype]
    expected = metadata.count * dtype.itemsize
    with reading(path):
        size = path.stat().st_size
    if size != expected:
        raise DataError(
            f"{path}: {size} bytes, but {path.with_suffix('.json').name} says {metadata.count} tokens of {metadata.dtype} = "
            f"{expected} bytes; the file is damaged, make it again"
        )
    if isinstance(path, StorePath):
        tokens: FileTokens = StoreTokens(path, dtype, metadata.count, 0, block_cache(cache_dir / "blocks", most_bytes))
    elif file_hashes([path], cache_dir, f"checking {path.name}") != [metadata.sha256]:
        raise DataError(f"{path}: its contents do not have the checksum in {path.with_suffix('.json').name}; make it again")
    else:
        tokens = map_array(path, dtype, metadata.count)
    described = {field.name for field in dataclasses.fields(TokenPart)} - {"tokens"}
    return TokenPart(tokens, **{name: getattr(metadata, name) for name in described}), metadata
