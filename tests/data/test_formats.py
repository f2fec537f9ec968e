"""Files that other programs write: Megatron's token files, folders of the package datasets, WebDataset's tar archives."""

import gzip
import io
import json
import struct
import tarfile

import numpy as np
import pytest

from jaxtrain.config import DataSource
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.megatron import DocumentTokens
from jaxtrain.data.pipeline import open_data
from jaxtrain.data.token_stream import StreamWriter
from jaxtrain.data.tokenizers import ByteTokenizer
from jaxtrain.errors import DataError
from tests.data.streams import append

SEPARATOR = ByteTokenizer.separator


def write_megatron(path, documents, dtype="<u2", code=8, sequences=2):
    """Write a .bin and its .idx as Megatron-LM documents them, each document in up to `sequences` sequences."""
    pieces = [np.array_split(np.asarray(document, dtype), sequences) for document in documents]
    flat = [piece for document in pieces for piece in document]
    lengths = np.array([len(piece) for piece in flat], "<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    boundaries = np.arange(0, len(flat) + 1, sequences, dtype="<i8")
    path.write_bytes(b"".join(piece.tobytes() for piece in flat))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(flat), len(boundaries))
    path.with_suffix(".idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + boundaries.tobytes())
    return DataSource(kind="tokens", path=str(path))


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_megatrons_documents_are_those_of_its_index(tmp_path, texts, make_config, fraction):
    """The same batches as from a .bin of our own with the same documents, held-out ones too."""
    ids = [ByteTokenizer().encode(text) for text in texts]
    theirs = write_megatron(tmp_path / "theirs.bin", ids)
    writer = StreamWriter(tmp_path / "ours.bin", "train", ByteTokenizer(), "byte")
    for text, document in zip(texts, ids, strict=True):
        append(writer, text, document)
    writer.close()
    ours = DataSource(kind="tokens", path=str(tmp_path / "ours.bin"))
    one, other = (open_data(make_config(source, validation_fraction=fraction)) for source in (theirs, ours))
    assert one.tokens_per_epoch == other.tokens_per_epoch
    assert one.validation_tokens == other.validation_tokens
    for step in range(12):
        batches = [data.train_batch(step, slice(None)) for data in (one, other)]
        assert all(np.array_equal(batches[0][name], batches[1][name]) for name in batches[0])


def test_a_stretch_of_documents_is_that_of_the_whole():
    generator = np.random.default_rng(0)
    starts = np.concatenate([[0], np.cumsum(generator.integers(0, 9, 40))])
    ids = generator.integers(0, 250, starts[-1])
    parts = [np.concatenate([[SEPARATOR], ids[a:b]]) for a, b in zip(starts, starts[1:], strict=False)]
    whole = np.concatenate([*parts, [SEPARATOR]])
    tokens = DocumentTokens(ids, starts, SEPARATOR)
    assert len(tokens) == len(whole)
    for start in range(len(whole)):
        for stop in (start, start + 1, start + 7, start + 60):
            assert np.array_equal(tokens[start:stop], whole[start:stop])


def test_ids_that_end_documents_already_are_taken_as_they_are(tmp_path, make_config):
    documents = [[*range(i, i + 20), SEPARATOR] for i in range(30)]
    source = write_megatron(tmp_path / "ids.bin", documents, "<i4", 4)
    data = open_data(make_config(source, tokenizer="byte", validation_fraction=0.0))
    assert data.tokens_per_epoch == (30 * 21 - 1) // 16 * 16
    batch = data.train_batch(0, slice(None))
    assert ((batch["tokens"] == SEPARATOR) <= (batch["positions"] == 0)).all()


def damaged(content, place, value):
    return content[:place] + value + content[place + len(value) :]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda idx: idx[:-5], "bytes, but 6 sequences and 3 documents take 138"),
        (lambda idx: idx[:20], "20 bytes; the index is cut short"),
        (lambda idx: damaged(idx, 0, b"X"), "it is no index of Megatron's"),
        (lambda idx: damaged(idx, 17, b"\x06"), "dtype code 6 (float64)"),
        (lambda idx: damaged(idx, 17, b"\x63"), "dtype code 99 (unknown)"),
        (lambda idx: damaged(idx, 9, b"\x02"), "version 2"),
        (lambda idx: damaged(idx, 17, b"\x04"), "do not follow one another"),
        (lambda idx: damaged(idx, len(idx) - 8, b"\x05"), "do not divide its 6 sequences"),
    ],
)
def test_a_wrong_index_is_one_line(tmp_path, make_config, damage, words):
    source = write_megatron(tmp_path / "ids.bin", [[1, 2, 3, 4], [5, 6], [7, 8, 9]])
    index = tmp_path / "ids.idx"
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(DataError) as raised:
        open_data(make_config(source))
    assert "ids.idx: " in str(raised.value)
    assert words in str(raised.value)


def test_a_wrong_bin_of_megatrons_is_one_line(tmp_path, make_config):
    source = write_megatron(tmp_path / "ids.bin", [[1, 2, 3, 4]] * 50)
    with pytest.raises(DataError, match=r"which id stands between its documents\?"):
        open_data(make_config(source, tokenizer="none"))
    (tmp_path / "ids.bin").write_bytes(b"12345678")
    with pytest.raises(DataError, match=r"ids\.bin: 8 bytes, but ids\.idx says 200 ids of uint16 = 400 bytes"):
        open_data(make_config(source))


def write_arrow(folder, texts, names, column="text"):
    """Write a folder as datasets' save_to_disk does: Arrow streams of equal parts and their state.json."""
    import pyarrow

    folder.mkdir()
    size = -(-len(texts) // len(names))
    for i, name in enumerate(names):
        table = pyarrow.table({"id": list(range(size))[: len(texts[i * size :])], column: texts[i * size : (i + 1) * size]})
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_folder_of_datasets_gives_its_rows(tmp_path, texts):
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    write_arrow(tmp_path / "set", texts, names)
    (tmp_path / "set" / "cache-1.arrow").write_bytes(b"left by a map")
    for path in (tmp_path / "set", tmp_path / "set" / "data-*.arrow"):
        corpus = open_corpus(DataSource(kind="arrow", path=str(path)), "data", 0.2, tmp_path / "cache")
        assert [document.text for document in corpus.documents("reading")] == texts
    (tmp_path / "set" / names[1]).unlink()
    with pytest.raises(DataError, match=r"state\.json: names data-00001-of-00002\.arrow, which is not there"):
        open_corpus(DataSource(kind="arrow", path=str(tmp_path / "set")), "data", 0.2, tmp_path / "cache")


def test_datasets_writes_what_we_read(tmp_path, texts):
    datasets = pytest.importorskip("datasets", reason="needs pip install datasets")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "set", num_shards=2)
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts})}).save_to_disk(tmp_path / "sets")
    for folder in ("set", "sets"):
        corpus = open_corpus(DataSource(kind="arrow", path=str(tmp_path / folder)), "data", 0.2, tmp_path / "cache")
        assert [document.text for document in corpus.documents("reading")] == texts


def test_an_arrow_file_is_read_too_and_bad_rows_are_counted(tmp_path, texts):
    import pyarrow

    table = pyarrow.table({"text": [texts[0], None, texts[1]]})
    with pyarrow.ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    source = DataSource(kind="arrow", path=str(tmp_path / "rows.arrow"), max_bad_rows=0.5)
    corpus = open_corpus(source, "data", 0.2, tmp_path / "cache")
    assert [document.text for document in corpus.documents("reading")] == texts[:2]
    with pytest.raises(DataError, match=r"it\.arrow: row 1 of column 'text' is null, not text"):
        read(tmp_path, "arrow", (tmp_path / "rows.arrow").read_bytes())


def read(folder, kind, content, field="text"):
    path = folder / f"it.{kind}"
    path.write_bytes(content)
    source = DataSource(kind=kind, path=str(path), text_field=field)
    return [document.text for document in open_corpus(source, "data", 0.2, folder / "cache").documents("reading")]


def test_a_wrong_arrow_file_is_one_line(tmp_path, texts):
    write_arrow(tmp_path / "set", texts, ["a.arrow"])
    whole = (tmp_path / "set" / "a.arrow").read_bytes()
    cases = [
        (whole[:-8], "text", "it has no mark at its end and may be cut short"),
        (whole[:-300], "text", "broken Arrow file"),
        (b"", "text", "broken Arrow file"),
        (b"PAR1\x15\x00" * 9, "text", "is no Arrow file but a Parquet file"),
        (whole, "txet", "no column 'txet'; did you mean 'text'"),
        (b"ARROW1\0\0" + whole[8:], "text", "broken Arrow file"),
    ]
    for content, field, words in cases:
        with pytest.raises(DataError) as raised:
            read(tmp_path, "arrow", content, field)
        assert words in str(raised.value), content[:20]
        assert "\n" not in str(raised.value)


def tar_of(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return file.getvalue()


def test_a_tar_of_samples_gives_their_texts(tmp_path):
    row = json.dumps({"text": "from json"}).encode()
    members = [
        ("a/0.txt", b"zero"),
        ("a/0.json", row),
        ("a/1.cls", b"7"),
        ("a/1.json", row),
        ("a/2.jpg", b""),
        ("a/2.txt", b"2"),
    ]
    for content in (tar_of(members), gzip.compress(tar_of(members))):
        assert read(tmp_path, "tar", content) == ["zero", "from json", "2"]


def test_a_wrong_tar_is_one_line(tmp_path):
    whole = tar_of([("0.txt", b"a" * 600), ("1.txt", b"b" * 600)])
    cases = [
        (tar_of([("0.txt", b"\xff\xfe")]), "sample '0', .txt: byte 0 (0xff) is not UTF-8"),
        (tar_of([("0.json", b"[1]")]), "sample '0', .json: a row must be a JSON object"),
        (tar_of([("0.jpg", b"x"), ("0.cls", b"x")]), "sample '0': has .cls, .jpg, but neither .txt nor .json"),
        (whole[:800], "broken tar file"),
        (whole[: 3 * 512], "it has no mark at its end and may be cut short"),
        (b"PK\x03\x04" + bytes(900), "is no tar file but a zip archive"),
        (b"text", "broken tar file"),
    ]
    for content, words in cases:
        with pytest.raises(DataError) as raised:
            read(tmp_path, "tar", content)
        assert words in str(raised.value), content[:20]
        assert "\n" not in str(raised.value)
