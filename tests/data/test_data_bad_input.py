"""Bad input gives one clear line: what, where, and what would work."""

import json

import numpy as np
import pytest

from jaxtrain.config import DataSource
from jaxtrain.data.documents import require
from jaxtrain.data.pipeline import open_data
from jaxtrain.errors import ConfigError, DataError


def refused(config, *words):
    """Opens the data; the error must be one line that has all the words."""
    with pytest.raises(DataError) as caught:
        open_data(config)
    message = str(caught.value)
    assert "\n" not in message, message
    for word in words:
        assert str(word) in message, message


def test_a_glob_that_matches_nothing(make_config, text_folder, tmp_path):
    refused(make_config(DataSource(kind="text", path=f"{text_folder}/*.md")), "data.sources.0.path", "*.md", "has *.txt in it")
    refused(make_config(DataSource(kind="text", path=f"{tmp_path}/nowhere/*.txt")), "there is no folder", "nowhere")
    refused(make_config(DataSource(kind="text", path=str(text_folder))), "is a folder", "**")
    refused(make_config(DataSource(kind="tokens", path=f"{tmp_path}/*.bin")), "matches no file")


def test_an_empty_corpus(make_config, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("")
    refused(make_config(DataSource(kind="text", path=f"{tmp_path}/*.txt")), "no text in its 2 files", "empty")
    (tmp_path / "rows.jsonl").write_text("\n\n")
    refused(make_config(DataSource(kind="jsonl", path=f"{tmp_path}/rows.jsonl")), "no text in its 1 file")
    refused(make_config(DataSource(kind="jsonl", path=f"{tmp_path}/rows.jsonl"), tokenizer="bpe:280"), "no text in its 1 file")


def test_a_corpus_too_short_for_a_sequence(make_config, books):
    refused(make_config(books, sequence_length=100_000), "too short for one sequence", "100001", "--data.sequence_length=")


def test_everything_held_out(make_config, jsonl_file):
    jsonl_file.write_text('{"text": "only one row"}\n')
    config = make_config(DataSource(kind="jsonl", path=str(jsonl_file)), validation_fraction=1.0)
    refused(config, "all of its 1 file are held out", "data.validation_fraction")


def test_text_that_is_not_utf8(make_config, text_folder, books):
    (text_folder / "05.txt").write_bytes(b"good \xe9 bad")
    refused(make_config(books), "05.txt", "byte 5 (0xe9) is not UTF-8", "iconv")


def test_jsonl_that_is_not_utf8(make_config, tmp_path):
    path = tmp_path / "rows.jsonl"
    first = json.dumps({"text": "fine"}).encode() + b"\n"
    path.write_bytes(first + b'{"text": "\xff"}\n')
    refused(make_config(DataSource(kind="jsonl", path=str(path))), "line 2", f"byte {len(first) + 10} (0xff)")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"text": "unfinished', ["not JSON"]),
        ('["a list"]', ["must be a JSON object", "list"]),
        ('{"texts": "x", "id": 1}', ["no field 'text'", "did you mean 'texts'"]),
        ("{}", ["an empty object"]),
        ('{"text": 3}', ["'text' is a int, not text"]),
        ('{"text": null}', ["'text' is a NoneType, not text"]),
        ('{"text": "\\ud800"}', ["half a surrogate pair"]),
    ],
)
def test_broken_jsonl_rows(make_config, tmp_path, row, words):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n\n' + row + "\n")
    refused(make_config(DataSource(kind="jsonl", path=str(path))), "rows.jsonl", "line 3", *words)


def test_broken_gzip(make_config, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(b"not gzip at all")
    refused(make_config(DataSource(kind="jsonl", path=str(path))), "rows.jsonl.gz", "broken gzip")


def test_parquet_faults(make_config, tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    config = make_config(DataSource(kind="parquet", path=str(path)))
    pyarrow.parquet.write_table(pyarrow.table({"texts": ["a"], "number": [1]}), path)
    refused(config, "rows.parquet", "no column 'text'", "did you mean 'texts'")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    refused(config, "row 1 of column 'text' is null")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    refused(config, "row 0 of column 'text' is a int")
    path.write_bytes(b"PAR1 nonsense")
    refused(config, "rows.parquet", "broken Parquet file")


def test_array_record_faults(make_config, tmp_path):
    path = tmp_path / "rows.array_record"
    path.write_bytes(b"nonsense" * 100)
    refused(make_config(DataSource(kind="array_record", path=str(path))), "rows.array_record", "ArrayRecord")
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    writer.write(b"fine")
    writer.write(b"\xff")
    writer.close()
    config = make_config(DataSource(kind="array_record", path=str(path)))
    refused(config, "record 1", "byte 0 (0xff)")
    path.write_bytes(path.read_bytes()[:-100])
    refused(config, "rows.array_record", "broken ArrayRecord file")


def test_a_missing_optional_package():
    with pytest.raises(DataError, match=r"kind=parquet needs the package no-such-package: pip install 'jaxtrain\[data\]'"):
        require("no_such_package.parquet", "kind=parquet")


def test_vocabulary_smaller_than_the_tokenizer(make_config, books):
    with pytest.raises(ConfigError) as caught:
        open_data(make_config(books, vocab_size=200))
    (problem,) = caught.value.problems
    assert "model.vocab_size=200" in problem
    assert "257 ids" in problem
    assert "--model.vocab_size=257" in problem


def test_token_ids_out_of_range(make_config, tmp_path):
    path = tmp_path / "ids.npy"
    source = DataSource(kind="tokens", path=str(path))
    ids = np.zeros(500, np.int64)
    ids[123], ids[400] = 5000, 70_000
    np.save(path, ids)
    refused(make_config(source), "ids.npy", "token id 5000 at position 123", "model.vocab_size=300", "--model.vocab_size=70001")
    wide = make_config(source, vocab_size=80_000)
    refused(wide, "token id 5000 at position 123", "257 ids of data.tokenizer=byte", "name the tokenizer")
    assert open_data(make_config(source, vocab_size=80_000, tokenizer="none")).vocab_size == 80_000
    ids[123] = -1
    np.save(path, ids)
    refused(make_config(source), "token id -1 at position 123", "never negative")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((10, 10), np.int32), "one-dimensional"),
        (np.zeros(100, np.float32), "float32"),
        (np.array([{"a": 1}]), "not a whole .npy array"),
    ],
)
def test_npy_of_the_wrong_kind(make_config, tmp_path, array, words):
    np.save(tmp_path / "ids.npy", array, allow_pickle=True)
    refused(make_config(DataSource(kind="tokens", path=str(tmp_path / "ids.npy"))), "ids.npy", words)


@pytest.mark.parametrize("keep", [0, 20, 300])
def test_npy_cut_short(make_config, tmp_path, keep):
    path = tmp_path / "ids.npy"
    np.save(path, np.zeros(1000, np.uint16))
    path.write_bytes(path.read_bytes()[:keep])
    refused(make_config(DataSource(kind="tokens", path=str(path))), "ids.npy")


def test_token_files_without_metadata_or_of_another_kind(make_config, tmp_path):
    (tmp_path / "ids.bin").write_bytes(bytes(1000))
    refused(make_config(DataSource(kind="tokens", path=f"{tmp_path}/ids.bin")), "ids.bin", "no ids.json beside it", ".npy")
    (tmp_path / "ids.json").write_text("{}")
    refused(make_config(DataSource(kind="tokens", path=f"{tmp_path}/ids.bin")), "ids.json", "'format' is missing")
    (tmp_path / "book.txt").write_text("x")
    refused(make_config(DataSource(kind="tokens", path=f"{tmp_path}/book.txt")), "book.txt", "kind=text")


def test_tokenizer_and_sources_that_do_not_fit(make_config, books, tmp_path):
    np.save(tmp_path / "ids.npy", np.zeros(500, np.uint16))
    tokens = DataSource(kind="tokens", path=f"{tmp_path}/ids.npy")
    refused(make_config(tokens, tokenizer="bpe:280"), "no text to train it on")
    refused(make_config(books, tokenizer="none"), "data.tokenizer=none", "is text")
    refused(make_config(books, tokenizer="gpt2"), "data.tokenizer=gpt2", "no such file", "bpe:SIZE")


def test_a_cache_that_cannot_be_written(make_config, books, tmp_path):
    (tmp_path / "file").write_text("x")
    config = make_config(books, cache_dir=f"{tmp_path}/file/cache")
    refused(config, "data.cache_dir", "cannot write", "--data.cache_dir")
    refused(make_config(books, cache_dir=f"{tmp_path}/file/cache", tokenizer="bpe:280"), "--data.cache_dir")


def test_sources_that_need_no_cache_work_without_one(make_config, tmp_path):
    (tmp_path / "file").write_text("x")
    np.save(tmp_path / "ids.npy", np.zeros(500, np.uint16))
    tokens = DataSource(kind="tokens", path=f"{tmp_path}/ids.npy")
    data = open_data(make_config(tokens, DataSource(kind="synthetic"), cache_dir=f"{tmp_path}/file/cache"))
    assert data.train_batch(0, slice(None))["tokens"].shape == (8, 16)
