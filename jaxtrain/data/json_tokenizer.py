"""Read a HuggingFace `tokenizer.json` such that no text can spell the separator; train one."""

from __future__ import annotations

import hashlib
import json
import secrets
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from jaxtrain.data.control_words import ControlWords
from jaxtrain.errors import DataError

END_OF_TEXT = "<|endoftext|>"
# Usual names of the token that ends a document, then of the one that begins it, most preferred first.
SEPARATOR_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<｜end▁of▁sentence｜>",
    "<|begin_of_text|>",
    "<s>",
    "<bos>",
    "<|startoftext|>",
)


class CutIds(NamedTuple):
    """The ids of a text, [length] int32, and for each cut of the text how many of its tokens end, and begin, before it.

    The two numbers are equal where no token reaches over the cut.
    """

    ids: np.ndarray
    ended: dict[int, int]
    begun: dict[int, int]


def _cut_ids(encoding: Any, moved: dict[int, int]) -> CutIds:
    """Return the tokens of a library's encoding; `moved` gives each cut's position in the text that was encoded."""
    offsets = encoding.offsets
    ended = {cut: bisect_right(offsets, place, key=itemgetter(1)) for cut, place in moved.items()}
    begun = {cut: bisect_left(offsets, place, key=itemgetter(0)) for cut, place in moved.items()}
    return CutIds(np.array(encoding.ids, dtype=np.int32), ended, begun)


class Tokenizer(ABC):
    """Text to token ids and back."""

    vocab_size: int
    """Number of ids, the separator included: every id is below it."""
    separator: int
    """The id before, between and after documents; -1: none."""
    names: dict[int, str]
    """Names of the control tokens that may be shown; their ids are left out of a decoded text."""
    control: Any = None
    """The `ControlWords` of those names; None where they cannot be encoded."""
    end: int
    """The id after an answer that is a text: the tokenizer's eos_token, else the separator; -1: none."""
    fingerprint: str
    """Changes whenever the mapping from text to ids does."""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Return the ids of the text, [length], without any separator."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode each text, on several cores where the tokenizer can."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of the ids. Separators and ids beyond the vocabulary are left out; broken UTF-8 becomes U+FFFD."""


class JsonTokenizer(Tokenizer):
    """A HuggingFace `tokenizer.json`, read by the `tokenizers` library.

    The separator is the first that the vocabulary has of: <|endoftext|>; <|end_of_text|>; the eos_token of the
    tokenizer_config.json beside the file; the other SEPARATOR_NAMES, ends before beginnings. An added token is preferred to
    a piece of the model, and both to the token for unknown characters.

    Control tokens (special tokens and the separator) spelled out in a text are encoded as plain text, so a document cannot
    contain its own end. Nothing is added, truncated, padded or random (dropout), whatever the file asks for.
    """

    def __init__(self, content: str, where: str, eos_name: str | None = None):
        """Read `content`, the text of the file `where`; `eos_name` is the eos_token of a tokenizer_config.json beside it.

        Raises DataError for broken content, or where no token can serve as the separator.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import __version__ as version

        self._where = where
        try:
            description = json.loads(content)
            if what := _another_file(description):
                raise DataError(f"{where}: is not a tokenizer.json but {what}; look for tokenizer.json in the same folder")
            separator = _separator_name(description, eos_name)
            hidden = _hide_control_tokens(description, separator) if separator else {}
            self._backend = Backend.from_str(json.dumps(description))
        except BaseException as error:  # the library raises bare Exception, and panics that derive only from BaseException
            if isinstance(error, DataError):
                raise
            why = reason(error)
            raise DataError(f"{where}: not a tokenizer.json that tokenizers {version} reads ({why})") from error
        if not separator:
            raise DataError(f"{where}: has no token to separate documents; it needs one of {', '.join(SEPARATOR_NAMES)}")
        self._backend.encode_special_tokens = True
        self.control = ControlWords(hidden)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.separator = vocabulary[hidden[separator]]
        self.end = vocabulary.get(hidden.get(eos_name, eos_name), self.separator) if eos_name else self.separator
        self.names = {vocabulary[mark]: name for name, mark in hidden.items()}
        self.fingerprint = hashlib.sha256(f"json-2 {self.separator} {content}".encode()).hexdigest()[:32]

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of the text, [length] int32. Raises DataError like `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode each text, on all cores. Raises DataError where the library fails on one."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:
            raise failed_encoding(self._where, texts, self._backend.encode, error) from error
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_marked_batch(self, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> list[CutIds]:
        """Encode texts in which control tokens are spelled out, as in a rendered chat template, and say which tokens lie before
        each of their cuts, positions in the text.

        Control tokens that went through `control.spell_apart` stay plain text. Raises DataError where the library fails.
        """
        marked = [self.control.marked_with_cuts(text, places) for text, places in zip(texts, cuts, strict=True)]
        self._backend.encode_special_tokens = False
        try:
            encodings = self._backend.encode_batch([text for text, _ in marked], add_special_tokens=False)
        except BaseException as error:
            raise failed_encoding(self._where, texts, self._backend.encode, error) from error
        finally:
            self._backend.encode_special_tokens = True
        return [_cut_ids(encoding, moved) for encoding, (_, moved) in zip(encodings, marked, strict=True)]

    def token(self, token_id: int) -> str:
        """Return a token's text, or a control token's name, for messages."""
        return self.names.get(token_id) or self._backend.decode([token_id], skip_special_tokens=False)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of the ids, without control tokens."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size and i != self.separator]
        return self._backend.decode(known, skip_special_tokens=True)


def reason(error: BaseException) -> str:
    """Return the first line of a tokenizer library's error; raise an interrupt or exit again."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
        raise error
    words = f"no {error}" if isinstance(error, KeyError) else str(error)
    return (words.splitlines() or [type(error).__name__])[0][:200]


def failed_encoding(where: str, texts: Sequence[str], encode: Callable[[str], object], error: BaseException) -> DataError:
    """Return the error for a batch on which a tokenizer's library failed; names the first text that `encode` fails on."""
    why, which = reason(error), f"a batch of {len(texts)} texts"
    for text in texts:
        try:
            encode(text)
        except BaseException:
            which = f"the text that begins {text[:60]!r}"
            break
    return DataError(f"{where}: the tokenizer fails on {which} ({why})")


def _another_file(description: Any) -> str:
    """Return which file the JSON is that often lies beside a tokenizer.json; empty where it may be a tokenizer.json."""
    if not isinstance(description, dict):
        return f"a JSON {type(description).__name__}"
    if isinstance(description.get("model"), dict):
        return ""
    if "tokenizer_class" in description or "added_tokens_decoder" in description:
        return "a tokenizer_config.json"
    if "model_type" in description or "architectures" in description:
        return "the config.json of a model"
    if isinstance(description.get("vocab"), list):
        return "a tekken.json of Mistral's"
    if description and all(isinstance(value, int) for value in description.values()):
        return "a vocab.json, which has no rules to cut text by"
    return f"JSON with the fields {', '.join(list(description)[:5]) or '(none)'}"


def _pieces(model: dict[str, Any]) -> set[str]:
    """Return the model's own vocabulary; Unigram lists [piece, score], the others map pieces to ids."""
    vocabulary = model["vocab"]
    return set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}


def _unknown(model: dict[str, Any]) -> str | None:
    """Return the piece for characters unknown to the model, if it has one."""
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _separator_name(description: dict[str, Any], eos_name: str | None) -> str | None:
    """Return the separator's name by the rule of JsonTokenizer, or None."""
    names = [*SEPARATOR_NAMES[:2], *([eos_name] if eos_name else []), *SEPARATOR_NAMES[2:]]
    added = {token["content"] for token in description.get("added_tokens") or []}
    pieces, unknown = _pieces(description["model"]), _unknown(description["model"])
    found = [name for name in names if name in added] + [name for name in names if name in pieces]
    return next((name for name in found if name != unknown), found[0] if found else None)


def _hide_control_tokens(description: dict[str, Any], separator: str) -> dict[str, str]:
    """Give every control token a name that no text holds, in place; return {name: new name}, the separator among them.

    The library ignores special added tokens that are spelled out (encode_special_tokens), but no others, and a model finds
    the pieces of its own vocabulary: the </s> of T5 is a piece of score 0, which no other spelling can beat. An id does not
    depend on its token's name, so under another name no kind of model can reach it.
    """
    model, tokens = description["model"], description.get("added_tokens") or []
    secret = secrets.token_hex(16)  # not a function of the file, or a text could hold it
    control = [token["content"] for token in tokens if token["special"]]
    control = [separator, *(name for name in control if name not in (separator, _unknown(model)))]
    # The number ends in a dash, or mark 9 before another mark, which begins with a digit, would read as mark 91.
    hidden = {name: f"{secret}-{i}-" for i, name in enumerate(control)}
    for token in tokens:
        if token["content"] in hidden:
            token |= {"content": hidden[token["content"]], "special": True, "normalized": False}
    if not hidden.keys().isdisjoint(_pieces(model)):
        _rename_pieces(model, hidden)
    model.pop("dropout", None)
    description |= {"truncation": None, "padding": None, "post_processor": None}
    return hidden


def _rename_pieces(model: dict[str, Any], names: dict[str, str]) -> None:
    """Rename pieces of the model's own vocabulary; drop the BPE merges that make or use them."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        model["merges"] = [[a, b] for a, b in merges if not {a, b, a + b[prefix:]} & names.keys()]


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Train a byte-level BPE (Sennrich et al. 2016, on GPT-2's byte alphabet and word boundaries); return its tokenizer.json.

    Ids: 0 is <|endoftext|>, then the 256 bytes, then merges. A small text may yield fewer than `vocab_size`.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend.to_str(pretty=True)
