"""Files are read as what is in them: compressed by any tool, joined, with marks of byte order; or named for what they are."""

import bz2
import gzip
import io
import json
import lzma
import random
import struct
import tarfile
import zipfile

import numpy as np
import pyarrow
import pytest

from jaxtrain.config import DataSource
from jaxtrain.data import optional
from jaxtrain.data.compressed import open_content
from jaxtrain.data.documents import BadRows, read_documents
from jaxtrain.data.pipeline import open_data
from jaxtrain.data.tokenize import TokenizeConfig, summary, tokenize
from jaxtrain.errors import DataError


def zstd(content):
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}
SKIPPED_FRAME = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
TEXT = "".join(f"{i} été {random.Random(i).random()}\n" for i in range(3000)).encode()


def texts_of(path, kind="text", **options):
    return list(read_documents(kind, path, "text", **options))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_is_known_by_its_contents(tmp_path, suffix):
    path = tmp_path / "book.txt"
    once, empty = COMPRESS[suffix](TEXT), COMPRESS[suffix](b"")
    path.write_bytes(once)
    assert texts_of(path) == [TEXT.decode()]
    path.write_bytes(once + empty + once + COMPRESS[suffix](b"end"))  # cat a.gz b.gz > c.gz
    assert texts_of(path) == [TEXT.decode() * 2 + "end"]
    path.write_bytes(empty)
    assert texts_of(path) == [""]


def test_padding_and_frames_to_be_skipped(tmp_path):
    path = tmp_path / "book.txt"
    for content in (
        gzip.compress(TEXT) + bytes(70_000),
        lzma.compress(TEXT) + bytes(8),
        SKIPPED_FRAME + zstd(TEXT) + SKIPPED_FRAME,
    ):
        path.write_bytes(content)
        assert texts_of(path) == [TEXT.decode()]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_the_name_of_a_compressed_file_proves_nothing(tmp_path, suffix):
    path = tmp_path / f"rows.jsonl.{suffix}"
    path.write_text('{"text": "unpacked by the program that fetched it"}\n')
    assert texts_of(path, "jsonl") == ["unpacked by the program that fetched it"]
    path.write_bytes(b"\x1f\x8b"[: len(suffix) - 1])
    with pytest.raises(DataError, match=rf"{path}: the \w+ file is cut short: it has \d bytes"):
        texts_of(path, "jsonl")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_cut_short_anywhere(tmp_path, suffix):
    path = tmp_path / f"book.txt.{suffix}"
    once = COMPRESS[suffix](TEXT[:2000])
    for content, first in ((once, 0), (once + once, len(once) + 1)):
        for size in range(first, len(content), 1 if len(content) < 500 else 37):
            path.write_bytes(content[:size])
            with pytest.raises(DataError, match="cut short") as caught:
                texts_of(path)
            assert str(path) in str(caught.value)
            assert str(size) in str(caught.value)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_damaged_compressed_file_is_never_read_as_a_shorter_one(tmp_path, suffix):
    path = tmp_path / "book.txt"
    once = COMPRESS[suffix](TEXT[:2000])
    for place in range(0, len(once), 23):
        content = bytearray(once + once)
        content[len(once) + place] ^= 0x20
        path.write_bytes(content)
        try:
            assert texts_of(path) == [TEXT[:2000].decode() * 2]  # some bytes of a header mean nothing
        except DataError as error:
            assert str(path) in str(error)  # noqa: PT017


def test_a_window_beyond_what_zstd_reads_is_explained(tmp_path):
    path = tmp_path / "book.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd\x04\xa8" + zstd(TEXT)[6:])  # a frame whose header asks for 2 GiB
    with pytest.raises(DataError, match=r"a window beyond 128 MiB; write it anew without --long \(zstd -d --long=31\)"):
        texts_of(path)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_zstd_without_its_package(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(optional.importlib, "import_module", missing)
    (tmp_path / "book.zst").write_bytes(SKIPPED_FRAME)
    with pytest.raises(DataError, match=r"book.zst, a zstd file, needs the package pyarrow: pip install 'jaxtrain\[data\]'"):
        texts_of(tmp_path / "book.zst")


def test_reading_holds_a_line_and_not_the_file(tmp_path):
    (tmp_path / "rows").write_bytes(gzip.compress(b'{"text": "a"}\n' * 400_000))
    with open_content(tmp_path / "rows") as file:
        assert file.readline() == b'{"text": "a"}\n'
        assert file.raw._file.tell() <= 1 << 16


def test_marks_of_byte_order_are_no_text(tmp_path):
    mark = "\ufeff".encode()
    (tmp_path / "a.txt").write_bytes(mark + b"text")
    assert texts_of(tmp_path / "a.txt") == ["text"]
    row = b'{"text": "\xef\xbb\xbfinside"}\n'
    for content in (
        mark + row + mark + row,
        gzip.compress(mark + row) + gzip.compress(mark + row),
        mark + row + b"\n" + mark + b"\n" + row,
    ):
        (tmp_path / "rows.jsonl").write_bytes(content)
        assert [text for text in texts_of(tmp_path / "rows.jsonl", "jsonl") if text] == ["\ufeffinside"] * 2


def archive(kind):
    sink = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(sink, "w") as file:
            file.writestr("a.txt", "text")
    else:
        with tarfile.open(fileobj=sink, mode="w") as file:
            file.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return sink.getvalue()


def npy():
    sink = io.BytesIO()
    np.save(sink, np.zeros(3))
    return sink.getvalue()


def parquet():
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), sink)
    return sink.getvalue().to_pybytes()


ASCII = '{"text": "plain"}\n' * 20
FOREIGN = [
    (ASCII.encode("utf-16"), "UTF-16 text; convert it: iconv -f utf-16 -t utf-8"),
    (ASCII.encode("utf-16-le"), "UTF-16 text; convert it: iconv -f utf-16le -t utf-8"),
    (ASCII.encode("utf-16-be"), "UTF-16 text; convert it: iconv -f utf-16be -t utf-8"),
    (ASCII.encode("utf-32"), "UTF-32 text; convert it: iconv -f utf-32 -t utf-8"),
    (ASCII.encode("utf-32-le"), "UTF-32 text; convert it: iconv -f utf-32le -t utf-8"),
    (ASCII.encode("utf-32-be"), "UTF-32 text; convert it: iconv -f utf-32be -t utf-8"),
    (archive("zip"), "a zip archive; unpack it"),
    (archive("tar"), "a tar archive; use kind=tar if its members are text"),
    (gzip.compress(archive("tar")), "a tar archive; use kind=tar if its members are text"),
    (gzip.compress(gzip.compress(TEXT)), "gzip-compressed; decompress it once"),
    (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive; unpack it"),
    (b"\x04\x22\x4d\x18d@\xa7", "an lz4 file; decompress it"),
    (lzma.compress(TEXT, format=lzma.FORMAT_ALONE), "an lzma file; decompress it"),
    (parquet(), "a Parquet file; use kind=parquet"),
    (npy(), "a NumPy array; use kind=tokens"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer, not the file itself"),
    (b"%PDF-1.7\n%\xe2\xe3", "a PDF document; extract its text"),
    (struct.pack("<Q", 100) + b'{"a": 1}', "a safetensors file; it holds weights"),
    (b"a" + bytes(9) * 100, "no text: 900 of its first 901 bytes are zero"),
]


@pytest.mark.parametrize(("content", "words"), FOREIGN)
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_what_is_no_text_is_named_and_never_read(make_config, tmp_path, kind, content, words):
    (tmp_path / "data").write_bytes(content)
    config = make_config(DataSource(kind=kind, path=f"{tmp_path}/data", max_bad_rows=0.5))
    with pytest.raises(DataError) as caught:
        open_data(config)
    assert f"{tmp_path}/data: is {words}" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["ORC", "PAR1S", "GGUF and more", "MZ", "BZh9", "PK", "]", "a\0b" + "c" * 40, "%PDF", "Obj", "\ufeff", "(P*M)"]
)
def test_text_that_begins_like_something_else_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert texts_of(tmp_path / "a.txt") == [text.removeprefix("\ufeff")]


def test_a_parquet_source_names_what_it_found_instead(tmp_path):
    (tmp_path / "a.parquet").write_bytes(gzip.compress(parquet()))
    with pytest.raises(DataError, match=r"a.parquet: is no Parquet file but gzip-compressed"):
        texts_of(tmp_path / "a.parquet", "parquet")


def test_text_cut_inside_a_character(tmp_path):
    (tmp_path / "a.txt").write_bytes("é".encode()[:1])
    with pytest.raises(DataError, match="ends at byte 1 in the middle of a character; was it cut short"):
        texts_of(tmp_path / "a.txt")


def test_a_json_array_is_no_json_lines(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}], indent=1))
    with pytest.raises(DataError, match=r"line 1: not JSON .*jq -c '\.\[\]'"):
        texts_of(tmp_path / "a.json", "jsonl")


BAD_LINES = (
    b"{",
    b"[1]",
    b"{}",
    b'{"texts": "a"}',
    b'{"text": null}',
    b'{"text": 1}',
    b'{"text": "\xff"}',
    b'{"text": "\\ud800"}',
    b"\0\0",
)


@pytest.fixture
def spoiled(tmp_path):
    """200 rows, among them one of each fault."""
    rows = [json.dumps({"text": f"row {i} " + "word " * 9}).encode() for i in range(200)]
    for i, line in enumerate(BAD_LINES):
        rows[20 * i + 3] = line
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(rows) + b"\n")
    return path


def test_bad_rows_are_left_out_and_counted_where_asked(make_config, spoiled):
    source = DataSource(kind="jsonl", path=str(spoiled), max_bad_rows=0.05)
    data = open_data(make_config(source))
    words = f"left out {len(BAD_LINES)} of 200 rows, the first: {spoiled}: line 4: not JSON"
    assert words in data.description
    assert words in open_data(make_config(source)).description  # from the cache
    good = [text for text in texts_of(spoiled, "jsonl", bad_rows=BadRows(0.5)) if text]
    assert len(good) == 200 - len(BAD_LINES)
    spoiled.write_text("".join(json.dumps({"text": text}) + "\n" for text in good))
    clean = open_data(make_config(DataSource(kind="jsonl", path=str(spoiled))))
    assert clean.fingerprint == data.fingerprint  # the documents are the same


def test_bad_rows_stop_a_run_unless_asked_and_beyond_the_share(make_config, spoiled):
    for share, words in (
        (0.0, "line 4: not JSON"),
        (0.04, "9 of 200 rows are bad, more than max_bad_rows=0.04 of them; the first: "),
    ):
        for _ in range(2):  # what another share left in the cache counts for nothing
            with pytest.raises(DataError, match=words):
                open_data(make_config(DataSource(kind="jsonl", path=str(spoiled), max_bad_rows=share)))
        open_data(make_config(DataSource(kind="jsonl", path=str(spoiled), max_bad_rows=0.05)))


def test_a_source_without_a_good_row_is_given_up_early(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"body": "a"}\n' * 5000)
    bad_rows = BadRows(0.9)
    with pytest.raises(DataError, match="each of the first 1,000 rows is bad; the first: .*line 1: no field 'text'"):
        texts_of(tmp_path / "rows.jsonl", "jsonl", bad_rows=bad_rows)


def test_bad_rows_of_other_kinds_of_source(tmp_path):
    import pyarrow.parquet
    from array_record.python.array_record_module import ArrayRecordWriter

    broken = pyarrow.array([b"a", b"\xff", None, b"b"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    bad_rows = BadRows(0.9)
    assert texts_of(tmp_path / "a.parquet", "parquet", bad_rows=bad_rows) == ["a", "", "", "b"]
    assert (bad_rows.rows, bad_rows.count) == (4, 2)
    assert "row 1 of column 'text' is broken UTF-8" in bad_rows.first
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for record in (b"a", b"\xff", b"b"):
        writer.write(record)
    writer.close()
    assert texts_of(tmp_path / "a.array_record", "array_record", bad_rows=BadRows(0.9)) == ["a", "", "b"]


def test_tokenize_reads_the_same_and_says_what_it_left_out(tmp_path, spoiled):
    (tmp_path / "rows.zst").write_bytes(zstd(spoiled.read_bytes()))
    config = TokenizeConfig(
        str(tmp_path / "tokens"), str(tmp_path / "rows.zst"), "jsonl", max_bad_rows=0.05, cache_dir=str(tmp_path)
    )
    assert "left out 9 of 200 rows, the first: " in summary(config, tokenize(config))
