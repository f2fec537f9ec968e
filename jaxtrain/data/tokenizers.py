"""Tokenizers: from text to token ids and back, each with one separator id between documents."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxtrain.data.compressed import HEAD_BYTES
from jaxtrain.data.control_words import ControlWords
from jaxtrain.data.file_hashes import reading
from jaxtrain.data.file_kinds import known_kind
from jaxtrain.data.json_tokenizer import END_OF_TEXT, CutIds, JsonTokenizer, Tokenizer, failed_encoding, reason
from jaxtrain.data.optional import require
from jaxtrain.errors import DataError
from jaxtrain.files import user_path

NO_TOKENIZER = "none"
KINDS_THAT_WORK = "use byte, bpe:SIZE, none (for sources that are already tokens), a tokenizer.json, or a SentencePiece .model"


class ByteTokenizer(Tokenizer):
    """The UTF-8 bytes of the text, 0 to 255, and the separator 256."""

    vocab_size = 257
    separator = end = 256
    fingerprint = "byte-1"

    def __init__(self):
        self._mark = secrets.token_hex(16)
        self.control = ControlWords({END_OF_TEXT: self._mark})
        self.names = {self.separator: END_OF_TEXT}

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def encode_marked_batch(self, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> list[CutIds]:
        """Encode texts in which <|endoftext|> is the separator, as `JsonTokenizer.encode_marked_batch` does."""
        return [self._encode_cut(*self.control.marked_with_cuts(*one)) for one in zip(texts, cuts, strict=True)]

    def _encode_cut(self, text: str, moved: dict[int, int]) -> CutIds:
        before = {cut: len(self._encode_pieces(text[:place])) for cut, place in moved.items()}
        return CutIds(self._encode_pieces(text), before, before)

    def _encode_pieces(self, text: str) -> np.ndarray:
        pieces = [np.array([*piece.encode(), self.separator], np.int32) for piece in text.split(self._mark)]
        return np.concatenate(pieces)[:-1]

    def token(self, token_id: int) -> str:
        """Return a token's text for messages."""
        return self.names.get(token_id) or self.decode([token_id])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        array = np.asarray(ids)
        return array[(array >= 0) & (array < 256)].astype(np.uint8).tobytes().decode(errors="replace")


class IdTokenizer(Tokenizer):
    """No tokenizer, for sources that are already token ids: shows ids as numbers and encodes nothing."""

    separator = end = -1
    fingerprint = NO_TOKENIZER

    def __init__(self, vocab_size: int):
        self.vocab_size, self.names = vocab_size, {}

    def encode(self, text: str) -> np.ndarray:
        """Raise DataError: there is no tokenizer to encode text with."""
        raise DataError(f"data.tokenizer=none cannot turn text into tokens; {KINDS_THAT_WORK}")

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the ids as numbers with spaces between."""
        return " ".join(str(int(i)) for i in ids)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`. Text is normalised as the model says, so decoding need not give back every character."""

    def __init__(self, content: bytes, where: str):
        """Read `content`, the bytes of file `where`. Raises DataError for broken content, or without an eos or bos piece."""
        library = require("sentencepiece", where)
        if re.match(rb"[A-Za-z0-9+/=]+ \d+\n", content):
            raise DataError(f"{where}: is a vocabulary of tiktoken; use the tokenizer.json of the same model")
        self._where, self.names = where, {}
        try:
            self._backend = library.SentencePieceProcessor(model_proto=content)
            self.vocab_size = int(self._backend.piece_size())
        except Exception as error:  # the library raises RuntimeError and others
            raise DataError(f"{where}: not a SentencePiece model ({reason(error)})") from error
        if not self.vocab_size:
            raise DataError(f"{where}: not a SentencePiece model (it has no pieces)")
        marks = [i for i in (self._backend.eos_id(), self._backend.bos_id()) if i >= 0]
        if not marks:
            raise DataError(f"{where}: has no token to separate documents; train it with an eos or a bos piece")
        self.separator = self.end = int(marks[0])
        self.fingerprint = hashlib.sha256(b"sentencepiece-1 " + content).hexdigest()[:32]

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of the text, [length] int32. Raises DataError where the library fails."""
        try:
            return np.array(self._backend.encode(text), dtype=np.int32)
        except BaseException as error:
            raise failed_encoding(self._where, [text], self._backend.encode, error) from error

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of the ids, without control pieces."""
        return self._backend.decode([int(i) for i in ids if 0 <= i < self.vocab_size])


def tokenizer_file(name: str) -> Path:
    """Return the file that data.tokenizer=`name` means; for a folder, the tokenizer file in it. Raises DataError."""
    path = user_path(name)
    if path.is_dir():
        inside = [path / "tokenizer.json", path / "tokenizer.model"]
        found = [candidate for candidate in inside if candidate.is_file()]
        if not found:
            slow = (path / "vocab.json").is_file() or (path / "vocab.txt").is_file()
            way_out = "; transformers makes one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)" if slow else ""
            raise DataError(f"data.tokenizer={name}: the folder has neither tokenizer.json nor tokenizer.model in it{way_out}")
        return found[0]
    if not path.is_file():
        raise DataError(f"data.tokenizer={name}: no such file; {KINDS_THAT_WORK}")
    return path


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer that needs no training: `byte`, a `tokenizer.json`, a SentencePiece `.model`, or a folder with one.

    Raises DataError where there is no such file or it is broken.
    """
    if name == "byte":
        return ByteTokenizer()
    path = tokenizer_file(name)
    with reading(path):
        content = path.read_bytes()
    if what := known_kind(content[:HEAD_BYTES]):
        raise DataError(f"{path}: is not a tokenizer but {what}")
    if path.suffix == ".model":
        return SentencePieceTokenizer(content, str(path))
    if path.suffix != ".json":
        raise DataError(f"data.tokenizer={name}: unknown kind of file; {KINDS_THAT_WORK}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a tokenizer.json (byte {error.start} is not UTF-8)") from error
    return JsonTokenizer(text, str(path), _eos_name(path.with_name("tokenizer_config.json")))


def _eos_name(path: Path) -> str | None:
    """Return the eos_token of a tokenizer_config.json, given there as a string or as an object with `content`."""
    try:
        token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def begin_ids(file: Path) -> tuple[int, ...]:
    """Return the ids that a tokenizer.json puts before a text, which our own encoding leaves out."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(file))
    plain, whole = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
    return tuple(whole[: next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)])
