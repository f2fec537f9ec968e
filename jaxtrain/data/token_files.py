"""Opens sources that are tokens already: .bin files made by `python -m jaxtrain.tokenize`, and .npy arrays."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxtrain.config import Config, DataSource
from jaxtrain.data.file_hashes import file_hashes, short_hash, unreadable
from jaxtrain.data.listing import SourceFile, list_files
from jaxtrain.data.packing import num_full_windows
from jaxtrain.data.progress import progress
from jaxtrain.data.split import held_out
from jaxtrain.data.token_stream import TokenStream, open_stream
from jaxtrain.data.tokenizers import NO_TOKENIZER, Tokenizer
from jaxtrain.errors import DataError

SCAN_TOKENS = 1 << 22


@dataclass(frozen=True)
class TokenPart:
    """A stretch of ids, [count], that is cut into windows by itself.

    `largest_id` is -1 where the ids were never looked at. `utf8_bytes`, `gzip_bytes` and `gzip_input_bytes` are those of
    the text that the ids came from; 0 where unknown.
    """

    tokens: np.ndarray
    sha256: str
    separator: int
    largest_id: int = -1
    utf8_bytes: int = 0
    gzip_bytes: int = 0
    gzip_input_bytes: int = 0


def part_of_stream(stream: TokenStream) -> TokenPart:
    """A whole stream as one part."""
    data = stream.metadata
    return TokenPart(
        stream.tokens, data.sha256, data.separator, data.largest_id, data.utf8_bytes, data.gzip_bytes, data.gzip_input_bytes
    )


@dataclass(frozen=True)
class _TokenFile:
    name: str
    split: str
    made_by: str
    part: TokenPart


def open_token_files(
    source: DataSource, name: str, tokenizer: Tokenizer, config: Config, cache_dir: Path
) -> tuple[list[TokenPart], list[TokenPart]]:
    """The training parts and the held-out parts of a source of kind tokens.

    Files whose JSON says split=validation are held out, if there are any; else files are held out by name; else, of a
    single file, the last windows. Raises DataError for damaged files, ids beyond the model's or the tokenizer's
    vocabulary, and ids made by another tokenizer than `tokenizer`.
    """
    fraction, length = config.data.validation_fraction, config.data.sequence_length
    files = [_open_file(file.name, file.path, tokenizer, config, cache_dir) for file in _list(source.path, f"{name}.path")]
    makers = {file.made_by for file in files if file.made_by}
    if len(makers) > 1:
        raise DataError(f"{name}.path={source.path}: its files were made by {len(makers)} different tokenizers")
    for file in files:
        check_ids(file.part, file.name, tokenizer, config, cache_dir)
    if any(file.split == "validation" for file in files):
        mask = np.array([file.split == "validation" for file in files])
    elif len(files) > 1:
        mask = held_out((file.name for file in files), fraction)
    else:
        return _cut_windows(files[0].part, fraction, length)
    train = [file.part for file, is_held_out in zip(files, mask, strict=True) if not is_held_out]
    validation = [file.part for file, is_held_out in zip(files, mask, strict=True) if is_held_out]
    if not train:
        raise DataError(f"{name}.path={source.path}: every file is held-out text; name the training file too")
    return train, validation


def _list(patterns: str, flag: str) -> list[SourceFile]:
    """The token files of globs or folders, without the JSON files beside them."""
    files = [file for file in list_files(patterns, flag, ("*.bin", "*.npy")) if file.path.suffix != ".json"]
    if not files:
        raise DataError(f"{flag}={patterns}: matches no .bin and no .npy file")
    return files


def _open_file(name: str, path: Path, tokenizer: Tokenizer, config: Config, cache_dir: Path) -> _TokenFile:
    if path.suffix == ".npy":
        return _TokenFile(name, "train", "", _open_npy(path, tokenizer.separator, cache_dir))
    if path.suffix != ".bin":
        raise DataError(f"{path}: kind=tokens reads .bin and .npy files; for text use kind=text, jsonl or parquet")
    stream = open_stream(path, cache_dir)
    made_by = stream.metadata.tokenizer_fingerprint
    if tokenizer.fingerprint not in (made_by, NO_TOKENIZER):
        raise DataError(
            f"{path}: made by another tokenizer ({stream.metadata.tokenizer}, {made_by[:8]}) than "
            f"data.tokenizer={config.data.tokenizer} ({tokenizer.fingerprint[:8]}); name the one that made it"
        )
    separator, limit = stream.metadata.separator, config.model.vocab_size
    known = tokenizer.fingerprint != NO_TOKENIZER
    if separator != tokenizer.separator if known else not -1 <= separator < limit:
        wanted = f"that of its tokenizer is {tokenizer.separator}" if known else f"model.vocab_size={limit}"
        raise DataError(f"{path.with_suffix('.json')}: separator={separator}, but {wanted}; make the file again")
    # What it says of its largest id is not believed: the file may come from anywhere.
    return _TokenFile(name, stream.metadata.split, made_by, dataclasses.replace(part_of_stream(stream), largest_id=-1))


def _open_npy(path: Path, separator: int, cache_dir: Path) -> TokenPart:
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # unlike np.load it knows neither pickles nor archives
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # a broken header raises errors of many classes, tokenize.TokenError among them
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{path}: not a whole .npy array of numbers ({why})") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"{path}: shape {array.shape} of {array.dtype}; tokens are a one-dimensional array of whole numbers")
    digest = file_hashes([path], cache_dir, f"checking {path.name}")[0]
    return TokenPart(array.view(np.ndarray), digest, separator)


def check_ids(part: TokenPart, name: str, tokenizer: Tokenizer, config: Config, cache_dir: Path) -> None:
    """Makes sure that every id is in the vocabulary: on a device an id beyond the table would clamp without a word.

    Ids are read only where nothing vouches for them already. Raises DataError with the first bad id, its place, and
    the vocabulary that would do.
    """
    limit = min(tokenizer.vocab_size, config.model.vocab_size)
    note = cache_dir / "hashes" / f"ids-{short_hash([part.sha256, limit])}"
    if 0 <= part.largest_id < limit or not len(part.tokens) or note.exists():
        return
    first, largest = _first_outside(part.tokens, limit, f"checking the ids of {name}")
    if first >= 0:
        value = int(part.tokens[first])
        vocabulary = f"model.vocab_size={config.model.vocab_size}"
        way_out = f"use --model.vocab_size={largest + 1} or more"
        if value < 0:
            way_out = "ids are never negative"
        elif value < config.model.vocab_size:
            vocabulary = f"the {tokenizer.vocab_size} ids of data.tokenizer={config.data.tokenizer}"
            way_out = "name the tokenizer that made it, or --data.tokenizer=none"
        raise DataError(f"{name}: token id {value} at position {first} is outside {vocabulary}; {way_out}")
    with suppress(OSError):  # the note only saves time
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def _first_outside(tokens: np.ndarray, limit: int, title: str) -> tuple[int, int]:
    """(place of the first id outside [0, limit), or -1; the largest id)."""
    first, largest = -1, -1
    with progress(title, tokens.nbytes) as advance:
        for start in range(0, len(tokens), SCAN_TOKENS):
            block = tokens[start : start + SCAN_TOKENS]
            bad = np.flatnonzero((block < 0) | (block >= limit))
            first = start + int(bad[0]) if first < 0 and bad.size else first
            largest = max(largest, int(block.max()))
            advance(block.nbytes)
    return first, largest


def _cut_windows(part: TokenPart, fraction: float, length: int) -> tuple[list[TokenPart], list[TokenPart]]:
    """Holds out the last windows of a part. The sides share one token, which is a target on one and an input on the other."""
    windows = num_full_windows(len(part.tokens), length)
    count = max(1, round(windows * fraction)) if fraction > 0 and windows > 1 else 0
    if not count:
        return [part], []
    cut = (windows - min(count, windows - 1)) * length
    train = dataclasses.replace(part, tokens=part.tokens[: cut + 1], sha256=f"{part.sha256}:{cut + 1}", utf8_bytes=0)
    validation = dataclasses.replace(part, tokens=part.tokens[cut:], sha256=f"{part.sha256}:{cut}:", utf8_bytes=0)
    return [train], [dataclasses.replace(validation, gzip_bytes=0, gzip_input_bytes=0)]
