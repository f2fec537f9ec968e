"""Open sources that are already tokens: .bin files of `jaxtrain tokenize` or of Megatron, and .npy arrays."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxtrain.config import Config, DataSource
from jaxtrain.data.file_hashes import file_hashes, keep_note, short_hash, unreadable
from jaxtrain.data.listing import SourceFile, list_files
from jaxtrain.data.mapped import map_array
from jaxtrain.data.megatron import read_index, with_separators
from jaxtrain.data.progress import progress
from jaxtrain.data.split import split_rule
from jaxtrain.data.store_path import SourcePath
from jaxtrain.data.store_tokens import StoreTokens, block_cache
from jaxtrain.data.token_part import FileTokens, JoinedTokens, TokenPart
from jaxtrain.data.token_split import split_part
from jaxtrain.data.token_stream import open_stream, read_metadata
from jaxtrain.data.tokenizers import NO_TOKENIZER, Tokenizer
from jaxtrain.errors import DataError
from jaxtrain.files import user_path

SCAN_TOKENS = 1 << 22
VALIDATION = "validation"
HELD_OUT_NAME = re.compile(r"(validation|valid|val)([^a-zA-Z].*)?")


@dataclass(frozen=True)
class _TokenFile:
    name: str
    path: SourcePath
    split: str
    made_by: str
    part: TokenPart


def open_token_files(
    source: DataSource, name: str, tokenizer: Tokenizer, config: Config, cache_dir: Path
) -> tuple[list[TokenPart], list[TokenPart]]:
    """Open the training parts and the held-out parts of a source of kind tokens.

    Held-out files say so (split=validation in the JSON of a .bin, validation*.npy or val*.npy) and are named, or lie beside a
    named file. If there are none, each file is split by `token_split`. Raises DataError for damaged files, ids beyond the
    model's or the tokenizer's vocabulary, and ids made by another tokenizer than `tokenizer`.
    """
    data = config.data
    files = [_open_file(file, source, tokenizer, config, cache_dir) for file in _list(source.path, f"{name}.path")]
    beside = [SourceFile(path.name, path) for path in _held_out_beside(files)]
    files += [_open_file(file, source, tokenizer, config, cache_dir) for file in beside]
    makers = {file.made_by for file in files if file.made_by}
    if len(makers) > 1:
        raise DataError(f"{name}.path={source.path}: its files were made by {len(makers)} different tokenizers")
    separators = sorted({file.part.separator for file in files})
    if len(separators) > 1:
        raise DataError(
            f"{name}.path={source.path}: its files have separators {' and '.join(map(str, separators))} (-1: none); state that "
            f"of the .npy files with --{name}.separator={separators[-1]}, or make them sources of their own"
        )
    for file in files:
        check_ids(file.part, file.name, tokenizer, config, cache_dir)
    train = [file.part for file in files if file.split != VALIDATION]
    validation = [file.part for file in files if file.split == VALIDATION]
    if not train and data.validation_fraction:
        raise DataError(f"{name}.path={source.path}: every file is held-out text; name the training file too")
    if any(part.split_rule not in ("", split_rule(0)) or len(part.tokens) for part in validation):
        return train, validation
    title = f"splitting {name}"
    pairs = [split_part(part, data.validation_fraction, data.sequence_length, title, cache_dir) for part in train]
    return [part for part, _ in pairs], [part for _, part in pairs]


def _held_out_beside(files: Sequence[_TokenFile]) -> list[SourcePath]:
    """Return the held-out files in the folders of the named files, except folders of which one is named already."""
    with_own = {file.path.parent for file in files if file.split == VALIDATION}
    folders = {(file.path.parent, file.path.suffix): None for file in files if file.path.parent not in with_own}
    return [
        path
        for folder, suffix in folders
        for path in sorted(folder.glob(f"val*{suffix}"), key=str)
        if HELD_OUT_NAME.fullmatch(path.stem) and _split_of(path) == VALIDATION
    ]


def _split_of(path: SourcePath) -> str:
    """Return which side a file is for: the JSON of a .bin says so, and the name of an .npy; empty for a .bin without JSON."""
    if path.suffix == ".npy" or _is_megatron(path):
        return VALIDATION if HELD_OUT_NAME.fullmatch(path.stem) else "train"
    return read_metadata(path).split if path.with_suffix(".json").exists() else ""


def _is_megatron(path: SourcePath) -> bool:
    return path.suffix == ".bin" and not path.with_suffix(".json").exists() and path.with_suffix(".idx").exists()


def _list(patterns: str, flag: str) -> list[SourceFile]:
    """List the token files of globs or folders, without the JSON files beside them."""
    files = [file for file in list_files(patterns, flag, ("*.bin", "*.npy")) if file.path.suffix not in (".json", ".idx")]
    if not files:
        raise DataError(f"{flag}={patterns}: matches no .bin and no .npy file")
    return files


def _open_file(file: SourceFile, source: DataSource, tokenizer: Tokenizer, config: Config, cache_dir: Path) -> _TokenFile:
    name, path = file.name, file.path
    if path.suffix == ".npy":
        return _TokenFile(name, path, _split_of(path), "", _open_npy(path, source.separator, config, cache_dir))
    if _is_megatron(path):
        return _TokenFile(name, path, _split_of(path), "", _open_megatron(path, source.separator, tokenizer, config, cache_dir))
    if path.suffix != ".bin":
        raise DataError(f"{path}: kind=tokens reads .bin and .npy files; for text use kind=text, jsonl or parquet")
    part, told = open_stream(path, cache_dir, config.data.store_cache_gib << 30)
    made_by = told.tokenizer_fingerprint
    if tokenizer.fingerprint not in (made_by, NO_TOKENIZER):
        raise DataError(
            f"{path}: made by another tokenizer ({told.tokenizer}, {made_by[:8]}) than "
            f"data.tokenizer={config.data.tokenizer} ({tokenizer.fingerprint[:8]}); name the one that made it"
        )
    separator, limit = told.separator, config.model.vocab_size
    known = tokenizer.fingerprint != NO_TOKENIZER
    if separator != tokenizer.separator if known else not -1 <= separator < limit:
        wanted = f"that of its tokenizer is {tokenizer.separator}" if known else f"model.vocab_size={limit}"
        raise DataError(f"{path.with_suffix('.json')}: separator={separator}, but {wanted}; make the file again")
    if source.separator not in (-1, separator):
        raise DataError(
            f"{path}: {path.with_suffix('.json').name} says separator={separator}, but the source {source.separator}"
        )
    if isinstance(path, Path):  # its stated largest id is not trusted: the file may come from anywhere
        part = dataclasses.replace(part, largest_id=-1)
    return _TokenFile(name, path, told.split, made_by, part)


def _open_npy(path: SourcePath, separator: int, config: Config, cache_dir: Path) -> TokenPart:
    try:
        with path.open("rb") as file:
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = read[np.lib.format.read_magic(file)](file)
            offset = file.tell()
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # a broken header raises errors of many classes, tokenize.TokenError among them
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{path}: not a whole .npy array of numbers ({why})") from error
    if len(shape) != 1 or dtype.kind not in "iu":
        raise DataError(f"{path}: shape {shape} of {dtype}; tokens are a one-dimensional array of whole numbers")
    digest = file_hashes([path], cache_dir, f"checking {path.name}")[0]
    return TokenPart(_ids_of(path, dtype, shape[0], offset, config), digest, separator)


def _open_megatron(path: SourcePath, separator: int, tokenizer: Tokenizer, config: Config, cache_dir: Path) -> TokenPart:
    separator = tokenizer.separator if separator < 0 else separator
    if separator < 0:
        raise DataError(
            f"{path}: which id stands between its documents? Name the tokenizer that made it, or give the source separator="
        )
    index = path.with_suffix(".idx")
    dtype, starts = read_index(index, path.stat().st_size)
    digests = file_hashes([path, index], cache_dir, f"checking {path.name}")
    ids = _ids_of(path, dtype, int(starts[-1]), 0, config)
    return TokenPart(with_separators(ids, starts, separator), short_hash(digests), separator)


def _ids_of(path: SourcePath, dtype: np.dtype, count: int, offset: int, config: Config) -> np.ndarray | StoreTokens:
    """Return `count` ids of a file from byte `offset` on."""
    if isinstance(path, Path):
        return map_array(path, dtype, count, offset)
    blocks = block_cache(user_path(config.data.cache_dir) / "blocks", config.data.store_cache_gib << 30)
    return StoreTokens(path, dtype, count, offset, blocks)


def check_ids(part: TokenPart, name: str, tokenizer: Tokenizer, config: Config, cache_dir: Path) -> None:
    """Check that every id is in the vocabulary: on a device an id beyond the table would clamp silently.

    Ids are read only if not verified before. Raises DataError with the first bad id, its position, and the vocabulary that
    would hold it.
    """
    tokens, limit = part.tokens, min(tokenizer.vocab_size, config.model.vocab_size)
    assert not isinstance(tokens, JoinedTokens), "ids are checked before they are split"
    note = cache_dir / "hashes" / f"ids-{short_hash([part.sha256, limit])}"
    if 0 <= part.largest_id < limit or not len(tokens) or note.exists():
        return
    first, largest = _first_outside(tokens, limit, f"checking the ids of {name}")
    if first >= 0:
        value = int(tokens[first : first + 1][0])
        vocabulary = f"model.vocab_size={config.model.vocab_size}"
        way_out = f"use --model.vocab_size={largest + 1} or more"
        if value < 0:
            way_out = "ids are never negative"
        elif value < config.model.vocab_size:
            vocabulary = f"the {tokenizer.vocab_size} ids of data.tokenizer={config.data.tokenizer}"
            way_out = "name the tokenizer that made it, or --data.tokenizer=none"
        raise DataError(f"{name}: token id {value} at position {first} is outside {vocabulary}; {way_out}")
    keep_note(note, "")


def _first_outside(tokens: FileTokens, limit: int, title: str) -> tuple[int, int]:
    """(position of the first id outside [0, limit) or -1, largest id)."""
    first, largest = -1, -1
    with progress(title, tokens.nbytes) as advance:
        for start in range(0, len(tokens), SCAN_TOKENS):
            block = tokens[start : start + SCAN_TOKENS]
            bad = np.flatnonzero((block < 0) | (block >= limit))
            first = start + int(bad[0]) if first < 0 and bad.size else first
            largest = max(largest, int(block.max()))
            advance(block.nbytes)
    return first, largest
