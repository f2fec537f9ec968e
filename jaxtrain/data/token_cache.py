"""Tokenize a corpus once, into a cache folder that several processes may want at the same time."""

from __future__ import annotations

import glob
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from jaxtrain.data.corpus import Corpus, check_sides, training_texts
from jaxtrain.data.file_hashes import short_hash
from jaxtrain.data.json_tokenizer import JsonTokenizer, train_bpe
from jaxtrain.data.token_part import TokenPart
from jaxtrain.data.token_stream import FORMAT, StreamMetadata, StreamWriter, open_stream
from jaxtrain.data.tokenize_parts import SIDES, join_parts, write_parts
from jaxtrain.data.tokenizers import Tokenizer, load_tokenizer
from jaxtrain.errors import DataError
from jaxtrain.files import file_lock

LARGEST_TRAINING_SAMPLE = 100_000_000
ABANDONED_SECONDS = 24 * 3600
T = TypeVar("T")


def unwritable(path: Path, error: OSError) -> DataError:
    """Return the error for a cache that cannot be written."""
    return DataError(f"data.cache_dir: cannot write {path} ({error.strerror or error}); name another with --data.cache_dir")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` as a lock between the processes of a host.

    On a file system without locks work may be done twice, but results are renamed into place whole, so nothing breaks. Raises
    DataError where the lock file cannot be made.
    """
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(path))
        except OSError as error:
            raise unwritable(path, error) from error
        yield


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Make a temporary folder; rename it to `target` when the block succeeds, remove it when it fails.

    A folder already at `target` is replaced. Raises OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{target.name}.unfinished-jaxtrain-"
    for old in target.parent.glob(glob.escape(prefix) + "*"):
        with suppress(OSError):
            if time.time() - max(path.stat().st_mtime for path in (old, *old.iterdir())) > ABANDONED_SECONDS:
                shutil.rmtree(old)
    temporary = target.with_name(f"{prefix}{os.getpid()}-{os.urandom(4).hex()}")
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            replaced = temporary.with_name(f"{temporary.name}-replaced")
            target.rename(replaced)
            shutil.rmtree(replaced, ignore_errors=True)
        _rename_unless_present(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_unless_present(temporary: Path, target: Path) -> None:
    """Rename, unless another host, whose lock is not visible here, has put the same content there first."""
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def write_streams(
    corpus: Corpus, tokenizer: Tokenizer, names: tuple[str, str], folder: Path, parts: Path, processes: int = 1
) -> dict[str, StreamMetadata]:
    """Tokenize a corpus into folder/train.bin and folder/validation.bin with their JSON files, with a progress bar.

    `names` are that of the tokenizer that people see, and that by which a process loads it. What is done is kept in the folder
    `parts` until all is (see `tokenize_parts`). Raises DataError for bad documents or an empty corpus, OSError where writing
    fails.
    """
    bad_rows = write_parts(corpus, tokenizer, names[1], parts, processes)
    bad_rows.check(corpus.name)
    writers = {split: StreamWriter(folder / f"{split}.bin", split, tokenizer, names[0], corpus.split_rule) for split in SIDES}
    try:
        join_parts(parts, writers)
        metadata = {split: writer.close(bad_rows) for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
    check_sides(corpus, metadata["train"].documents, metadata["validation"].documents)
    shutil.rmtree(parts, ignore_errors=True)
    return metadata


def cached_streams(
    corpus: Corpus, tokenizer: Tokenizer, tokenizer_name: str, cache_dir: Path
) -> list[tuple[TokenPart, StreamMetadata]]:
    """Return the token streams of a corpus, of training and held-out documents: from the cache if whole, else tokenized now.

    Raises DataError for bad documents, an empty corpus, or a cache that cannot be written.
    """
    folder = cache_dir / "streams" / short_hash([corpus.key, tokenizer.fingerprint, FORMAT])
    open_both = lambda: [open_stream(folder / f"{side}.bin", cache_dir) for side in SIDES]  # noqa: E731
    names, parts = (tokenizer_name, tokenizer_name), folder.with_name(f"{folder.name}.parts")
    return made_once(folder, open_both, lambda temporary: write_streams(corpus, tokenizer, names, temporary, parts))


def made_once(folder: Path, open_it: Callable[[], T], make: Callable[[Path], object]) -> T:
    """Return what is in a folder of the cache; if it is missing or damaged, make it first, in one process of the host."""
    with suppress(DataError):
        return open_it()
    with locked(folder.with_name(f"{folder.name}.lock")):
        with suppress(DataError):  # another process may have made it while we waited
            return open_it()
        try:
            with new_folder(folder) as temporary:
                make(temporary)
        except OSError as error:
            raise unwritable(folder, error) from error
    return open_it()


def trained_tokenizer(corpora: Sequence[Corpus], vocab_size: int, cache_dir: Path) -> tuple[JsonTokenizer, Path]:
    """Return a byte-level BPE of at most `vocab_size` ids, trained on the training documents only, and its tokenizer.json.

    It is kept in cache_dir/tokenizers and trained again if the documents change. Raises DataError like `cached_streams`.
    """
    key = short_hash([short_hash([corpus.key for corpus in corpora]), vocab_size, LARGEST_TRAINING_SAMPLE, "bpe-1"])
    path = cache_dir / "tokenizers" / key / "tokenizer.json"

    def load() -> JsonTokenizer:
        tokenizer = load_tokenizer(str(path))
        assert isinstance(tokenizer, JsonTokenizer)
        return tokenizer

    def train(folder: Path) -> None:
        content = train_bpe(training_texts(corpora, LARGEST_TRAINING_SAMPLE), vocab_size)
        (folder / path.name).write_text(content, encoding="utf-8")

    return made_once(path.parent, load, train), path
