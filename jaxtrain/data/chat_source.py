"""A source of chat data: its rows are encoded once, into the cache, and packed at each start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path

from jaxtrain.config import Config, DataSource
from jaxtrain.data.chat_rows import ChatRow, ChatSample, Conversation, Sort, Texts, read_rows, sample_of
from jaxtrain.data.chat_store import FORMAT, SIDES, SideWriter, StoredSamples, Told, marked, open_samples, write_note
from jaxtrain.data.chat_template import TODAY, ChatTemplate, read_chat_template
from jaxtrain.data.chat_windows import PackedRows
from jaxtrain.data.conversations import Conversations, Encoded
from jaxtrain.data.documents import BadRows
from jaxtrain.data.file_hashes import file_hashes, short_hash
from jaxtrain.data.listing import list_files
from jaxtrain.data.progress import progress
from jaxtrain.data.split import hash_share, split_rule
from jaxtrain.data.token_cache import made_once
from jaxtrain.data.tokenizers import Tokenizer, begin_ids, tokenizer_file
from jaxtrain.errors import DataError
from jaxtrain.files import user_path

ROWS_AT_ONCE = 500
"""Rows in a call of the tokenizer; divides `documents.ALL_BAD_ROWS`, after which bad rows alone end the run."""


@dataclass(frozen=True)
class ChatSource:
    """An open source of chat data, with the rows that its samples are packed into."""

    stored: StoredSamples
    train: PackedRows
    validation: PackedRows
    words: str
    identity: object


def open_chat(source: DataSource, name: str, config: Config, tokenizer: Tokenizer, cache_dir: Path) -> ChatSource:
    """Open a source of kind=chat; encode it if that was not done yet.

    Raises DataError where a row is broken or no sample fits, ExplainedError where the chat template cannot be read.
    """
    data, encoding = config.data, _Encoding(source, name, config, tokenizer, cache_dir)
    folder = cache_dir / "chat" / encoding.key
    stored = made_once(folder, lambda: open_samples(folder, cache_dir), encoding.write)
    per_sample = 2 if stored.sort == "pairs" else 1
    train, validation = (
        PackedRows(stored.sides[side], per_sample, data.sequence_length, data.too_long, name) for side in SIDES
    )
    if not train.count:
        why = f"each of its {train.fit.left_out} is longer than data.sequence_length={data.sequence_length}"
        if not train.fit.left_out:
            why = f"all {len(stored.sides['validation'].ends) // per_sample} are held out, or none has an answer to learn"
        raise DataError(f"{name}: no sample to train on: {why}; {stored.told.words or 'nothing else was left out'}")
    identity = ["chat-1", stored.sort, [stored.sides[side].sha256 for side in SIDES], data.too_long]
    return ChatSource(stored, train, validation, _words(source, stored, train, validation, data.sequence_length), identity)


def _words(source: DataSource, stored: StoredSamples, train: PackedRows, validation: PackedRows, length: int) -> str:
    """Return the line that tells what the source holds, what was left out of it, and how full its rows are."""
    full = train.slots / (train.count * length)
    words = [f"{len(train.fit.kept):,} + {len(validation.fit.kept):,} held-out {stored.sort}"]
    words += [stored.told.words] if stored.told.words else []
    left_out, cut = (sum(getattr(rows.fit, field) for rows in (train, validation)) for field in ("left_out", "cut"))
    words += [f"{left_out:,} longer than {length} tokens left out"] if left_out else []
    words += [f"{cut:,} cut off at {length} tokens"] if cut else []
    targets = f"{train.num_targets:,} + {validation.num_targets:,} held-out tokens with loss"
    return f"{source.path} ({'; '.join(words)}): {targets}, in {train.count:,} rows, {full:.1%} full"


def chat_template_of(config: Config, now: datetime | None = TODAY) -> ChatTemplate | None:
    """Return the template named by data.chat_template, else that beside data.tokenizer, or in init_from; None if there is none.

    `now` is the time that it is told; None: that of each rendering. Raises ExplainedError where it cannot be read.
    """
    named = config.data.tokenizer not in ("byte", "none") and not config.data.tokenizer.startswith("bpe:")
    beside = tokenizer_file(config.data.tokenizer).parent if named else None
    if config.data.chat_template:
        path = user_path(config.data.chat_template)
        if not path.exists():
            raise DataError(f"data.chat_template={config.data.chat_template}: there is no such file or folder")
        return read_chat_template(path, beside, now)
    for folder in (beside, user_path(config.init_from) if config.init_from else None):
        if folder is not None and _has_template(folder):
            return read_chat_template(folder, beside, now)
    return None


def answer_ends(config: Config, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end an answer: the separator, the tokenizer's eos_token, and the token that the chat template puts
    after an answer. Raises ExplainedError where the template cannot be read.
    """
    ends, template = {tokenizer.separator, tokenizer.end}, chat_template_of(config)
    if template is not None and hasattr(tokenizer, "control"):
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        (probe,) = Conversations(tokenizer, template).encode([("", Conversation(messages, [False, True]))])
        if isinstance(probe, Encoded):
            ends |= {int(token) for token in probe.ids[probe.learned] if int(token) in tokenizer.names}
    return tuple(sorted(end for end in ends if end >= 0))


def _has_template(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    is_in_settings = settings.is_file() and '"chat_template"' in settings.read_text(encoding="utf-8", errors="replace")
    return is_in_settings or (folder / "chat_template.jinja").is_file()


class _Encoding:
    """The way from the files of a source to the encoded samples in the cache."""

    def __init__(self, source: DataSource, name: str, config: Config, tokenizer: Tokenizer, cache_dir: Path):
        self._source, self._name, self._tokenizer = source, name, tokenizer
        self._fraction = config.data.validation_fraction
        self._files = [file.path for file in list_files(source.path, f"{name}.path")]
        hashes = file_hashes(self._files, cache_dir, f"reading {name}")
        self._tokenizer_name, self._template = config.data.tokenizer, chat_template_of(config)
        encoder = [tokenizer.fingerprint, self._template and self._template.fingerprint, tokenizer.end]
        self.key = short_hash([FORMAT, hashes, split_rule(self._fraction), source.max_bad_rows, encoder])

    def write(self, folder: Path) -> None:
        """Encode all rows into files of a folder. Raises DataError for a bad row, OSError where writing fails."""
        bad_rows, counts = BadRows(self._source.max_bad_rows), Counter[str]()
        sort: Sort | None = None
        sides = {side: SideWriter(folder, side) for side in SIDES}
        conversations = Conversations(self._tokenizer, self._template, _begins(self._tokenizer_name), self._tokenizer.end)
        with progress(f"encoding {self._name}", sum(path.stat().st_size for path in self._files)) as advance:
            rows = (row for path in self._files for row in read_rows(path, bad_rows))
            while chunk := list(islice(rows, ROWS_AT_ONCE)):
                samples = list(self._samples(chunk, bad_rows, sort))
                sort = sort or next((sample.sort for sample in samples), None)
                for sample, encoded in zip(samples, _encode(conversations, samples), strict=True):
                    self._keep(sample, encoded, sides, bad_rows, counts)
                advance(sum(row.size for row in chunk))
        bad_rows.check(self._name)
        if sort is None:
            raise DataError(f"{self._name}: no row in {self._source.path}")
        if self._template is not None and self._template.dated:
            counts[f"template that prints the date: it is told {TODAY:%d %B %Y}"] = 1
        write_note(folder, sort, Told(bad_rows.rows, bad_rows.count, bad_rows.first, dict(counts)), sides)

    def _samples(self, rows: Sequence[ChatRow], bad_rows: BadRows, sort: Sort | None) -> Iterator[ChatSample]:
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

    def _keep(
        self,
        sample: ChatSample,
        found: Sequence[Encoded | DataError],
        sides: dict[str, SideWriter],
        bad_rows: BadRows,
        counts: Counter[str],
    ) -> None:
        """Write a sample to its side, by the policies that README states; count what they do."""
        faults = [part for part in found if isinstance(part, DataError)]
        if faults:
            bad_rows.leave_out(faults[0])
            return
        parts = [part for part in found if isinstance(part, Encoded)]
        sequences = [marked(part) for part in parts]
        counts["empty answers, without loss"] += sample.empty_answers
        if sample.sort != "prompts" and not all((ids < 0).any() for ids in sequences):
            counts["samples without an answer to learn left out"] += 1
            return
        if not all(map(len, sequences)):
            counts["prompts without a token left out"] += 1
            return
        if len(sequences) == 2 and sequences[0].tobytes() == sequences[1].tobytes():
            counts["pairs of equal answers left out"] += 1
            return
        counts["texts that began twice, one beginning removed"] += sum(part.began_twice for part in parts)
        counts["last answers without an end token, after which the model will not stop"] += sum(not part.ends for part in parts)
        counts["texts that spell control tokens, which stay text"] += sum(map(self._spells, sample.parts))
        held_out = hash_share(sample.key.encode()) < self._fraction
        sides["validation" if held_out else "train"].append(sequences, sample)

    def _spells(self, part: Conversation | Texts) -> bool:
        control = getattr(self._tokenizer, "control", None)
        return isinstance(part, Texts) and control is not None and bool(control.found(part.prompt + (part.completion or "")))


def _encode(conversations: Conversations, samples: Sequence[ChatSample]) -> Iterator[list[Encoded | DataError]]:
    """Yield the encoded parts of each sample."""
    encoded = iter(conversations.encode([(sample.where, part) for sample in samples for part in sample.parts]))
    for sample in samples:
        yield [next(encoded) for _ in sample.parts]


def _begins(name: str) -> tuple[int, ...]:
    """Return the ids that the tokenizer puts before a text; none for our own tokenizers."""
    if name in ("byte", "none") or name.startswith("bpe:"):
        return ()
    file = tokenizer_file(name)
    return begin_ids(file) if file.suffix == ".json" else ()
