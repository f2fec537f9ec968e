"""The text of an answer as it is made: the whole text in the end, in time that grows with its tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxtrain.inference.model import _Answer

TEXT = " Grüße, 日本語! 🙂🙂 the  end\n the end of it 👩‍🚀 " * 3


def byte_level() -> Tokenizer:
    """As of GPT-2: a character of several bytes may lie in several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["the end of it"], trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet))
    return backend


def sentence_piece() -> Tokenizer:
    """As of Llama 2: blanks begin words, the text's first one is dropped, and bytes stand for unknown characters."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "h", "e", "th", "the", "▁the"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return backend


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, backend: Tokenizer):
        self.backend, self.decoded = backend, 0

    def decode(self, ids: Any) -> str:
        self.decoded += len(ids)
        return self.backend.decode(list(ids))


def told(tokenizer: Counting, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """Return the pieces that are told of an answer, which ends at a stop as `Engine.run` has it."""
    answer, pieces = _Answer(SimpleNamespace(tokenizer=tokenizer, ends=()), stop), []
    for count in range(1, len(ids) + 1):
        ended = count == len(ids) or answer.has_stop(ids[:count])
        answer.add(ids[count - 1], 0.0)
        pieces.append(answer.new_text(ended))
        if ended:
            break
    assert "".join(pieces) == answer.generation().text
    return pieces


@pytest.mark.parametrize("made", [byte_level, sentence_piece])
def test_pieces_are_the_text_and_each_token_is_decoded_a_few_times(made):
    tokenizer = Counting(made())
    ids = tokenizer.backend.encode(TEXT).ids
    pieces = told(tokenizer, ids)
    assert "".join(pieces) == tokenizer.backend.decode(ids) in (TEXT, TEXT.removeprefix(" "))
    assert "\ufffd" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > 40
    assert tokenizer.decoded < 14 * len(ids)  # whole answers would be 150 times
    assert told(tokenizer, ids, ("🙂 the  en", "nowhere"))[-1] == ""
    assert "".join(told(tokenizer, ids, ("🙂 the  en",))).endswith("日本語! 🙂")


def test_bytes_that_are_no_text_are_not_waited_for():
    tokenizer = Counting(byte_level())
    byte = tokenizer.backend.token_to_id(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("ü")[0][0][1])
    pieces = told(tokenizer, [byte] * 100)
    assert len([piece for piece in pieces if piece]) > 4
    assert tokenizer.decoded < 100 * 50
