"""Build batches from a config. Batch n is a pure function of (fingerprint, seed, stages, n), on any number of hosts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxtrain.config import Config, Recipe
from jaxtrain.config.data_fields import names_of
from jaxtrain.data.chat_source import answer_ends, open_chat
from jaxtrain.data.chat_store import Prompts, first_question
from jaxtrain.data.chat_windows import PackedRows
from jaxtrain.data.corpus import Corpus, open_corpus
from jaxtrain.data.document_rows import DocumentRows
from jaxtrain.data.documents_of_function import with_documents_kept
from jaxtrain.data.file_hashes import short_hash
from jaxtrain.data.open_kinds import open_synthetic, open_tokenizer, open_tokens
from jaxtrain.data.open_source import OpenSource, Rows, text_bytes
from jaxtrain.data.packing import Batch, document_start, joined, pack
from jaxtrain.data.prefetch import Prefetcher
from jaxtrain.data.source_checks import check_sorts, check_split_rules, checked_epochs
from jaxtrain.data.stage_order import Draws, Pick, Span, StageOrder
from jaxtrain.data.tokenizers import Tokenizer
from jaxtrain.data.validation_sets import check_not_trained, config_of_set, open_set
from jaxtrain.data.windows import StreamWindows, Windows
from jaxtrain.errors import ConfigError, DataError
from jaxtrain.files import user_path

PROMPT_SEARCH_TOKENS = 1 << 20


def open_data(config: Config) -> Data:
    """Open (and at first use tokenize) all sources of config.data, and check all of it on the host.

    Raises DataError or ConfigError, with one clear line, for data that is missing, broken, empty, too short for one sequence,
    or beyond the model's vocabulary.
    """
    if config.parts.documents is not None:
        config = with_documents_kept(config, config.parts.documents)
    data = config.data
    cache_dir = user_path(data.cache_dir)
    corpora = {
        i: open_corpus(source, f"data.sources.{i}", data.validation_fraction, cache_dir)
        for i, source in enumerate(data.sources)
        if source.kind not in ("tokens", "synthetic", "chat")
    }
    tokenizer = open_tokenizer(config, list(corpora.values()), cache_dir)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            [
                f"model.vocab_size={config.model.vocab_size} is less than the {tokenizer.vocab_size} ids of "
                f"data.tokenizer={data.tokenizer}; use --model.vocab_size={tokenizer.vocab_size} or more"
            ]
        )
    only_synthetic = all(source.kind == "synthetic" for source in data.sources)
    sources = []
    for i, source in enumerate(data.sources):
        if source.kind == "synthetic":
            sources.append(open_synthetic(source, i, config, only_synthetic))
        elif source.kind == "chat":
            sources.append(open_chat(source, f"data.sources.{i}", config, tokenizer, cache_dir))
        else:
            sources.append(open_tokens(source, i, corpora.get(i), tokenizer, config, cache_dir))
    check_split_rules(sources)
    check_sorts(sources, config)
    return Data(config, tokenizer, sources, _open_sets(config, tokenizer, corpora, cache_dir))


def _open_sets(config: Config, tokenizer: Tokenizer, corpora: Mapping[int, Corpus], cache_dir: Path) -> dict[str, Data]:
    """Open the sets of data.validation, each as data of which all is held out."""
    sources, names = config.data.validation, names_of(config.data.validation, "set")
    opened = {
        name: open_set(source, i, config, tokenizer, cache_dir)
        for i, (name, source) in enumerate(zip(names, sources, strict=True))
    }
    check_not_trained({name: files for name, (_, files) in opened.items()}, {i: own.hashes for i, own in corpora.items()})
    of_sets = [config_of_set(config, source) for source in sources]
    return {name: Data(of_set, tokenizer, [own]) for of_set, (name, (own, _)) in zip(of_sets, opened.items(), strict=True)}


class Data:
    """Training and validation batches of one config. Made by `open_data`.

    A batch is a `packing.Batch`: int32 arrays tokens, targets, positions, segments, each [rows, L].
    """

    tokenizer: Tokenizer
    vocab_size: int
    """Vocabulary size of the tokenizer; of the model if the sources are ids without a tokenizer."""
    fingerprint: str
    """Hash of the sources' contents and first weights, the split, the tokenizer, the longest sequence_length and
    mask_documents; neither the seed nor paths are in it."""
    words: str
    """What each source and set is."""
    description: str
    """The same in one line, with the tokenizer."""
    tokens_per_epoch: int
    """Training targets in all sources, each counted once."""
    validation_tokens: int
    """Held-out targets in all validation batches."""
    validation_bytes: int
    """UTF-8 bytes of the held-out documents, without separators; 0 where unknown."""
    gzip_bits_per_byte: float | None
    """8 x bytes of gzip -9 of the joined held-out documents / their own bytes; None if the text is not available. Only the
    first 64 MiB of a source are measured."""

    sets: Mapping[str, Data]
    """The sets of data.validation by their names, each with all of it in its validation batches."""

    def __init__(
        self, config: Config, tokenizer: Tokenizer, sources: Sequence[OpenSource], sets: Mapping[str, Data] | None = None
    ):
        """Keep what `open_data` has opened and checked."""
        data, self.sets = config.data, sets or {}
        self._config, self._sources, self._recipe = config, sources, Recipe(config)
        self._train = [source.train for source in sources]
        self._validation = [source.validation for source in sources]
        self._attached: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        self._validation_ends = np.cumsum([windows.count for windows in self._validation])
        weights, block = self._recipe.all[0].weights, self._recipe.block_length
        draws = [
            Draws(stage.first, stage.config.train.global_batch_size, stage.weights, stage.config.data.sequence_length)
            for stage in self._recipe.stages
        ]
        in_order = [source.order == "files" for source in data.sources]
        self._order = StageOrder(draws, [windows.count for windows in self._train], block, config.train.seed, in_order)
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
        identity = [
            [source.identity, weight / sum(weights), *["in order"] * ordered]
            for source, weight, ordered in zip(sources, weights, in_order, strict=True)
        ]
        self.fingerprint = short_hash(["data-2", identity, tokenizer.fingerprint, block, data.mask_documents])
        self.words = "; ".join([*(source.words for source in sources), *(own.words for own in self.sets.values())])
        self.description = (
            f"{self.words}; tokenizer {data.tokenizer if tokenizer.separator >= 0 else 'none'}, {self.vocab_size:,} ids"
        )
        tokens = self._order.tokens(config.train.steps)
        epochs = [count / (block * windows.count) for count, windows in zip(tokens, self._train, strict=True)]
        self.description += checked_epochs(config, epochs)
        self.tokens_per_epoch = sum(windows.num_targets for windows in self._train)
        self.validation_tokens = sum(windows.num_targets for windows in self._validation)
        parts = [part for source in sources for part in source.validation_parts if len(part.tokens) > 1]
        self.validation_bytes = text_bytes(sources)
        gzip_input = sum(part.gzip_input_bytes for part in parts) if all(part.gzip_input_bytes for part in parts) else 0
        self.gzip_bits_per_byte = 8 * sum(part.gzip_bytes for part in parts) / gzip_input if gzip_input else None

    def train_batch(self, step: int, rows: slice) -> Batch:
        """Return the rows `rows` (of all that it has) of batch `step`, as long and as many as its stage says.

        It is a pure function: any caller gets the same rows.
        """
        length = self._recipe.at(step).config.data.sequence_length
        return self._with_attached(0, self._train, self._picks(step, rows), length)

    def train_row_numbers(self, step: int, rows: slice) -> list[tuple[int, int]]:
        """Return for each of the rows that `train_batch` gives the index of its source, and its own in that source.

        A row of chat data is the same in every epoch, so what is computed of it once can be looked up by these numbers.
        """
        return [(source, spans[0].block) for source, spans in self._picks(step, rows)]

    def _picks(self, step: int, rows: slice) -> list[Pick]:
        return self._order.rows(step, range(*rows.indices(self._recipe.at(step).config.train.global_batch_size)))

    @functools.cached_property
    def prompts(self) -> Prompts:
        """Prompts to train on, of all sources one after the other; none where the sources hold samples or pairs."""
        return self._prompts("train", self._train)

    @functools.cached_property
    def validation_prompts(self) -> Prompts:
        """Held-out prompts."""
        return self._prompts("validation", self._validation)

    def _prompts(self, side: str, windows: Sequence[Rows]) -> Prompts:
        """Return the prompts of one side, without those longer than sequence_length."""
        used = [
            (source.chat.sides[side], rows.fit.kept)
            for source, rows in zip(self._sources, windows, strict=True)
            if source.chat and source.chat.sort == "prompts" and isinstance(rows, PackedRows)
        ]
        return Prompts(used)

    @functools.cached_property
    def answer_ends(self) -> tuple[int, ...]:
        """Ids that end an answer or a document; see `chat_source.answer_ends`."""
        return answer_ends(self._config, self.tokenizer)

    @property
    def segment_names(self) -> tuple[str, ...]:
        """Names that the segments of a row take in turn: chosen, rejected for pairs; empty for others."""
        return ("chosen", "rejected") if any(s.chat and s.chat.sort == "pairs" for s in self._sources) else ()

    @property
    def row_counts(self) -> list[int]:
        """Return how many training rows each source has."""
        return [windows.count for windows in self._train]

    def rows(self, picks: Sequence[tuple[int, int] | None]) -> Batch:
        """Return training rows by the numbers of `train_row_numbers`; None gives a row of padding."""
        return self._whole_rows(0, self._train, picks)

    def _whole_rows(self, side: int, sources: Sequence[Rows], picks: Sequence[tuple[int, int] | None]) -> Batch:
        length = self._config.data.sequence_length
        spans = [None if pick is None else (pick[0], (Span(pick[1], 0, length),)) for pick in picks]
        return self._with_attached(side, sources, spans, length)

    def attach(self, name: str, train: np.ndarray, validation: np.ndarray | None) -> None:
        """Add a float32 array to every batch from now on.

        Args:
          train: [rows, L, ...] of all sources' rows, one source after the other.
          validation: the same of held-out rows; None: their batches do without.
        """
        self._attached[name] = (train, validation)

    def has(self, name: str) -> bool:
        """Return whether batches have an attached array of this name."""
        return name in self._attached

    def _with_attached(self, side: int, sources: Sequence[Rows], picks: Sequence[Pick | None], length: int) -> Batch:
        """Return the batch of the given rows, of `length` tokens, and what was attached to them."""
        batch = self._read(sources, picks, length)
        firsts = np.cumsum([0, *(windows.count for windows in sources)])
        for name, sides in self._attached.items():
            if (held := sides[side]) is None:
                continue
            batch[name] = np.zeros((len(picks), *held.shape[1:]), np.float32)
            for row, pick in enumerate(picks):
                if pick is not None:
                    batch[name][row] = held[firsts[pick[0]] + pick[1][0].block]
        return batch

    def train_batches(
        self, first_step: int, rows: slice | Callable[[int], slice], batch_of: Callable[[int], int] = lambda step: step
    ) -> Prefetcher[Batch]:
        """Iterate over train_batch(batch_of(n), rows) for n = first_step, first_step + 1, ... without end.

        data.prefetch batches are made ahead, in data.workers threads; 0: one, but as many as batches where they wait for a
        store. Close it, or use it in a `with` block.

        Args:
          rows: of every batch, or a function of its number.
        """
        data = self._config.data
        waits = any(isinstance(windows, StreamWindows | DocumentRows) and windows.lie_in_store for windows in self._train)

        def make(step: int) -> Batch:
            number = batch_of(step)
            return self.train_batch(number, rows(number) if callable(rows) else rows)

        return Prefetcher(make, first_step, data.prefetch, data.workers or (data.prefetch if waits else 1))

    def num_validation_batches(self, batch_size: int) -> int:
        """Return how many batches of `batch_size` rows hold all held-out tokens."""
        return math.ceil(int(self._validation_ends[-1]) / batch_size)

    def validation_batch(self, index: int, rows: slice, batch_size: int, batches: int = 0) -> Batch:
        """Return the rows `rows` (of 0 to batch_size - 1) of validation batch `index`; every held-out token is a target once.

        Rows beyond the last window are padding: tokens and segments 0, targets -1.

        Args:
          batches: of how many; their rows are spread evenly over all held-out ones. 0 for all.
        """
        picks = self.validation_row_numbers(index, rows, batch_size, batches)
        return self._whole_rows(1, self._validation, picks)

    def validation_row_numbers(
        self, index: int, rows: slice, batch_size: int, batches: int = 0
    ) -> list[tuple[int, int] | None]:
        """Return for each row of `validation_batch` the index of its source, and its own in that source; None for padding."""
        picks, total, scored = [], int(self._validation_ends[-1]), batches * batch_size
        for row in range(*rows.indices(batch_size)):
            window = index * batch_size + row
            if 0 < scored < total:
                window = window * total // scored
            source = int(np.searchsorted(self._validation_ends, window, side="right"))
            first = int(self._validation_ends[source - 1]) if source else 0
            picks.append((source, window - first) if source < len(self._validation) else None)
        return picks

    def bits_per_byte(self, mean_loss: float, source: int | None = None) -> float | None:
        """mean_loss (nats per token, over all held-out tokens) x tokens / bytes / ln 2; None if the bytes are unknown.

        Args:
          source: index of the source that both are of; None: of all.
        """
        of = self._sources if source is None else [self._sources[source]]
        tokens, size = sum(own.validation.num_targets for own in of), text_bytes(of)
        return mean_loss * tokens / size / math.log(2) if size else None

    def sample_prompt(self, num_tokens: int) -> np.ndarray:
        """Return the first `num_tokens` ids, [num_tokens] int32, of a held-out document at least that long.

        If there is none: of any held-out text, else of training text; fewer ids only if the data has fewer. Of chat data: what
        comes before an answer, of at most `num_tokens` ids.
        """
        for source in self._sources:
            if source.chat:
                return first_question(source.chat, num_tokens)
            for part in source.validation_parts:
                ids = part.tokens[:PROMPT_SEARCH_TOKENS]
                if len(ids) > 1:
                    return ids[document_start(ids, part.separator, num_tokens) :][:num_tokens].astype(np.int32)
        window = self._whole_rows(0, self._train, [(0, 0)])["tokens"][0]
        return window[:num_tokens]

    def _read(self, sources: Sequence[Rows], picks: Sequence[Pick | None], length: int) -> Batch:
        """Return the batch of the given rows, of `length` tokens; None gives a row of padding."""
        windows = np.zeros((len(picks), length + 1), np.int32)
        sizes = np.zeros(len(picks), np.int64)
        separators = np.full(len(picks), -1, np.int64)
        split: dict[int, Batch] = {}
        for number, source in enumerate(sources):
            spans = [span for pick in picks if pick is not None and pick[0] == number for span in pick[1]]
            if isinstance(source, StreamWindows | DocumentRows) and source.lie_in_store:
                source.fetch(spans)
        for row, pick in enumerate(picks):
            if pick is None or isinstance(source := sources[pick[0]], PackedRows | DocumentRows):
                continue
            separators[row] = source.separator
            if len(pick[1]) == 1:
                sizes[row] = _read_span(source, pick[1][0], windows[row])
            else:
                split[row] = self._joined(source, pick[1], length)
        self._check_ids(windows)
        batch = pack(windows, sizes, separators, self._config.data.mask_documents)
        for row, parts in split.items():
            for name, array in parts.items():
                batch[name][row] = array
        for row, pick in enumerate(picks):
            if pick is not None and isinstance(source := sources[pick[0]], PackedRows | DocumentRows):
                source.fill(pick[1][0].block, batch, row)
                self._check_ids(batch["tokens"][row])
                self._check_ids(np.maximum(batch["targets"][row], 0))
        return batch

    def _joined(self, source: Windows, spans: Sequence[Span], length: int) -> Batch:
        """Return one row of several spans, each a document of its own."""
        parts, mask_documents = [], self._config.data.mask_documents
        for span in spans:
            ids = np.zeros((1, span.length + 1), np.int32)
            size = _read_span(source, span, ids[0])
            self._check_ids(ids)
            parts.append(pack(ids, np.array([size]), np.array([source.separator]), mask_documents))
        return joined(parts, length, mask_documents)

    def _check_ids(self, ids: np.ndarray) -> None:
        """Raise DataError for ids beyond the vocabulary; they were checked when the data was opened."""
        limit = self._config.model.vocab_size
        if ids.size and not 0 <= ids.min() <= ids.max() < limit:
            raise DataError(
                f"token id {ids.min() if ids.min() < 0 else ids.max()} is outside model.vocab_size={limit}: "
                "the token files were changed while this run was reading them; put them back, and start it again"
            )


def _read_span(source: Windows, span: Span, out: np.ndarray) -> int:
    return source.read(span.block, out[: span.length + 1], span.start)
