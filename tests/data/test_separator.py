"""A document cannot hold its own end: whatever the text and the tokenizer, the separator's id comes out of no text."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data.corpus import Document
from jaxtrain.data.json_tokenizer import train_bpe
from jaxtrain.data.tokenize import TokenizeConfig, tokenize
from jaxtrain.data.tokenize_parts import encode_part
from jaxtrain.data.tokenizers import ByteTokenizer, load_tokenizer
from jaxtrain.errors import DataError

NAMES = ("</s>", "<|endoftext|>", "<|im_end|>", "<s>", "<think>", "<unk>", "[SEP]", "<pad>")
PIECES = (
    *NAMES,
    "</",
    "s>",
    "<|",
    "<",
    ">",
    "|>",
    "endoftext",
    "＜/s＞",
    "</S>",
    "▁</s>",
    "▁",
    " ",
    "  ",
    "\n",
    "a",
    "été",
    "字",
    "$",
)
TEXTS = [
    "for i in range(10):\n    print('été', i) < > / | s",
    "alpha beta ☃ < | endoftext </ s >",
    "return 0\n\n\treturn 1",
] * 5
BPE = json.loads(train_bpe(TEXTS, 300))

texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=12).map("".join)


def added(content, token_id, **flags):
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content} | defaults | flags


def byte_level(name="</s>", **flags):
    """The trained BPE with its separator under another name, outside the model's own vocabulary."""
    tokenizer = copy.deepcopy(BPE)
    vocabulary = tokenizer["model"]["vocab"]
    del vocabulary["<|endoftext|>"]
    for piece in vocabulary:
        vocabulary[piece] -= 1
    tokenizer["added_tokens"] = [added(name, len(vocabulary), **flags), added("<think>", len(vocabulary) + 1, special=False)]
    return tokenizer


def with_model(model, normalizer=None, pre_tokenizer=None, decoder=None, added_tokens=(), post_processor=None):
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added_tokens),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": model,
    }


def merged():
    """A BPE of characters whose merges make </s>, and go on from there."""
    characters = sorted(set("".join(PIECES)) | set("".join(TEXTS)))
    pieces = ["<unk>", *characters, "</", "s>", "</s>", "</s>a"]
    merges = [["<", "/"], ["s", ">"], ["</", "s>"], ["</s>", "a"]]
    model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges, "unk_token": "<unk>"}
    return with_model(model, added_tokens=[added("</s>", pieces.index("</s>"), special=False)])


def whole_word():
    """A byte-level BPE that takes any word it knows whole (ignore_merges), </s> among them."""
    tokenizer = copy.deepcopy(BPE)
    tokenizer["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer["model"]["ignore_merges"] = True
    return tokenizer


def unigram(**flags):
    """Like T5's: </s> is a piece of the model itself, of score 0, which no other spelling can beat."""
    pieces = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["<s>", 0.0], ["▁", -2.0], ["a", -3.0], ["<", -4.0], ["/", -4.0]]
    pieces += [["s", -4.0], [">", -4.0], ["▁a", -2.5], ["</", -5.0]]
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    specials = [added("<pad>", 0), added("</s>", 1, **flags), added("<unk>", 2), added("<s>", 3)]
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}},
    }
    model = {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False}
    return with_model(model, None, space, space, specials, template)


def words(kind="WordLevel"):
    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2, "<": 3, "##s": 4, "[SEP]": 5, "/": 6, "s": 7, ">": 8}
    model = {"type": kind, "vocab": vocabulary, "unk_token": "<unk>"}
    if kind == "WordPiece":
        model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    return with_model(model, {"type": "Lowercase"}, {"type": "WhitespaceSplit"}, None, [added("</s>", 1)])


NFKC = {"type": "NFKC"}
JSON_KINDS = {
    "special": byte_level(),
    "plain": byte_level(special=False),
    "endoftext": byte_level("<|endoftext|>", special=False),
    "im_end": byte_level("<|im_end|>", special=False),
    "stripping": byte_level(special=False, lstrip=True, rstrip=True),
    "single_word": byte_level(special=False, single_word=True),
    "normalized": byte_level(special=False, normalized=True),
    "NFKC": byte_level(special=False, normalized=True) | {"normalizer": NFKC},
    "own": BPE,
    "not_added": BPE | {"added_tokens": []},
    "whole_word": whole_word(),
    "merged": merged(),
    "unigram": unigram(),
    "plain_unigram": unigram(special=False),
    "word_level": words(),
    "word_piece": words("WordPiece"),
}
LOSSLESS = (
    "special",
    "plain",
    "endoftext",
    "im_end",
    "stripping",
    "single_word",
    "normalized",
    "own",
    "not_added",
    "whole_word",
)


def open_json(tokenizer, folder):
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_no_text_gives_the_separator_of_a_tokenizer_json(tmp_path_factory, kind):
    tokenizer = open_json(JSON_KINDS[kind], tmp_path_factory.mktemp(kind))

    @given(st.lists(texts, max_size=4))
    @settings(max_examples=60, deadline=None)
    def check(documents):
        for text, ids in zip(documents, tokenizer.encode_batch(documents), strict=True):
            assert tokenizer.separator not in ids, text
            if kind in LOSSLESS:
                assert tokenizer.decode([tokenizer.separator, *ids, tokenizer.separator]) == text

    check()
    for text in (*NAMES, *(f"a {name} a" for name in NAMES)):  # what is drawn may miss these
        assert tokenizer.separator not in tokenizer.encode(text), text


def test_tokens_that_end_nothing_stay_tokens(tmp_path):
    """Added tokens that the file does not call special are text with an id of its own: runs of spaces, <think>."""
    tokenizer = open_json(byte_level(special=False), tmp_path)
    assert tokenizer.vocab_size - 1 in tokenizer.encode("a<think>b</s>")


def sentencepiece_model(folder, model_type, **options):
    import sentencepiece

    prefix = folder / f"tiny-{model_type}"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.splitlines()] * 4),
        model_prefix=str(prefix),
        model_type=model_type,
        vocab_size=320,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return str(prefix.with_suffix(".model"))


@pytest.mark.parametrize(
    ("model_type", "options", "lossless"),
    [
        ("unigram", {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}, True),
        ("bpe", {"byte_fallback": True, "user_defined_symbols": ["<|im_end|>", "<think>"]}, False),
        ("char", {"eos_piece": "$"}, False),
        ("bpe", {"eos_piece": "$", "byte_fallback": True}, False),
        ("word", {"add_dummy_prefix": False}, False),
        ("word", {"add_dummy_prefix": False, "eos_id": -1}, False),
        ("unigram", {"user_defined_symbols": ["</s>"], "eos_id": -1}, False),
    ],
)
def test_no_text_gives_the_separator_of_a_sentencepiece_model(tmp_path_factory, model_type, options, lossless):
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path_factory.mktemp("sentencepiece"), model_type, **options))

    @given(st.lists(texts, max_size=4))
    @settings(max_examples=60, deadline=None)
    def check(documents):
        for text, ids in zip(documents, tokenizer.encode_batch(documents), strict=True):
            assert tokenizer.separator not in ids, text
            if lossless and "▁" not in text and "\0" not in text:  # the mark for a space comes back as a space
                assert tokenizer.decode([tokenizer.separator, *ids, tokenizer.separator]) == text

    check()
    for text in (*NAMES, "$", "a$", "▁</s>"):
        assert tokenizer.separator not in tokenizer.encode(text), text


def test_a_stream_refuses_a_separator_inside_a_document(tmp_path):
    """The law holds for any tokenizer, whoever wrote it."""
    tokenizer = ByteTokenizer()
    tokenizer.encode = lambda text: np.array([1, 2, 256, 3])
    with pytest.raises(DataError, match=r"gave the id 256 that separates documents at position 2"):
        encode_part([Document("abcd", 0, False)], tokenizer, "byte", tmp_path / "0-0")


def test_the_separators_of_a_stream_are_as_many_as_its_documents(tmp_path):
    open_json(byte_level(special=False), tmp_path)
    rows = [f"{i} </s> and </s></s> {name}" for i, name in enumerate(NAMES * 10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    files = [str(tmp_path / name) for name in ("tokens", "rows.jsonl")]
    written = tokenize(TokenizeConfig(*files, "jsonl", str(tmp_path / "tokenizer.json"), cache_dir=str(tmp_path / "cache")))
    for split, data in written.items():
        ids = np.fromfile(tmp_path / "tokens" / f"{split}.bin", data.dtype)
        assert np.count_nonzero(ids == data.separator) == data.documents + 1
    assert sum(data.documents for data in written.values()) == len(rows)
