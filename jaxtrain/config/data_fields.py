"""The fields of the training data: section `data` of the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ROW_KINDS = ("jsonl", "parquet", "arrow", "tar", "array_record", "chat")
TEXT_FIELD_KINDS = ("jsonl", "parquet", "arrow", "tar")
SourceKind = Literal["stdlib", "text", "jsonl", "parquet", "arrow", "tar", "tokens", "array_record", "synthetic", "chat"]
TooLong = Literal["drop", "truncate", "refuse"]


@dataclass(frozen=True)
class DataSource:
    """One source of documents."""

    kind: SourceKind = "stdlib"
    """stdlib: the running Python's own source code. text: files. jsonl, parquet, arrow: one document per row. tar: one per
    sample, its member .txt or .json. tokens: .bin made by `jaxtrain tokenize`, or Megatron's with an .idx, or .npy.
    array_record: one UTF-8 document per record. synthetic: random tokens. chat: JSONL or Parquet rows of messages; prompt and
    completion; chosen and rejected; or prompts alone (jaxtrain/data/README.md)."""
    path: str = ""
    """Files to read, as a glob ("books/**/*.txt"), or as a URL with one ("s3://bucket/books/*.jsonl"); several are separated by
    commas. text, jsonl and chat may be compressed: gzip, bzip2, xz, zstd."""
    text_field: str = "text"
    """Field of a row, or of a sample's .json, that holds the text."""
    max_bad_rows: float = 0.0
    """Largest share of the rows that may be broken (not JSON, not UTF-8, without text): they are left out and counted. 0: the
    first one is an error."""
    separator: int = -1
    """Only for tokens. In .npy files: the id with which each document begins; -1: the ids are one stream. In Megatron's files,
    whose .idx tells documents apart: the id between them; -1: the tokenizer's own."""
    weight: float = 1.0
    """Share of this source in the mixture, relative to the other sources; 0 until train.stages give it one."""
    max_epochs: float = 0.0
    """Most times that the run may read this source; one that would read it more often is refused at its start. 0: no limit."""
    order: Literal["shuffled", "files"] = "shuffled"
    """Order of its rows in each epoch. files: as path lists the files and these have the documents, so that a source is a
    curriculum; rows that are packed have no such order."""
    name: str = ""
    """Its name in metrics; empty: source0, source1 and so on, of data.validation set0, set1."""


@dataclass(frozen=True)
class DataConfig:
    """The training data. Batch n is a pure function of the data, train.seed and n."""

    sources: tuple[DataSource, ...] = (DataSource(),)
    """The mixture; flags are --data.sources.0.kind and so on."""
    tokenizer: str = "byte"
    """byte; bpe:SIZE (a byte-level BPE trained on the data at first use); a tokenizer.json; a SentencePiece .model; or none,
    if every source is token ids already."""
    sequence_length: int = 256
    """Tokens in a sequence."""
    mask_documents: bool = True
    """Restrict attention to the document, and restart positions with it, if several are packed into a sequence."""
    packing: Literal["stream", "best_fit"] = "stream"
    """How documents fill training rows. stream: one after the other, cut where a row ends. best_fit: whole, but for those that
    are longer than a row, with padding at the rows' ends."""
    validation: tuple[DataSource, ...] = ()
    """Sets to validate on beside what the sources hold out: each whole, under its own name; flags --data.validation.0.kind and
    so on."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out, chosen by the hash of their text, so that copies are never on both sides; of a
    document of more than 100,000 characters, its end. With few documents none may be held out."""
    chat_template: str = ""
    """Chat template of sources of kind=chat: a .jinja file, or a folder with one; empty: that beside data.tokenizer, or in the
    folder init_from."""
    too_long: TooLong = "drop"
    """What happens to a chat sample of more than sequence_length tokens. drop: left out. truncate: its end is cut off, if an
    answer's token remains; pairs and prompts are dropped. refuse: the run ends. Each is counted in the log."""
    prefetch: int = 4
    """Number of batches made ahead of the step."""
    workers: int = 0
    """Number of threads that make batches; 0: one, or `prefetch` where token files lie behind a URL."""
    cache_dir: str = "~/.cache/jaxtrain/data"
    """Folder that keeps tokenized text and trained tokenizers between runs."""
    store_cache_gib: int = 16
    """GiB of blocks of token files behind URLs that cache_dir keeps; the oldest go first. 0: none."""


def names_of(sources: Sequence[DataSource], otherwise: str) -> tuple[str, ...]:
    """Return the names of sources in metrics; `otherwise` and its number for one that has none."""
    return tuple(source.name or f"{otherwise}{number}" for number, source in enumerate(sources))
