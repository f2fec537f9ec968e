"""The way of chat data from the rows of its files to the encoded samples in the cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing
from itertools import islice
from pathlib import Path

import numpy as np

from jaxtrain.config import Config, DataSource
from jaxtrain.data.chat_rows import ChatRow, ChatSample, Conversation, Sort, Texts, read_rows, sample_of
from jaxtrain.data.chat_store import FORMAT, SIDES, SideWriter, Told, marked, write_note
from jaxtrain.data.chat_template import TODAY, ChatTemplate
from jaxtrain.data.conversations import Conversations, Encoded
from jaxtrain.data.documents import BadRows
from jaxtrain.data.file_hashes import file_hashes, short_hash
from jaxtrain.data.listing import list_files
from jaxtrain.data.progress import Advance, progress
from jaxtrain.data.split import hash_share, split_rule
from jaxtrain.data.tokenizers import Tokenizer, begin_ids, tokenizer_file
from jaxtrain.errors import DataError

ROWS_AT_ONCE = 500
"""Rows in a call of the tokenizer; divides `documents.ALL_BAD_ROWS`, after which bad rows alone end the run."""


class Encoding:
    """The rows of a source, and the tokenizer and template that encode them."""

    def __init__(self, source: DataSource, name: str, config: Config, tokenizer: Tokenizer, template: ChatTemplate | None):
        self._source, self._name, self._tokenizer, self._template = source, name, tokenizer, template
        self._fraction, self._tokenizer_name = config.data.validation_fraction, config.data.tokenizer
        self._files = [file.path for file in list_files(source.path, f"{name}.path")]

    def key(self, cache_dir: Path) -> str:
        """Return a hash of all that the encoded samples depend on."""
        hashes = file_hashes(self._files, cache_dir, f"reading {self._name}")
        encoder = [self._tokenizer.fingerprint, self._tokenizer.end, self._template and self._template.fingerprint]
        return short_hash([FORMAT, hashes, split_rule(self._fraction), self._source.max_bad_rows, encoder])

    def write(self, folder: Path) -> None:
        """Encode all rows into files of a folder. Raises DataError for a bad row, OSError where writing fails."""
        bad_rows = BadRows(self._source.max_bad_rows)
        conversations = Conversations(self._tokenizer, self._template, _begins(self._tokenizer_name), self._tokenizer.end)
        sort: Sort | None = None
        with closing(_Keeper(folder, bad_rows, self._tokenizer, self._fraction)) as keeper, self._progress() as advance:
            rows = (row for path in self._files for row in read_rows(path, bad_rows))
            while chunk := list(islice(rows, ROWS_AT_ONCE)):
                samples = list(_samples(chunk, bad_rows, sort))
                sort = sort or next((sample.sort for sample in samples), None)
                for sample, parts in zip(samples, _encode(conversations, samples), strict=True):
                    keeper.keep(sample, parts)
                advance(sum(row.size for row in chunk))
            bad_rows.check(self._name)
            if sort is None:
                raise DataError(f"{self._name}: no row in {self._source.path}")
            told = Told(bad_rows.rows, bad_rows.count, bad_rows.first, dict(keeper.counts))
            if self._template is not None and self._template.dated:
                told.note = f"the template prints the date, and is told {TODAY:%d %B %Y}"
            write_note(folder, sort, told, keeper.sides)

    def _progress(self) -> AbstractContextManager[Advance]:
        return progress(f"encoding {self._name}", sum(path.stat().st_size for path in self._files))


def _samples(rows: Sequence[ChatRow], bad_rows: BadRows, sort: Sort | None) -> Iterator[ChatSample]:
    """Yield the sample of each good row; all are of one sort."""
    for row in rows:
        try:
            sample = sample_of(row.fields, row.where)
            sort = sort or sample.sort
            if sample.sort != sort:
                raise DataError(f"{row.where}: is one of {sample.sort}, but the rows before it are {sort}; part the files")
            yield sample
        except DataError as fault:
            bad_rows.leave_out(fault)


def _encode(conversations: Conversations, samples: Sequence[ChatSample]) -> Iterator[list[Encoded | DataError]]:
    """Yield the encoded parts of each sample."""
    encoded = iter(conversations.encode([(sample.where, part) for sample in samples for part in sample.parts]))
    for sample in samples:
        yield [next(encoded) for _ in sample.parts]


class _Keeper:
    """Writes samples to their sides by the policies that README states, and counts what these do."""

    def __init__(self, folder: Path, bad_rows: BadRows, tokenizer: Tokenizer, fraction: float):
        self.sides = {side: SideWriter(folder, side) for side in SIDES}
        self.counts = Counter[str]()
        self._bad_rows, self._control, self._fraction = bad_rows, tokenizer.control, fraction

    def close(self) -> None:
        """Close the files."""
        for side in self.sides.values():
            side.close()

    def keep(self, sample: ChatSample, found: Sequence[Encoded | DataError]) -> None:
        """Write a sample, unless a part of it is a fault or a policy leaves it out."""
        parts = [part for part in found if isinstance(part, Encoded)]
        if len(parts) < len(found):
            self._bad_rows.leave_out(next(part for part in found if isinstance(part, DataError)))
            return
        sequences = [marked(part) for part in parts]
        self.counts["empty answers, without loss"] += sample.empty_answers
        if why := _left_out(sample, sequences):
            self.counts[why] += 1
            return
        self.counts["texts that began twice, of which one beginning is kept"] += sum(part.began_twice for part in parts)
        self.counts["answers that no end token follows: the model will not stop"] += sum(not part.ends for part in parts)
        self.counts["texts that spell control tokens, kept as text"] += sum(map(self._spells, sample.parts))
        held_out = hash_share(sample.key.encode()) < self._fraction
        self.sides["validation" if held_out else "train"].append(sequences, sample)

    def _spells(self, part: Conversation | Texts) -> bool:
        if not isinstance(part, Texts) or self._control is None:
            return False
        return bool(self._control.found(part.text))


def _left_out(sample: ChatSample, sequences: Sequence[np.ndarray]) -> str:
    """Return why a sample is left out; empty where it is kept."""
    if sample.sort == "prompts":
        return "" if len(sequences[0]) else "prompts without a token, left out"
    if not all((ids < 0).any() for ids in sequences):
        return "samples without an answer to learn, left out"
    is_equal = len(sequences) == 2 and np.array_equal(sequences[0], sequences[1])
    return "pairs of equal answers, left out" if is_equal else ""


def _begins(name: str) -> tuple[int, ...]:
    """Return the ids that the tokenizer puts before a text; none for our own tokenizers."""
    if name in ("byte", "none") or name.startswith("bpe:"):
        return ()
    file = tokenizer_file(name)
    return begin_ids(file) if file.suffix == ".json" else ()
