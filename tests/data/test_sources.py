"""Each kind of source yields its documents, split as it should be."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest

from jaxtrain.config import DataSource
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.listing import list_files, list_stdlib
from jaxtrain.data.mapped import map_array
from jaxtrain.data.pipeline import open_data
from jaxtrain.data.token_stream import StreamWriter
from jaxtrain.data.tokenizers import ByteTokenizer
from jaxtrain.errors import DataError
from tests.data.streams import append


def write_parquet(path, texts, column="text"):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), column: texts}), path)


def write_array_record(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


@pytest.fixture
def write_rows(tmp_path):
    def write(kind, texts):
        path = tmp_path / f"rows.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        elif kind == "jsonl.gz":
            path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
        elif kind == "parquet":
            write_parquet(path, texts)
        else:
            write_array_record(path, [text.encode() for text in texts])
        return DataSource(kind=kind.partition(".")[0], path=str(path))

    return write


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "array_record"])
def test_a_document_of_a_file_of_rows_is_a_row(write_rows, texts, tmp_path, kind):
    corpus = open_corpus(write_rows(kind, texts), "data", 0.2, tmp_path)
    documents = list(corpus.documents("reading"))
    assert [document.text for document in documents] == texts
    assert 0 < sum(document.held_out for document in documents) < len(texts)


def test_empty_documents_are_left_out(write_rows, tmp_path):
    for kind in ("jsonl", "parquet", "array_record"):
        corpus = open_corpus(write_rows(kind, ["a", "", "b"]), "data", 0.2, tmp_path)
        assert [document.text for document in corpus.documents("reading")] == ["a", "b"]


def test_a_document_of_text_is_a_file(books, texts, tmp_path):
    documents = list(open_corpus(books, "data", 0.2, tmp_path).documents("reading"))
    assert [document.text for document in documents] == texts
    assert [document.file for document in documents] == list(range(len(texts)))


def test_a_lone_long_file_of_text_is_cut_at_a_line(tmp_path):
    path = tmp_path / "book.txt"
    lines = [f"line {i} é" for i in range(20_000)]
    path.write_text("\n".join(lines), encoding="utf-8")
    training, held_out = open_corpus(DataSource(kind="text", path=str(path)), "data", 0.1, tmp_path).documents("reading")
    assert training.text + held_out.text == "\n".join(lines)
    assert training.text.endswith("\n")
    assert (training.held_out, held_out.held_out) == (False, True)
    assert 1900 <= len(held_out.text.splitlines()) <= 2001


def test_stdlib_is_the_library_without_its_tests():
    names = [file.name for file in list_stdlib()]
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names)
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]
    assert sum(file.path.stat().st_size for file in list_stdlib()) > 5e6


def test_globs_are_joined_by_commas_and_a_file_comes_once(text_folder, monkeypatch):
    monkeypatch.chdir(text_folder)
    names = [file.name for file in list_files("0[12].txt, 0*.txt,./11.txt", "data")]
    assert names == ["01.txt", "02.txt", *[f"0{i}.txt" for i in (0, 3, 4, 5, 6, 7, 8, 9)], "11.txt"]
    (text_folder / "deep" / "er").mkdir(parents=True)
    (text_folder / "deep" / "er" / "x,y.txt").write_text("x")
    assert [file.name for file in list_files(f"{text_folder}/**/x*.txt", "data")] == ["deep/er/x,y.txt"]
    assert [file.name for file in list_files(f"{text_folder}/deep/er/x,y.txt", "data")] == ["x,y.txt"]


def test_synthetic_is_a_pure_function_of_seed_and_index(make_config):
    source = DataSource(kind="synthetic")
    data, again, other = (open_data(make_config(source, seed=seed)) for seed in (0, 0, 1))
    batch = data.train_batch(10**6, slice(None))
    assert np.array_equal(batch["tokens"], again.train_batch(10**6, slice(None))["tokens"])
    assert not np.array_equal(batch["tokens"], other.train_batch(10**6, slice(None))["tokens"])
    assert np.array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert batch["tokens"].max() < 300
    assert (data.validation_bytes, data.gzip_bits_per_byte, data.vocab_size) == (0, None, 300)
    assert data.num_validation_batches(8) == 8
    assert data.bits_per_byte(1.0) is None
    assert len(data.sample_prompt(5)) == 5


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint8])
def test_npy_tokens_of_one_file_hold_out_the_last_windows(make_config, tmp_path, dtype):
    ids = np.random.default_rng(0).integers(0, 200, 1000).astype(dtype)
    np.save(tmp_path / "ids.npy", ids)
    data = open_data(make_config(DataSource(kind="tokens", path=str(tmp_path / "ids.npy")), batch_size=1))
    train, held_out = data.tokens_per_epoch // 16, data.validation_tokens
    assert train in (49, 50)  # 62 full windows, of which the last fifth is held out, rounded by the hash of the file
    assert held_out == 999 - train * 16
    rows = {data.train_batch(n, slice(None))["tokens"].tobytes() for n in range(train)}
    assert rows == {ids[i * 16 : i * 16 + 16].astype(np.int32).tobytes() for i in range(train)}
    targets = np.concatenate([data.validation_batch(i, slice(None), 4)["targets"] for i in range(4)]).ravel()
    assert targets[targets >= 0].tolist() == ids[train * 16 + 1 :].tolist()
    assert data.validation_bytes == 0


def test_npy_tokens_of_several_files_hold_out_the_last_windows_of_each(make_config, tmp_path):
    for i in range(6):
        np.save(tmp_path / f"{i}.npy", np.arange(100 * i, 100 * i + 100))
    source = DataSource(kind="tokens", path=str(tmp_path))
    data = open_data(make_config(source, tokenizer="none", vocab_size=600, batch_size=30))
    training = set(data.train_batch(0, slice(None))["tokens"].ravel().tolist())
    held_out = data.validation_batch(0, slice(None), 30)["targets"]
    held_out = set(held_out[held_out >= 0].tolist())
    assert not training & held_out
    for i in range(6):  # 6 windows and 3 ids, of which a fifth is held out: the last window or the last two
        first = min(number for number in held_out if number // 100 == i) - 100 * i
        assert first in (65, 81)
        assert {number - 100 * i for number in training if number // 100 == i} == set(range(first - 1))


def test_descriptors_do_not_grow_with_token_files(make_config, tmp_path):
    """Nor with windows read: 200 shards of two forms under a limit of 64, of which the process has some in use already."""
    program = """
import resource
from jaxtrain.config import Config, DataConfig, DataSource, ModelConfig
from jaxtrain.data.pipeline import open_data
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
source = DataSource("tokens", "*.bin,*.npy", separator=256)
data = DataConfig((source,), tokenizer="none", sequence_length=16, cache_dir="cache")
opened = open_data(Config(model=ModelConfig(vocab_size=300), data=data))
opened.train_batch(0, slice(None)), opened.validation_batch(0, slice(None), 8)
print(opened.tokens_per_epoch)
"""
    for i in range(100):
        np.save(tmp_path / f"n{i}.npy", np.full(33, i))
        writer = StreamWriter(tmp_path / f"b{i}.bin", "validation" if i == 0 else "train", ByteTokenizer(), "byte")
        append(writer, f"{i:031}", np.full(31, i % 200))
        writer.close()
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (f"{(99 + 100) * 32}\n", 0), done.stderr


def test_mapped_files_are_read_only_and_whole(tmp_path):
    path = tmp_path / "numbers"
    np.arange(5000, dtype="<u2").tofile(path)
    numbers = map_array(path, np.uint16, 4999, offset=2)
    path.unlink()
    assert numbers.tolist() == list(range(1, 5000))
    with pytest.raises(ValueError, match="read-only"):
        numbers[0] = 1
    path.write_bytes(b"12345")
    with pytest.raises(DataError, match="numbers: 5 bytes, but 3 numbers of uint16 end at byte 6"):
        map_array(path, np.uint16, 3)
    with pytest.raises(DataError, match="none: cannot be read"):
        map_array(tmp_path / "none", np.uint16, 3)


def test_npy_tokens_are_one_stream_unless_asked_where_documents_begin(make_config, tmp_path):
    """Ids made by others: an id that equals the tokenizer's separator ends no document, unless the source says that it does."""
    np.save(tmp_path / "ids.npy", np.where(np.arange(1000) % 5, np.arange(1000) % 97, 256))

    def opened(**fields):
        source = DataSource(kind="tokens", path=f"{tmp_path}/ids.npy", **fields)
        return open_data(make_config(source, batch_size=2, vocab_size=300))

    data, told = opened(), opened(separator=256)
    assert data.train_batch(0, slice(None))["segments"].max() == 1
    assert "one stream, documents not told apart" in data.description
    assert told.train_batch(0, slice(None))["segments"].max() > 3
    assert "one stream" not in told.description
    assert told.fingerprint != data.fingerprint


def test_files_of_one_source_agree_on_the_separator(make_config, tmp_path):
    writer = StreamWriter(tmp_path / "a.bin", "train", ByteTokenizer(), "byte")
    append(writer, "x" * 500, np.full(500, 120))
    writer.close()
    np.save(tmp_path / "b.npy", np.full(500, 120, np.uint16))
    for path, separator, words in (("a.bin", 7, "a.json says separator=256"), ("[ab].*", -1, "separators -1 and 256")):
        with pytest.raises(DataError, match=words):
            open_data(make_config(DataSource(kind="tokens", path=f"{tmp_path}/{path}", separator=separator)))
    open_data(make_config(DataSource(kind="tokens", path=f"{tmp_path}/[ab].*", separator=256)))
