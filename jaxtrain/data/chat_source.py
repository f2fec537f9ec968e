"""A source of chat data: its rows are encoded once, into the cache, and packed at each start."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from jaxtrain.config import Config, DataSource
from jaxtrain.data.chat_encoding import Encoding
from jaxtrain.data.chat_rows import Conversation
from jaxtrain.data.chat_store import SIDES, StoredSamples, open_samples
from jaxtrain.data.chat_template import TODAY, ChatTemplate, read_chat_template
from jaxtrain.data.chat_windows import PackedRows
from jaxtrain.data.conversations import Conversations, Encoded
from jaxtrain.data.open_source import OpenSource
from jaxtrain.data.token_cache import made_once
from jaxtrain.data.tokenizers import Tokenizer, tokenizer_file
from jaxtrain.errors import DataError
from jaxtrain.files import user_path


def open_chat(source: DataSource, name: str, config: Config, tokenizer: Tokenizer, cache_dir: Path) -> OpenSource:
    """Open a source of kind=chat; encode it if that was not done yet. It has no rule for the split to agree with others': a
    sample is no document of a text.

    Raises DataError where a row is broken or no sample fits, ExplainedError where the chat template cannot be read.
    """
    data, encoding = config.data, Encoding(source, name, config, tokenizer, chat_template_of(config))
    folder = cache_dir / "chat" / encoding.key(cache_dir)
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
    words = _words(source, stored, train, validation, data.sequence_length)
    return OpenSource(words, source.weight, train, validation, identity, chat=stored)


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
    if template is not None and tokenizer.control:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        (probe,) = Conversations(tokenizer, template).encode([("", Conversation(messages, [False, True]))])
        if isinstance(probe, Encoded):
            ends |= {int(token) for token in probe.ids[probe.learned] if int(token) in tokenizer.names}
    return tuple(sorted(end for end in ends if end >= 0))


def _has_template(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    is_in_settings = settings.is_file() and '"chat_template"' in settings.read_text(encoding="utf-8", errors="replace")
    return is_in_settings or (folder / "chat_template.jinja").is_file()
