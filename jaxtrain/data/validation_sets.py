"""Sets of data.validation: sources of which every token is held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtrain.config import Config, DataSource
from jaxtrain.data.chat_source import open_chat
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.open_source import OpenSource
from jaxtrain.data.token_cache import cached_streams
from jaxtrain.data.token_files import open_token_files
from jaxtrain.data.tokenizers import Tokenizer
from jaxtrain.data.windows import StreamWindows
from jaxtrain.errors import DataError


def config_of_set(config: Config, source: DataSource) -> Config:
    """Return a config with a set as its only source, from which nothing is taken away."""
    source, train = dataclasses.replace(source, weight=1.0, max_epochs=0.0), dataclasses.replace(config.train, stages=())
    data = dataclasses.replace(config.data, sources=(source,), validation=(), validation_fraction=0.0)
    return dataclasses.replace(config, data=data, train=train)


def open_set(
    source: DataSource, number: int, config: Config, tokenizer: Tokenizer, cache_dir: Path
) -> tuple[OpenSource, Sequence[str]]:
    """Return a set, tokenized at first use, and the hashes of its files of text. Of token files it has what trains, or else the
    held-out ones.

    Raises DataError where it cannot be read, or has no token to predict.
    """
    name, of_set = f"data.validation.{number}", config_of_set(config, source)
    if source.kind == "chat":
        chat = open_chat(source, name, of_set, tokenizer, cache_dir)
        words = f"set {source.name or number} {chat.words}"
        return OpenSource(words, 1.0, chat.train, chat.train, chat.identity), ()
    files: Sequence[str] = ()
    if source.kind == "tokens":
        train, held_out = open_token_files(source, name, tokenizer, of_set, cache_dir)
        parts = train or held_out
    else:
        corpus = open_corpus(source, name, 0.0, cache_dir)
        (part, _), _ = cached_streams(corpus, tokenizer, config.data.tokenizer, cache_dir)
        parts, files = [part], corpus.hashes
    windows = StreamWindows(parts, config.data.sequence_length, padded=True)
    if not windows.count:
        raise DataError(f"{name}: {source.path or source.kind} has no token to predict")
    identity = [source.kind, [part.sha256 for part in parts], windows.separator]
    words = f"set {source.name or number} {source.path or source.kind}: {windows.num_targets:,} tokens"
    return OpenSource(words, 1.0, windows, windows, identity, tuple(parts)), files


def check_not_trained(sets: Mapping[str, Sequence[str]], trained: Mapping[int, Sequence[str]]) -> None:
    """Raise DataError if a set has a file of which a source trains on the greater part.

    Args:
      sets: hashes of the files of text of each set, by its name.
      trained: those of each source of text, by its index.
    """
    for name, held_out in sets.items():
        for index, files in trained.items():
            if set(held_out) & set(files):
                raise DataError(
                    f"data.validation: set {name} has a file that data.sources.{index} trains on; leave it out of one"
                )
