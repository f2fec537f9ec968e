"""A document's side depends on its content alone, so nothing that is held out is trained on."""

import gzip
import json
import os
import random

import numpy as np
import pytest

from jaxtrain.config import DataSource
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.pipeline import open_data
from jaxtrain.data.split import LONG_DOCUMENT, hash_share, split_document
from jaxtrain.data.tokenize import TokenizeConfig, tokenize
from jaxtrain.errors import DataError


def test_shares_are_the_same_on_every_machine():
    assert hash_share(b"os.py") == 0.943812766417913  # pinned: a change would move documents across the split


def test_the_share_held_out_is_about_the_fraction_and_zero_holds_nothing_out():
    documents = [f"document {i}" for i in range(5000)]
    held_out = {
        fraction: {text for text in documents if list(split_document(text, fraction))[0][1]} for fraction in (0, 0.05, 0.1)
    }
    assert not held_out[0]
    assert abs(len(held_out[0.05]) / 5000 - 0.05) < 0.01
    assert held_out[0.05] < held_out[0.1]


@pytest.mark.parametrize(
    "text", ["x" * 200_000, "first\n" + "x" * 200_000, "line é\n" * 30_000], ids=["no line", "early line", "lines"]
)
def test_the_end_of_a_long_document_is_held_out(text):
    (training, side), (held_out, other) = split_document(text, 0.05)
    assert training + held_out == text
    assert (side, other) == (False, True)
    assert 0.05 * len(text) - 1 <= len(held_out) <= 0.05 * len(text) + 10_000
    assert training.endswith("\n") == ("line" in text)
    assert list(split_document(text, 0.0)) == [(text, False)]
    assert list(split_document(text, 1.0)) == [(text, True)]
    assert len(list(split_document("x" * LONG_DOCUMENT, 0.05))) == 1


def write_shard(folder, name, kind, texts):
    """A file, or one a document for kind=text; the path that reads it."""
    path = folder / name
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if kind == "text":
        path.mkdir()
        for i, text in enumerate(texts):
            (path / f"{i}.txt").write_text(text, encoding="utf-8")
        return f"{path}/*.txt"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        path.write_bytes(gzip.compress(rows.encode()) if kind == "jsonl.gz" else rows.encode())
    return str(path)


def random_sources(generator, folder, documents):
    """Sources over random shards: documents come more than once, in files that are linked and spelled in several ways."""
    folder.mkdir()
    sources = []
    for i in range(generator.randint(2, 5)):
        kind = generator.choice(["jsonl", "jsonl.gz", "text", "parquet"])
        shares = [generator.choices(documents, k=generator.randint(1, 9)) for _ in range(generator.randint(1, 3))]
        paths = [write_shard(folder, f"{generator.choice('abc')}{i}{j}", kind, share) for j, share in enumerate(shares)]
        spellings = (str, os.path.relpath, lambda path: path.replace(f"{folder}/", f"{folder}/../{folder.name}/"))
        spelled = [generator.choice(spellings)(path) for path in paths]
        if kind != "text" and generator.random() < 0.3:
            (folder / f"link{i}").symlink_to(paths[0])
            spelled.append(str(folder / f"link{i}"))
        source = DataSource(kind=kind.partition(".")[0], path=",".join(spelled), weight=generator.choice([0.3, 1.0, 5.0]))
        sources += [source] * generator.randint(1, 2)
    return sources


@pytest.mark.parametrize("seed", range(12))
def test_sources_never_train_on_what_any_of_them_holds_out(tmp_path, seed):
    """And every document keeps its side from one random arrangement to the next."""
    generator, sides = random.Random(seed), {}
    documents = [f"document {i} of {seed}" for i in range(40)] + [f"line {i} of {seed}\n" * 9000 for i in range(2)]
    for arrangement in range(2):
        sources = random_sources(generator, tmp_path / str(arrangement), documents)
        corpora = [open_corpus(source, f"data.sources.{i}", 0.3, tmp_path / "cache") for i, source in enumerate(sources)]
        for document in (document for corpus in corpora for document in corpus.documents("reading")):
            assert sides.setdefault(document.text, document.held_out) == document.held_out
    assert set(sides.values()) == {True, False}


def documents_of(parts):
    """The texts between the separators of byte tokens."""
    ids = [np.asarray(part.tokens[:]) for part in parts]
    return {
        bytes(document[document < 256].astype(np.uint8)).decode()
        for stream in ids
        for document in np.split(stream, np.flatnonzero(stream == 256))
        if (document < 256).any()
    }


def sides_of(data):
    train = set().union(*(documents_of(source.train._parts) for source in data._sources))
    return train, set().union(*(documents_of(source.validation_parts) for source in data._sources))


@pytest.fixture
def forty(tmp_path):
    """Two JSONL files, the second beside the first in the sort order, with documents in common; and all their texts."""
    texts = [f"document {i} {'word ' * i}" for i in range(40)]
    for name, share in (("a.jsonl", texts[:30]), ("b.jsonl", texts[10:])):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in share))
    return set(texts)


def test_an_upsampled_file_that_a_glob_names_too(make_config, forty, tmp_path):
    sources = DataSource("jsonl", f"{tmp_path}/b.jsonl", weight=3.0), DataSource("jsonl", f"{tmp_path}/*.jsonl")
    train, held_out = sides_of(open_data(make_config(*sources)))
    assert train | held_out == forty
    assert not train & held_out
    assert held_out
    (tmp_path / "a.jsonl").rename(tmp_path / "z.jsonl")
    (tmp_path / "new.jsonl").write_text('{"text": "a new document"}\n')
    assert sides_of(open_data(make_config(*sources)))[1] - {"a new document"} == held_out


def test_text_and_tokens_made_of_it_hold_out_the_same(make_config, forty, tmp_path):
    def tokens_at(fraction):
        output = tmp_path / f"tokens{fraction}"
        flags = {"validation_fraction": fraction, "cache_dir": f"{tmp_path}/cache"}
        tokenize(TokenizeConfig(output=str(output), input=f"{tmp_path}/a.jsonl", kind="jsonl", **flags))
        return DataSource("tokens", str(output))

    text = DataSource("jsonl", f"{tmp_path}/*.jsonl")
    train, held_out = sides_of(open_data(make_config(text, tokens_at(0.2))))
    assert train | held_out == forty
    assert not train & held_out
    for sources in ((text, tokens_at(0.1)), (tokens_at(0.3), text), (text, tokens_at(0.0)), (tokens_at(0.15), tokens_at(0.25))):
        with pytest.raises(DataError, match=r"is split by the rule 'content-2 at 0.*tokenize again"):
            open_data(make_config(*sources))
    open_data(make_config(text, tokens_at(0.35), validation_fraction=0.35))
    assert sides_of(open_data(make_config(tokens_at(0.4), validation_fraction=0.0)))[1]


def test_token_files_without_held_out_files_are_split_by_document(make_config, tmp_path):
    """By the ids between separators: copies are on one side, in whatever file and place."""
    documents = [np.frombuffer(f"document {i} {'word ' * i}".encode(), np.uint8).astype(np.int32) for i in range(40)]
    sides = {}
    for seed, separator_first in ((0, True), (1, False)):
        picks = np.random.default_rng(seed).integers(0, 40, 70)
        stream = np.concatenate([[256], *[np.append(documents[i], 256) for i in picks]])
        np.save(tmp_path / f"{seed}.npy", stream[0 if separator_first else 1 :])
    sources = (
        DataSource("tokens", f"{tmp_path}/0.npy", separator=256),
        DataSource("tokens", f"{tmp_path}/?.npy", separator=256, weight=4.0),
    )
    for _ in range(2):  # the second time from the note
        train, held_out = sides_of(open_data(make_config(*sources)))
        assert not train & held_out
        assert held_out
        assert train | held_out <= {bytes(document.astype(np.uint8)).decode() for document in documents}
        sides |= {text: False for text in train} | {text: True for text in held_out}
    (tmp_path / "0.npy").unlink()
    train, held_out = sides_of(open_data(make_config(sources[1])))
    assert all(sides[text] is side for texts, side in ((train, False), (held_out, True)) for text in texts)


def test_a_long_document_in_a_token_file_holds_out_its_end(make_config, tmp_path):
    ids = np.arange(150_000) % 251
    np.save(tmp_path / "ids.npy", np.concatenate([[256], ids, [256, 7, 8, 9, 256]]).astype(np.uint16))
    data = open_data(make_config(DataSource("tokens", f"{tmp_path}/ids.npy", separator=256), validation_fraction=0.01))
    train, held_out = (part.tokens[:] for part in (*data._sources[0].train._parts, *data._sources[0].validation_parts))
    assert held_out.tolist() == [256, *ids[148_500:], 256]
    assert train.tolist() == [256, *ids[:148_500], 256, 7, 8, 9, 256]


def test_few_documents_may_have_none_held_out_and_the_description_says_so(make_config, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 40}) + "\n" for i in range(3)))
    data = open_data(make_config(DataSource("jsonl", f"{tmp_path}/a.jsonl"), validation_fraction=1e-6))
    assert "3 + 0 held-out documents, each held out by its own hash" in data.description
    assert (data.validation_tokens, data.num_validation_batches(8), data.bits_per_byte(1.0)) == (0, 0, None)
