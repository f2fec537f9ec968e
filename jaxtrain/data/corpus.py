"""A corpus: the documents of one source, each labelled as training or held-out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxtrain.config import ROW_KINDS, DataSource
from jaxtrain.data.documents import BadRows, read_documents
from jaxtrain.data.file_hashes import file_hashes, short_hash
from jaxtrain.data.listing import SourceFile, list_files, list_stdlib
from jaxtrain.data.progress import Advance, progress
from jaxtrain.data.split import split_document, split_rule
from jaxtrain.data.store_path import SourcePath
from jaxtrain.errors import DataError

IN_FOLDER = {"arrow": ("data-*.arrow", "train/data-*.arrow", "*.arrow"), "tar": ("*.tar",), "parquet": ("*.parquet",)}
"""What a folder stands for: the first of the globs that matches; arrow as `datasets` saves a set, or sets with a train."""


@dataclass(frozen=True)
class Document:
    """A non-empty document, or part of a long one. `file` is the index of its file."""

    text: str
    file: int
    held_out: bool


@dataclass(frozen=True)
class Corpus:
    """The documents of one source: one per file, or one per row for a kind in ROW_KINDS."""

    source: DataSource
    name: str
    files: tuple[SourceFile, ...]
    hashes: tuple[str, ...]
    validation_fraction: float

    @cached_property
    def key(self) -> str:
        """Hash of all that decides which documents there are and on which side; holds no absolute path."""
        field = self.source.text_field if self.source.kind in ROW_KINDS else ""
        return short_hash([self.hashes, self.source.kind, field, self.split_rule, self.source.max_bad_rows])

    @cached_property
    def sizes(self) -> list[int]:
        return [file.path.stat().st_size for file in self.files]

    @property
    def split_rule(self) -> str:
        """The rule by which documents are held out: sources of the same rule hold out the same ones."""
        return split_rule(self.validation_fraction)

    def documents(self, title: str, bad_rows: BadRows | None = None) -> Iterator[Document]:
        """Yield the parts of all documents in order (see `split_document`), with a progress bar named `title` over the bytes
        read.

        Bad rows are counted in `bad_rows`. Raises DataError where a file is missing, damaged or of another kind.
        """
        with progress(title, sum(self.sizes)) as advance:
            yield from self.documents_of(range(len(self.files)), advance, bad_rows or BadRows(self.source.max_bad_rows))

    def documents_of(self, files: range, advance: Advance, bad_rows: BadRows) -> Iterator[Document]:
        """Yield the parts of the documents of some of the files; `advance` is told of about as many bytes as are read."""
        for i in files:
            shown = 0
            for text in read_documents(self.source.kind, self.files[i].path, self.source.text_field, bad_rows):
                for part, is_held_out in split_document(text, self.validation_fraction) if text else ():
                    yield Document(part, i, is_held_out)
                    step = min(len(part), self.sizes[i] - shown)
                    advance(step)
                    shown += step
            advance(self.sizes[i] - shown)


def open_corpus(source: DataSource, name: str, validation_fraction: float, cache_dir: Path) -> Corpus:
    """List and hash the files of a source of text; `name` is its name in errors ("data.sources.0").

    Raises DataError where a glob matches nothing or a file cannot be read.
    """
    flag = name if name.startswith("--") else f"{name}.path"
    files = list_stdlib() if source.kind == "stdlib" else list_files(source.path, flag, IN_FOLDER.get(source.kind, ()))
    if source.kind == "arrow":
        _check_state([file.path for file in files])
    hashes = file_hashes([file.path for file in files], cache_dir, f"reading {name}")
    return Corpus(source, name, tuple(files), tuple(hashes), validation_fraction)


def _check_state(paths: Sequence[SourcePath]) -> None:
    """Raise DataError if a folder of the package datasets lacks a file that its state.json names."""
    for state in {path.with_name("state.json"): None for path in paths}:
        if not state.exists():
            continue
        try:
            names = {entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{state}: is no state of a folder of datasets ({error}); save it again") from error
        here = {path.name for path in paths if path.with_name("state.json") == state}
        if missing := sorted(names - here):
            raise DataError(f"{state}: names {missing[0]}, which is not there or not among the files of the source")


def training_texts(corpora: Sequence[Corpus], largest_sample: int) -> Iterator[str]:
    """Yield the texts to train a tokenizer on: every k-th training document, with k for about `largest_sample` bytes."""
    total = sum(sum(corpus.sizes) for corpus in corpora)
    stride = max(1, -(-total // largest_sample))
    for corpus in corpora:
        documents = corpus.documents(f"training a tokenizer on {corpus.name}")
        training = (document.text for document in documents if not document.held_out)
        yield from (text for i, text in enumerate(training) if i % stride == 0)


def check_sides(corpus: Corpus, training_documents: int, validation_documents: int) -> None:
    """Raise DataError if there is no training document."""
    if training_documents:
        return
    total = f"{len(corpus.files)} file{'s' if len(corpus.files) > 1 else ''}"
    if validation_documents:
        held_out = f"all of its {validation_documents} documents are" if validation_documents > 1 else "its only document is"
        raise DataError(
            f"{corpus.name}: {held_out} held out, each by the hash of its text at "
            f"data.validation_fraction={corpus.validation_fraction}; give more documents, or --data.validation_fraction=0"
        )
    raise DataError(f"{corpus.name}: no text in its {total}; the corpus is empty")
