"""A corpus: the documents of one source, each labelled as training or held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from jaxtrain.config import ROW_KINDS, DataSource
from jaxtrain.data.documents import BadRows, read_documents
from jaxtrain.data.file_hashes import file_hashes, short_hash
from jaxtrain.data.listing import SourceFile, list_files, list_stdlib
from jaxtrain.data.progress import progress
from jaxtrain.data.split import SPLIT_RULE, held_out
from jaxtrain.errors import DataError


@dataclass(frozen=True)
class Document:
    """A document that is not empty. `file` is the index of its file; `held_out` tells its side of the split."""

    text: str
    file: int
    held_out: bool


@dataclass(frozen=True)
class Corpus:
    """The documents of one source.

    Split by file where files are plenty; by document where a source of rows has fewer than 1/validation_fraction
    files; and a single text file is cut at a line, its end being held out.
    """

    source: DataSource
    name: str
    files: tuple[SourceFile, ...]
    hashes: tuple[str, ...]
    validation_fraction: float

    @cached_property
    def key(self) -> str:
        """Hash of all that decides which documents there are and on which side; no absolute path is in it."""
        files = [[file.name, digest] for file, digest in zip(self.files, self.hashes, strict=True)]
        field = self.source.text_field if self.source.kind in ROW_KINDS else ""
        parts = [files, self.source.kind, field, self.validation_fraction, self.split_by, SPLIT_RULE]
        return short_hash([*parts, self.source.max_bad_rows] if self.source.max_bad_rows else parts)

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of each file."""
        return [file.path.stat().st_size for file in self.files]

    @property
    def split_by(self) -> str:
        """What is held out whole: "file", "document" or "line"."""
        few = len(self.files) * self.validation_fraction < 1 or len(self.files) == 1
        if self.source.kind in ROW_KINDS and few:
            return "document"
        return "line" if len(self.files) == 1 else "file"

    @cached_property
    def held_out_mask(self) -> np.ndarray:
        """Which files, or which documents, are held out. Counting documents reads the files, under a progress bar."""
        if self.split_by == "file":
            return held_out((file.name for file in self.files), self.validation_fraction)
        documents = (Document(text, i, False) for i, text in self._texts())
        counted = _with_progress(documents, self.sizes, f"counting the documents of {self.name}")
        names = (f"{self.files[document.file].name}:{number}" for number, document in enumerate(counted))
        return held_out(names, self.validation_fraction)

    def documents(self, title: str, bad_rows: BadRows | None = None) -> Iterator[Document]:
        """All documents in order, without the empty ones, while a progress bar called `title` shows the bytes read.

        Rows that are left out are counted in `bad_rows`. Raises DataError where a file is not what it should be.
        """
        if self.split_by == "line":
            yield from self._cut_document()
            return
        mask, by_file = self.held_out_mask, self.split_by == "file"
        numbered = enumerate(self._texts(bad_rows))
        documents = (Document(text, i, bool(mask[i if by_file else number])) for number, (i, text) in numbered)
        yield from _with_progress(documents, self.sizes, title)

    def _texts(self, bad_rows: BadRows | None = None) -> Iterator[tuple[int, str]]:
        """(index of the file, text) of every document that is not empty."""
        bad_rows = bad_rows or BadRows(self.source.max_bad_rows)
        for i, file in enumerate(self.files):
            for text in read_documents(self.source.kind, file.path, self.source.text_field, bad_rows):
                if text:
                    yield i, text

    def _cut_document(self) -> Iterator[Document]:
        """The one document, cut at the line end nearest before the held-out share of its characters."""
        for i, text in self._texts():
            wanted = round(len(text) * (1 - self.validation_fraction))
            cut = text.rfind("\n", 0, wanted) + 1 or wanted
            parts = [(text[:cut], False), (text[cut:], True)] if self.validation_fraction > 0 else [(text, False)]
            yield from (Document(part, i, is_held_out) for part, is_held_out in parts if part)


def open_corpus(source: DataSource, name: str, validation_fraction: float, cache_dir: Path) -> Corpus:
    """Lists and hashes the files of a source of text; `name` is how to call it in errors ("data.sources.0").

    Raises DataError where a glob matches nothing or a file cannot be read.
    """
    flag = name if name.startswith("--") else f"{name}.path"
    files = list_stdlib() if source.kind == "stdlib" else list_files(source.path, flag)
    hashes = file_hashes([file.path for file in files], cache_dir, f"reading {name}")
    return Corpus(source, name, tuple(files), tuple(hashes), validation_fraction)


def _with_progress(documents: Iterator[Document], sizes: Sequence[int], title: str) -> Iterator[Document]:
    """The same documents, while a bar shows the share of the files' bytes that has been read."""
    with progress(title, sum(sizes)) as advance:
        current, shown = 0, 0
        for document in documents:
            while current < document.file:
                advance(sizes[current] - shown)
                current, shown = current + 1, 0
            yield document
            step = min(len(document.text), sizes[current] - shown)
            advance(step)
            shown += step


def training_texts(corpora: Sequence[Corpus], largest_sample: int) -> Iterator[str]:
    """Texts to train a tokenizer on: every k-th training document, with k so that about `largest_sample` bytes come."""
    total = sum(sum(corpus.sizes) for corpus in corpora)
    stride = max(1, -(-total // largest_sample))
    for corpus in corpora:
        documents = corpus.documents(f"training a tokenizer on {corpus.name}")
        training = (document.text for document in documents if not document.held_out)
        yield from (text for i, text in enumerate(training) if i % stride == 0)


def training_key(corpora: Sequence[Corpus]) -> str:
    """Hash that changes whenever the documents that a tokenizer is trained on may."""
    return short_hash([corpus.key for corpus in corpora])


def check_sides(corpus: Corpus, training_documents: int, validation_documents: int) -> None:
    """Raises DataError where there is nothing to train on."""
    if training_documents:
        return
    total = f"{len(corpus.files)} file{'s' if len(corpus.files) > 1 else ''}"
    if validation_documents:
        raise DataError(
            f"{corpus.name}: all of its {total} are held out; lower data.validation_fraction={corpus.validation_fraction}"
        )
    raise DataError(f"{corpus.name}: no text in its {total}; the corpus is empty")
