"""Bad input gives one clear line: what, where, and what would work."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxtrain.config import Config, DataConfig, DataSource
from jaxtrain.config.rules import find_problems
from jaxtrain.data.optional import require
from jaxtrain.data.pipeline import open_data
from jaxtrain.data.tokenize import TokenizeConfig
from jaxtrain.data.tokenize import find_problems as tokenize_problems
from jaxtrain.errors import ConfigError, DataError
from tests.data.streams import append


def is_refused(config, *words):
    """Whether opening the data gives an error of one line that has all the words; prints the error."""
    with pytest.raises(DataError) as caught:
        open_data(config)
    print(message := str(caught.value))
    return "\n" not in message and all(str(word) in message for word in words)


def test_a_glob_that_matches_nothing(make_config, text_folder, tmp_path):
    assert is_refused(
        make_config(DataSource(kind="text", path=f"{text_folder}/*.md")), "data.sources.0.path", "*.md", "has *.txt in it"
    )
    assert is_refused(make_config(DataSource(kind="text", path=f"{tmp_path}/nowhere/*.txt")), "there is no folder", "nowhere")
    assert is_refused(make_config(DataSource(kind="text", path=str(text_folder))), "is a folder", "**")
    assert is_refused(make_config(DataSource(kind="tokens", path=f"{tmp_path}/*.bin")), "matches no file")


def test_an_empty_corpus(make_config, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("")
    assert is_refused(make_config(DataSource(kind="text", path=f"{tmp_path}/*.txt")), "no text in its 2 files", "empty")
    (tmp_path / "rows.jsonl").write_text("\n\n")
    assert is_refused(make_config(DataSource(kind="jsonl", path=f"{tmp_path}/rows.jsonl")), "no text in its 1 file")
    assert is_refused(
        make_config(DataSource(kind="jsonl", path=f"{tmp_path}/rows.jsonl"), tokenizer="bpe:280"), "no text in its 1 file"
    )


def test_a_corpus_too_short_for_a_sequence(make_config, books):
    assert is_refused(
        make_config(books, sequence_length=100_000), "too short for one sequence", "100001", "--data.sequence_length="
    )


def test_everything_held_out(make_config, jsonl_file):
    jsonl_file.write_text('{"text": "only one row"}\n')
    config = make_config(DataSource(kind="jsonl", path=str(jsonl_file)), validation_fraction=1.0)
    assert is_refused(config, "its only document is held out", "--data.validation_fraction=0")


def test_text_that_is_not_utf8(make_config, text_folder, books):
    (text_folder / "05.txt").write_bytes(b"good \xe9 bad")
    assert is_refused(make_config(books), "05.txt", "byte 5 (0xe9) is not UTF-8", "iconv")


def test_jsonl_that_is_not_utf8(make_config, tmp_path):
    path = tmp_path / "rows.jsonl"
    first = json.dumps({"text": "fine"}).encode() + b"\n"
    path.write_bytes(first + b'{"text": "\xff"}\n')
    assert is_refused(make_config(DataSource(kind="jsonl", path=str(path))), "line 2", f"byte {len(first) + 10} (0xff)")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"text": "unfinished', ["not JSON"]),
        ('["a list"]', ["must be a JSON object", "list"]),
        ('{"texts": "x", "id": 1}', ["no field 'text'", "did you mean 'texts'"]),
        ("{}", ["an empty object"]),
        ('{"text": 3}', ["'text' is a int, not text"]),
        ('{"text": null}', ["'text' is null, not text"]),
        ('{"text": "\\ud800"}', ["half a surrogate pair"]),
    ],
)
def test_broken_jsonl_rows(make_config, tmp_path, row, words):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n\n' + row + "\n")
    assert is_refused(make_config(DataSource(kind="jsonl", path=str(path))), "rows.jsonl", "line 3", *words)


def test_parquet_faults(make_config, tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    config = make_config(DataSource(kind="parquet", path=str(path)))
    pyarrow.parquet.write_table(pyarrow.table({"texts": ["a"], "number": [1]}), path)
    assert is_refused(config, "rows.parquet", "no column 'text'", "did you mean 'texts'")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    assert is_refused(config, "row 1 of column 'text' is null")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    assert is_refused(config, "row 0 of column 'text' is a int")
    path.write_bytes(b"PAR1 nonsense")
    assert is_refused(config, "rows.parquet", "broken Parquet file")


def test_array_record_faults(make_config, tmp_path):
    path = tmp_path / "rows.array_record"
    path.write_bytes(b"nonsense" * 100)
    assert is_refused(make_config(DataSource(kind="array_record", path=str(path))), "rows.array_record", "ArrayRecord")
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    writer.write(b"fine")
    writer.write(b"\xff")
    writer.close()
    config = make_config(DataSource(kind="array_record", path=str(path)))
    assert is_refused(config, "record 1", "byte 0 (0xff)")
    path.write_bytes(path.read_bytes()[:-100])
    assert is_refused(config, "rows.array_record", "broken ArrayRecord file")


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
    assert is_refused(
        make_config(source), "ids.npy", "token id 5000 at position 123", "model.vocab_size=300", "--model.vocab_size=70001"
    )
    wide = make_config(source, vocab_size=80_000)
    assert is_refused(wide, "token id 5000 at position 123", "257 ids of data.tokenizer=byte", "name the tokenizer")
    assert open_data(make_config(source, vocab_size=80_000, tokenizer="none")).vocab_size == 80_000
    ids[123] = -1
    np.save(path, ids)
    assert is_refused(make_config(source), "token id -1 at position 123", "never negative")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((10, 10), np.int32), "one-dimensional"),
        (np.zeros(100, np.float32), "float32"),
        (np.array([{"a": 1}]), "of object"),
    ],
)
def test_npy_of_the_wrong_kind(make_config, tmp_path, array, words):
    np.save(tmp_path / "ids.npy", array, allow_pickle=True)
    assert is_refused(make_config(DataSource(kind="tokens", path=str(tmp_path / "ids.npy"))), "ids.npy", words)


@pytest.mark.parametrize("keep", [0, 20, 300])
def test_npy_cut_short(make_config, tmp_path, keep):
    path = tmp_path / "ids.npy"
    np.save(path, np.zeros(1000, np.uint16))
    path.write_bytes(path.read_bytes()[:keep])
    assert is_refused(make_config(DataSource(kind="tokens", path=str(path))), "ids.npy")


def test_token_files_without_metadata_or_of_another_kind(make_config, tmp_path):
    (tmp_path / "ids.bin").write_bytes(bytes(1000))
    assert is_refused(
        make_config(DataSource(kind="tokens", path=f"{tmp_path}/ids.bin")), "ids.bin", "no ids.json beside it", ".npy"
    )
    (tmp_path / "ids.json").write_text("{}")
    assert is_refused(make_config(DataSource(kind="tokens", path=f"{tmp_path}/ids.bin")), "ids.json", "'format' is missing")
    (tmp_path / "book.txt").write_text("x")
    assert is_refused(make_config(DataSource(kind="tokens", path=f"{tmp_path}/book.txt")), "book.txt", "kind=text")


def test_tokenizer_and_sources_that_do_not_fit(make_config, books, tmp_path):
    np.save(tmp_path / "ids.npy", np.zeros(500, np.uint16))
    tokens = DataSource(kind="tokens", path=f"{tmp_path}/ids.npy")
    assert is_refused(make_config(tokens, tokenizer="bpe:280"), "no text to train it on")
    assert is_refused(make_config(books, tokenizer="none"), "data.tokenizer=none", "is text")
    assert is_refused(make_config(books, tokenizer="gpt2"), "data.tokenizer=gpt2", "no such file", "bpe:SIZE")


def test_a_cache_that_cannot_be_written(make_config, books, tmp_path):
    (tmp_path / "file").write_text("x")
    config = make_config(books, cache_dir=f"{tmp_path}/file/cache")
    assert is_refused(config, "data.cache_dir", "cannot write", "--data.cache_dir")
    assert is_refused(make_config(books, cache_dir=f"{tmp_path}/file/cache", tokenizer="bpe:280"), "--data.cache_dir")


def test_sources_that_need_no_cache_work_without_one(make_config, tmp_path):
    (tmp_path / "file").write_text("x")
    np.save(tmp_path / "ids.npy", np.zeros(500, np.uint16))
    tokens = DataSource(kind="tokens", path=f"{tmp_path}/ids.npy")
    data = open_data(make_config(tokens, DataSource(kind="synthetic"), cache_dir=f"{tmp_path}/file/cache"))
    assert data.train_batch(0, slice(None))["tokens"].shape == (8, 16)


def tokens_of(make_config, path, ids, **changes):
    """A config that reads these ids, saved as .npy."""
    np.save(path, ids)
    return make_config(DataSource(kind="tokens", path=str(path)), tokenizer="none", validation_fraction=0.0, **changes)


def test_token_files_that_vanish_under_a_run_cost_nothing(make_config, tmp_path):
    """The run goes on with what it opened, to the last byte; the next start names what is missing."""
    config = tokens_of(make_config, tmp_path / "ids.npy", np.arange(4000) % 300)
    data, again = open_data(config), open_data(config)
    (tmp_path / "ids.npy").unlink()
    (tmp_path / "ids.npy.part").write_bytes(b"")
    for step in range(12):
        assert np.array_equal(data.train_batch(step, slice(None))["tokens"], again.train_batch(step, slice(None))["tokens"])
    assert is_refused(config, "ids.npy", "matches no file")


def test_a_corpus_that_vanishes_under_a_run_costs_nothing(make_config, books, text_folder):
    """Text is read once, into the cache."""
    config = make_config(books)
    data, before = open_data(config), open_data(config).train_batch(3, slice(None))
    for path in text_folder.iterdir():
        path.unlink()
    assert np.array_equal(data.train_batch(3, slice(None))["tokens"], before["tokens"])
    assert is_refused(config, "matches no file")


def test_token_files_that_are_overwritten_under_a_run_stop_it(make_config, tmp_path):
    path, ids = tmp_path / "ids.npy", np.arange(4000) % 300
    data = open_data(tokens_of(make_config, path, ids))
    with open(path, "r+b") as file:
        file.seek(128)
        file.write(np.full(4000, 70_000).tobytes())
    words = "token id 70000 is outside model.vocab_size=300: the token files were changed while"
    with data.train_batches(0, slice(None)) as batches, pytest.raises(DataError, match=words):
        next(iter(batches))


def test_token_files_cut_short_under_a_run_never_give_wrong_ids(tmp_path):
    """Reading beyond the end of a mapped file is a SIGBUS: the process ends, which a supervisor names; nothing is made up."""
    program = f"""
import os
import numpy as np
from jaxtrain.config import Config, DataConfig, DataSource, ModelConfig
from jaxtrain.data.pipeline import open_data
np.save("ids.npy", np.arange(100_000) % 300)
source = DataSource(kind="tokens", path="ids.npy")
data = DataConfig((source,), tokenizer="none", sequence_length=16, cache_dir="{tmp_path}/cache")
opened = open_data(Config(model=ModelConfig(vocab_size=300), data=data))
os.truncate("ids.npy", 4096)
for step in range(1000):
    opened.train_batch(step, slice(None))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS, done.stderr


def test_a_corpus_that_changed_between_runs_is_another_one(make_config, books, text_folder):
    """By its contents, wherever it stands: check_same_run refuses a checkpoint with another fingerprint."""
    config = make_config(books)
    before = open_data(config).fingerprint
    assert open_data(config).fingerprint == before
    path = text_folder / "03.txt"
    path.write_text(path.read_text(encoding="utf-8").replace("alpha", "aleph", 1), encoding="utf-8")
    assert open_data(config).fingerprint != before


def test_what_the_json_beside_a_token_file_says_is_not_believed(make_config, tmp_path):
    """It may come from anywhere: ids are counted, and its own fields have a checksum."""
    from jaxtrain.data.file_hashes import short_hash
    from jaxtrain.data.token_stream import StreamWriter
    from jaxtrain.data.tokenizers import ByteTokenizer

    writer = StreamWriter(tmp_path / "ids.bin", "train", ByteTokenizer(), "byte")
    append(writer, "x" * 500, np.full(500, 290))
    writer.close()
    beside = tmp_path / "ids.json"
    said = json.loads(beside.read_text())
    config = make_config(DataSource(kind="tokens", path=f"{tmp_path}/ids.bin"))
    beside.write_text(json.dumps(said | {"largest_id": 5}))
    assert is_refused(config, "ids.json", "checksum in its field 'digest'")
    for lie, words in (({"largest_id": 5}, ("token id 290 at position 1",)), ({"separator": 7}, ("separator=7", "is 256"))):
        fields = {name: value for name, value in said.items() if name != "digest"} | lie
        beside.write_text(json.dumps(fields | {"digest": short_hash(fields)}))
        assert is_refused(config, *words)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("s3://bucket/cache", "aws s3 sync s3://bucket data"),
        ("gs://bucket/b/cache", "gcloud storage rsync -r gs://bucket/b data"),
        ("hf://datasets/x/y.json", "hf download"),
        ("https://host/tokenizer.json", "curl -LO https://host/tokenizer.json"),
        ("abfs://x/y", "copy it first"),
        ("file:///books/a", "without file://"),
    ],
)
def test_the_address_of_a_store_is_no_path(path, words):
    (problem,) = find_problems(Config(data=DataConfig(cache_dir=path)), 1)[1]
    assert problem.startswith("data.cache_dir=")
    assert words in problem
    (problem,) = tokenize_problems(TokenizeConfig("out", "s3://bucket/*.txt", tokenizer=path))
    assert problem.startswith("--tokenizer=")
    assert words in problem
    (problem,) = find_problems(Config(data=DataConfig(tokenizer="hf://gpt2")), 1)[1]
    assert "data.tokenizer=hf://gpt2" in problem


def test_bad_rows_are_a_share_of_rows():
    for kind, share, words in (("jsonl", 1.0, "is a share"), ("text", 0.1, "has no rows; it is for jsonl, parquet")):
        source = DataSource(kind=kind, path="a", max_bad_rows=share)
        (problem,) = find_problems(Config(data=DataConfig((source,))), 1)[1]
        assert words in problem
        (problem,) = tokenize_problems(TokenizeConfig("out", "a", kind, max_bad_rows=share))
        assert words in problem


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "text", "separator": 5}, "has no meaning for kind=text"),
        ({"kind": "tokens", "separator": -2}, "must be an id, or -1"),
        ({"kind": "tokens", "separator": 300}, "is beyond model.vocab_size=300"),
    ],
)
def test_a_separator_that_cannot_be(make_config, fields, words):
    (problem,) = find_problems(make_config(DataSource(path="a", **fields)), 1)[1]
    assert f"data.sources.0.separator={fields['separator']} {words}" in problem
