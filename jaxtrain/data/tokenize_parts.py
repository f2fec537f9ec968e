"""Tokenize a corpus in parts, each kept on disk once it is done, in this process or in several.

A group is one large file or several small ones, a part a stretch of its documents. Where they begin depends on the files alone,
so the ids do not depend on the number of processes, and a run that was killed goes on with the parts that are missing. In a
folder beside the result:

    GROUP-PART.train, .validation     its ids, int32, each document after a separator
    GROUP-PART.held                   its held-out documents, UTF-8
    GROUP-PART.json                   its counts, written last
    GROUP.json                        how many parts it has, and its bad rows: all of it was read
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.data.corpus import Corpus, Document
from jaxtrain.data.documents import BadRows
from jaxtrain.data.progress import progress
from jaxtrain.data.token_stream import StreamWriter
from jaxtrain.data.tokenizers import Tokenizer, load_tokenizer
from jaxtrain.errors import DataError
from jaxtrain.files import replace_file

GROUP_BYTES = 1 << 24
"""Bytes of the small files that make a group."""
PART_CHARACTERS = 1 << 23
BATCH_CHARACTERS = 1 << 21
"""Per call of the tokenizer: enough for its threads, little for memory."""
SIDES = ("train", "validation")
Encode = Callable[[Sequence[Document], Path], Future[None]]


def encode_part(documents: Sequence[Document], tokenizer: Tokenizer, name: str, target: Path) -> None:
    """Write the files of the part `target`, a path without a suffix. Raises DataError where the tokenizer fails."""
    ids: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}
    separator, held, utf8_bytes = np.array([tokenizer.separator], np.int32), [], 0
    for batch in _stretches(documents, BATCH_CHARACTERS):
        for document, found in zip(batch, tokenizer.encode_batch([one.text for one in batch]), strict=True):
            _check_separator(found, tokenizer.separator, document.text, name)
            ids["validation" if document.held_out else "train"] += [separator, found.astype(np.int32)]
            content = document.text.encode()
            if document.held_out:
                held.append(content)
            else:
                utf8_bytes += len(content)
    for side, arrays in ids.items():
        replace_file(target.with_suffix(f".{side}"), b"".join(array.tobytes() for array in arrays))
    replace_file(target.with_suffix(".held"), b"".join(held))
    about = {"documents": len(documents) - len(held), "utf8_bytes": utf8_bytes, "held": [len(content) for content in held]}
    replace_file(target.with_suffix(".json"), json.dumps(about))


def _check_separator(ids: np.ndarray, separator: int, text: str, tokenizer_name: str) -> None:
    """Raise DataError where the separator is among the ids of a document."""
    if (inside := np.flatnonzero(ids == separator)).size:
        raise DataError(
            f"tokenizer {tokenizer_name}: gave the id {separator} that separates documents at position {inside[0]} "
            f"of the document that begins {text[:60]!r}; use a tokenizer with a separator of its own"
        )


def write_parts(corpus: Corpus, tokenizer: Tokenizer, tokenizer_name: str, folder: Path, processes: int) -> BadRows:
    """Write the parts that `folder` lacks, with one progress bar; return the bad rows of the whole corpus.

    `tokenizer_name` is what processes load it by; one process is this one, whose tokenizer may use all cores. Raises DataError
    for bad documents, OSError where writing fails.
    """
    key = json.dumps([corpus.key, tokenizer.fingerprint, GROUP_BYTES, PART_CHARACTERS])
    if not (folder / "key").is_file() or (folder / "key").read_text(encoding="utf-8") != key:
        for old in folder.glob("*"):
            old.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "key", key)
    total = BadRows(corpus.source.max_bad_rows)
    with (
        progress(f"tokenizing {corpus.name}", sum(corpus.sizes)) as advance,
        _encoders(tokenizer, tokenizer_name, processes) as encode,
    ):
        pending: deque[Future[None]] = deque()
        for group, files in enumerate(_groups(corpus.sizes)):
            about = _finished(folder, group)
            if about is None:
                bad, count = BadRows(corpus.source.max_bad_rows), 0
                for part in _stretches(corpus.documents_of(files, advance, bad), PART_CHARACTERS):
                    target = folder / f"{group}-{count}"
                    count += 1
                    if not target.with_suffix(".json").exists():
                        pending.append(encode(part, target))
                    while len(pending) > 2 * processes:
                        pending.popleft().result()
                about = {"parts": count, "rows": bad.rows, "bad_rows": bad.count, "first": bad.first}
                replace_file(folder / f"{group}.json", json.dumps(about))
            else:
                advance(sum(corpus.sizes[file] for file in files))
            total.add(about["rows"], about["bad_rows"], about["first"])
        while pending:
            pending.popleft().result()
    return total


def join_parts(folder: Path, writers: dict[str, StreamWriter]) -> None:
    """Write the parts in their order into the streams. Raises OSError."""
    group = 0
    while (about := _finished(folder, group)) is not None:
        for part in range(about["parts"]):
            path = folder / f"{group}-{part}.json"
            counts = json.loads(path.read_text(encoding="utf-8"))
            writers["train"].extend(_ids(path, "train"), counts["documents"], counts["utf8_bytes"])
            with path.with_suffix(".held").open("rb") as held:
                contents = [held.read(size) for size in counts["held"]]
            writers["validation"].extend(_ids(path, "validation"), len(contents), sum(counts["held"]), contents)
        group += 1


def _ids(path: Path, side: str) -> np.ndarray:
    return np.fromfile(path.with_suffix(f".{side}"), np.int32)


def _groups(sizes: Sequence[int]) -> Iterator[range]:
    """Yield the files of each group."""
    first, size = 0, 0
    for file, more in enumerate(sizes):
        if file > first and size + more > GROUP_BYTES:
            yield range(first, file)
            first, size = file, 0
        size += more
    yield range(first, len(sizes))


def _stretches(documents: Sequence[Document] | Iterator[Document], size: int) -> Iterator[list[Document]]:
    """Yield neighbouring documents of `size` characters together, or a few more."""
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _finished(folder: Path, group: int) -> dict | None:
    """Return what is noted of a group that was read and whose parts are all there."""
    try:
        about = json.loads((folder / f"{group}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return about if all((folder / f"{group}-{part}.json").exists() for part in range(about["parts"])) else None


@contextmanager
def _encoders(tokenizer: Tokenizer, name: str, processes: int) -> Iterator[Encode]:
    """Yield a function that begins to write a part, in one of `processes`, and returns its future."""
    pool: Executor = ThreadPoolExecutor(1)
    if processes > 1:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(processes, context, _begin_worker, (name, tokenizer.fingerprint))
    try:
        if processes > 1:
            yield lambda documents, target: pool.submit(_encode_in_worker, documents, target)
        else:
            yield lambda documents, target: pool.submit(encode_part, documents, tokenizer, name, target)
    except BrokenProcessPool as error:
        raise DataError("a tokenizing process ended; give the same command again: what is done is kept") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_of_worker: list[Any] = []
"""In a process of its own: the tokenizer, its name, and the fingerprint that it must have."""


def _begin_worker(name: str, fingerprint: str) -> None:
    """Load the tokenizer in a process, which ends with the one that started it, also where that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the process that started this one ends it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    starter = multiprocessing.parent_process()
    assert starter is not None
    threading.Thread(target=lambda: (starter.join(), os._exit(1)), daemon=True).start()
    _of_worker[:] = load_tokenizer(name), name, fingerprint


def _encode_in_worker(documents: Sequence[Document], target: Path) -> None:
    tokenizer, name, fingerprint = _of_worker
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"{name}: was changed while it was used")
    encode_part(documents, tokenizer, name, target)
