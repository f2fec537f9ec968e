"""Each tokenizer round-trips, knows its separator, and explains a file that it cannot use."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data.json_tokenizer import JsonTokenizer, train_bpe
from jaxtrain.data.tokenizers import ByteTokenizer, IdTokenizer, load_tokenizer
from jaxtrain.errors import DataError

TEXTS = ["for i in range(10):\n    print('été', i)\n", "alpha beta ☃ γάμμα", "return 0\n\n\treturn 1"] * 5
BPE = train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    import sentencepiece

    prefix = tmp_path_factory.mktemp("sentencepiece") / "tiny"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.splitlines()] * 4),
        model_prefix=str(prefix),
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@given(st.text())
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), JsonTokenizer(BPE, "bpe")], ids=["byte", "bpe"])
def test_byte_level_tokenizers_give_back_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.separator not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_byte_ids_are_the_utf8_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.separator) == (257, 256)
    assert tokenizer.decode([256, 0x68, 0xC3, 256, 0x69, 300, -1]) == "h\ufffdi"


def test_bpe_training_is_deterministic_and_shortens_text():
    assert train_bpe(TEXTS, 300) == BPE
    tokenizer = JsonTokenizer(BPE, "bpe")
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0].encode())
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == [tokenizer.encode(text).tolist() for text in TEXTS]


def test_a_document_cannot_fake_its_own_end():
    tokenizer = JsonTokenizer(BPE, "bpe")
    assert tokenizer.separator == 0
    ids = tokenizer.encode("before<|endoftext|>after")
    assert 0 not in ids
    assert tokenizer.decode(ids) == "before<|endoftext|>after"
    assert tokenizer.decode([0, *ids, 0, 10_000]) == "before<|endoftext|>after"


def test_sentencepiece_round_trip(sentencepiece_model):
    tokenizer = load_tokenizer(str(sentencepiece_model))
    for text in ("alpha beta ☃ γάμμα", "for i in range(10): 字"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.separator == 2  # </s>
    assert tokenizer.decode([tokenizer.separator, 99_999, *tokenizer.encode("alpha")]) == "alpha"


def test_tokenizer_json_from_a_file_or_its_folder(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(BPE)
    assert load_tokenizer(str(path)).fingerprint == load_tokenizer(str(tmp_path)).fingerprint
    changed = json.loads(BPE)
    changed["added_tokens"][0]["content"] = "<|done|>"
    changed["model"]["vocab"]["<|done|>"] = changed["model"]["vocab"].pop("<|endoftext|>")
    path.write_text(json.dumps(changed))
    with pytest.raises(DataError, match="no token to separate documents"):
        load_tokenizer(str(path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|done|>"}}))
    assert load_tokenizer(str(path)).separator == 0


def test_truncation_and_padding_in_the_file_are_not_obeyed():
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(BPE)
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = JsonTokenizer(backend.to_str(), "bpe")
    assert tokenizer.encode(TEXTS[0]).tolist() == JsonTokenizer(BPE, "bpe").encode(TEXTS[0]).tolist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.json", None, "no such file"),
        ("broken.json", b"{", "not a tokenizer.json"),
        ("binary.json", b"\xff", "byte 0 is not UTF-8"),
        ("wide.json", BPE.encode("utf-16"), "is not a tokenizer but UTF-16 text; convert it"),
        ("pickled.json", pickle.dumps({"vocab": {}}), "a Python pickle"),
        ("pointer.json", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, .* git lfs pull"),
        ("list.json", b"[1]", "a JSON list"),
        ("settings.json", b'{"tokenizer_class": "X"}', "a tokenizer_config.json"),
        ("config.json", b'{"model_type": "llama"}', "the config.json of a model"),
        ("vocab.json", b'{"a": 0, "b": 1}', "a vocab.json"),
        ("tekken.json", b'{"config": {}, "vocab": [{"rank": 0}]}', "a tekken.json"),
        ("other.json", b'{"model": "x", "y": 1}', "JSON with the fields model, y"),
        ("no_vocab.json", b'{"model": {"type": "BPE"}}', r"that tokenizers .* reads \(no 'vocab'\)"),
        ("newer.json", json.dumps(json.loads(BPE) | {"decoder": {"type": "New"}}).encode(), "that tokenizers .* reads"),
        ("no_ids.json", b'{"added_tokens": 3, "model": {"vocab": {}}}', "not a tokenizer.json"),
        ("empty.json", b"", "not a tokenizer.json"),
        ("broken.model", b"nonsense", "not a SentencePiece model"),
        ("empty.model", b"", "not a SentencePiece model"),
        ("tiktoken.model", b"IQ== 0\nIg== 1\n", "is a vocabulary of tiktoken; use the tokenizer.json"),
        ("weights.model", b"PK\x03\x04", "a zip archive"),
        ("words.txt", b"a", "unknown kind of file"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_explained(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(str(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("failure", [ValueError("two\nlines"), type("PanicException", (BaseException,), {})("out of range")])
def test_a_failure_of_the_library_names_the_text(failure):
    class Broken:
        def encode(self, text, **_):
            if "bad" in text:
                raise failure

        def encode_batch_fast(self, texts, **_):
            raise failure

    tokenizer = JsonTokenizer(BPE, "some.json")
    tokenizer._backend = Broken()
    words = rf"some.json: the tokenizer fails on the text that begins 'a bad one' \({str(failure).splitlines()[0]}\)"
    with pytest.raises(DataError, match=words):
        tokenizer.encode_batch(["a good one", "a bad one"])


def test_a_word_that_a_tokenizer_cannot_encode_is_explained(tmp_path):
    """The library itself raises: WordLevel without a token for what it does not know."""
    model = {"type": "WordLevel", "vocab": {"</s>": 0, "known": 1}, "unk_token": "<unk>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode("known").tolist() == [1]
    with pytest.raises(DataError, match=r"tokenizer.json: the tokenizer fails on the text that begins 'unheard' \(.*UNK"):
        tokenizer.encode_batch(["known", "unheard"])


def test_an_interrupt_is_no_fault_of_the_tokenizer():
    class Interrupted:
        encode = None

        def encode_batch_fast(self, texts, **_):
            raise KeyboardInterrupt

    tokenizer = JsonTokenizer(BPE, "some.json")
    tokenizer._backend = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"neither tokenizer.json nor tokenizer.model in it$"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(DataError, match=r"AutoTokenizer.from_pretrained\(FOLDER\).save_pretrained\(FOLDER\)"):
        load_tokenizer(str(tmp_path))


def test_no_tokenizer_shows_numbers_and_encodes_nothing():
    tokenizer = IdTokenizer(1000)
    assert tokenizer.decode(np.array([7, 8])) == "7 8"
    with pytest.raises(DataError, match="cannot turn text into tokens"):
        tokenizer.encode("x")
