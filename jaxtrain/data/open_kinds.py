"""Open the tokenizer, and a source of each kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtrain.config import Config, DataSource, Recipe
from jaxtrain.data.corpus import Corpus
from jaxtrain.data.document_rows import DocumentRows
from jaxtrain.data.file_hashes import short_hash
from jaxtrain.data.open_source import OpenSource
from jaxtrain.data.token_cache import cached_streams, trained_tokenizer
from jaxtrain.data.token_files import open_token_files
from jaxtrain.data.tokenizers import NO_TOKENIZER, IdTokenizer, Tokenizer, load_tokenizer
from jaxtrain.data.windows import SYNTHETIC_VALIDATION_WINDOWS, SYNTHETIC_WINDOWS, StreamWindows, SyntheticWindows
from jaxtrain.errors import DataError


def open_tokenizer(config: Config, corpora: Sequence[Corpus], cache_dir: Path) -> Tokenizer:
    """Return the tokenizer named by data.tokenizer, trained on the corpora's training documents if it is bpe:SIZE.

    Raises DataError if it is missing or broken, or there is no text to train it on.
    """
    name = config.data.tokenizer
    if name == NO_TOKENIZER or all(source.kind == "synthetic" for source in config.data.sources):
        texts = [
            f"data.sources.{i}" for i, source in enumerate(config.data.sources) if source.kind not in ("tokens", "synthetic")
        ]
        if texts:
            raise DataError(f"data.tokenizer=none, but {texts[0]} is text; use byte, bpe:SIZE or a tokenizer's file")
        return IdTokenizer(config.model.vocab_size)
    if name.startswith("bpe:"):
        if not corpora:
            raise DataError(
                f"data.tokenizer={name}: there is no text to train it on; name the tokenizer that made the tokens, or "
                "that of the model to fine-tune"
            )
        return trained_tokenizer(corpora, int(name[4:]), cache_dir)[0]
    return load_tokenizer(name)


def open_tokens(
    source: DataSource, index: int, corpus: Corpus | None, tokenizer: Tokenizer, config: Config, cache_dir: Path
) -> OpenSource:
    """Open a source of text (through the cache) or of tokens."""
    name, data, length = f"data.sources.{index}", config.data, Recipe(config).block_length
    if corpus is None:
        train, validation = open_token_files(source, name, tokenizer, config, cache_dir)
        told = any(part.separator >= 0 for part in train)
        origin = source.path if told else f"{source.path} (one stream, documents not told apart)"
    else:
        streams = cached_streams(corpus, tokenizer, data.tokenizer, cache_dir)
        (part, told), (held_part, held) = streams
        train, validation = [part], [held_part]
        sides = f"{told.documents} + {held.documents} held-out documents"
        if data.validation_fraction and not held.documents:
            sides += ", each held out by its own hash: more of them, or one of over 100,000 characters, give held-out text"
        left_out = f"; left out {words}" if (words := told.bad_rows_in_words) else ""
        origin = f"{source.path or 'stdlib'} ({sides}{left_out})"
    packed = DocumentRows(train, length, name, cache_dir) if data.packing == "best_fit" else None
    windows = packed or StreamWindows(train, length, padded=False)
    if not windows.count:
        most = max((len(part.tokens) for part in train), default=0)
        longest = "data.sequence_length" if length == data.sequence_length else "the longest sequence_length of train.stages"
        raise DataError(
            f"{name}: {most} training tokens are too short for one sequence, which takes {longest} + 1 = "
            f"{length + 1}; give more text, or --data.sequence_length={max(1, most - 1)} or less"
        )
    held_out = StreamWindows(validation, data.sequence_length, padded=True)
    tokens = f"{windows.num_targets:,} + {held_out.num_targets:,} held-out tokens"
    identity = [source.kind, [part.sha256 for part in train], [part.sha256 for part in validation], windows.separator]
    if packed:
        tokens, identity = f"{tokens}, {packed.words}", [*identity, "best_fit"]
    rules = frozenset(part.split_rule for part in (*train, *validation)) - {""}
    return OpenSource(f"{origin}: {tokens}", source.weight, windows, held_out, identity, tuple(validation), rules)


def open_synthetic(source: DataSource, index: int, config: Config, with_validation: bool) -> OpenSource:
    """Open a source of random tokens, held out only if no other source is, so that bits per byte describe the text."""
    vocab_size, length, seed = config.model.vocab_size, config.data.sequence_length, config.train.seed
    block = Recipe(config).block_length
    held_out = SYNTHETIC_VALIDATION_WINDOWS if with_validation and config.data.validation_fraction > 0 else 0
    seed = int(short_hash([seed, index])[:16], 16)
    return OpenSource(
        f"synthetic: endless random tokens below {vocab_size:,}",
        source.weight,
        SyntheticWindows(seed, vocab_size, block, 0, SYNTHETIC_WINDOWS),
        SyntheticWindows(seed, vocab_size, length, SYNTHETIC_WINDOWS, held_out),
        ["synthetic-1", vocab_size],
    )
