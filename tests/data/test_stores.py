"""Sources behind URLs give the batches of the same files on disk, with the same fingerprint; their failures are one line.

fsspec's memory file system stands for a store; the same test runs against moto's S3 server on the loopback where that is
installed (`pip install 'moto[server]' s3fs`).
"""

import json
import shutil
from dataclasses import replace

import fsspec
import numpy as np
import pytest

from jaxtrain import stores
from jaxtrain.config import DataSource
from jaxtrain.data import store_path, store_tokens
from jaxtrain.data.pipeline import open_data
from jaxtrain.data.store_path import StorePath
from jaxtrain.data.store_tokens import BlockCache, StoreTokens
from jaxtrain.data.token_stream import StreamWriter
from jaxtrain.data.tokenizers import ByteTokenizer
from jaxtrain.errors import DataError
from jaxtrain.telemetry.metrics import read_rows
from tests.data.streams import append
from tests.data.test_sources import write_parquet
from tests.launch.processes import started


@pytest.fixture(autouse=True)
def behind(monkeypatch):
    """Many blocks and ranges in small files; no waiting between attempts. Return what is to be done behind the rows."""
    works = []
    monkeypatch.setattr(BlockCache, "behind", lambda self, work: works.append(work))
    monkeypatch.setattr(store_tokens, "BLOCK_BYTES", 64)
    monkeypatch.setattr(store_tokens, "DIRECT_BYTES", 4096)
    monkeypatch.setattr(store_path, "READ_BYTES", 1000)
    monkeypatch.setattr(store_tokens, "READ_BYTES", 1000)
    monkeypatch.setattr(stores, "DELAYS", (0.0, 0.0))
    return works


@pytest.fixture
def memory():
    """A store in memory: (file system, URL of a folder in it)."""
    store = fsspec.filesystem("memory")
    yield store, "memory://bucket/data"
    store.rm("/bucket", recursive=True) if store.exists("/bucket") else None


@pytest.fixture
def s3(monkeypatch):
    """The same of a server of moto's."""
    moto = pytest.importorskip("moto.server", reason="needs pip install 'moto[server]' s3fs")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {"ENDPOINT_URL": address, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    store = fsspec.filesystem("s3")
    store.mkdir("bucket")
    yield store, "s3://bucket/data"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    fsspec.filesystem("s3", key="a", secret="b").rm("bucket", recursive=True)  # servers of one process share what they hold
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def store(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def folder(tmp_path, texts):
    """A folder with each kind of file."""
    folder = tmp_path / "here"
    (folder / "books").mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / "books" / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 9))
    write_parquet(folder / "rows.parquet", texts * 5)
    ids = np.random.default_rng(0).integers(0, 250, 30_000).astype(np.uint16)
    np.save(folder / "ids.npy", ids)
    (folder / "tokens").mkdir()
    for split in ("train", "validation"):
        writer = StreamWriter(folder / "tokens" / f"{split}.bin", split, ByteTokenizer(), "byte")
        for text in texts:
            append(writer, text * (3 if split == "train" else 1), ByteTokenizer().encode(text))
        writer.close()
    return folder


SOURCES = {
    "text": DataSource(kind="text", path="books/*.txt"),
    "jsonl": DataSource(kind="jsonl", path="rows.jsonl"),
    "parquet": DataSource(kind="parquet", path="*.parquet"),
    "tokens": DataSource(kind="tokens", path="tokens"),
    "packed": DataSource(kind="tokens", path="tokens"),
    "one stream": DataSource(kind="tokens", path="ids.npy"),
    "documents": DataSource(kind="tokens", path="ids.npy", separator=7),
}


def test_the_batches_and_the_fingerprint_are_those_of_local_files(store, folder, make_config, behind):
    system, url = store
    system.put(str(folder), url, recursive=True)
    for name, source in SOURCES.items():
        fields = {"tokenizer": "byte" if name in ("text", "jsonl", "parquet", "tokens", "packed") else "none"}
        fields |= {"packing": "best_fit"} if name == "packed" else {}
        here, there = (
            open_data(make_config(replace(source, path=f"{root}/{source.path}"), cache_dir=str(cache), **fields))
            for root, cache in ((folder, folder / "cache"), (url, folder / "cache there"))
        )
        assert here.fingerprint == there.fingerprint, name
        with there.train_batches(0, slice(2, 6)) as ahead:
            batches = [(here.train_batch(step, slice(2, 6)), next(ahead)) for step in range(5)]
            for work in behind:  # from here on of blocks
                work()
            batches += [(here.train_batch(step, slice(2, 6)), next(ahead)) for step in range(5, 10)]
        count = here.num_validation_batches(4)
        assert count == there.num_validation_batches(4)
        batches += [tuple(data.validation_batch(i, slice(0, 4), 4) for data in (here, there)) for i in range(min(count, 5))]
        for ours, theirs in batches:
            assert all(np.array_equal(ours[key], theirs[key]) for key in ours), name


def test_two_processes_on_a_store_train_what_one_does_on_a_disk(s3, folder, tmp_path):
    """They share a cache: one of them fetches the file behind the rows of both."""
    system, url = s3
    system.put(str(folder), url, recursive=True)
    flags = (
        "--config=quickstart --data.tokenizer=byte --data.sources.0.kind=tokens --data.sequence_length=16 --train.steps=4 "
        "--train.global_batch_size=8 --train.log_every=1 --train.validate_every=4 --train.sample_tokens=0 --checkpoint.every=0 "
        "--model.num_layers=1 --model.embed_dim=16 --model.num_heads=2 --model.num_kv_heads=2 --model.head_dim=8 "
        "--model.mlp_dim=16 --model.vocab_size=257 --train.compilation_cache="
    ).split()
    found = []
    for count, root in ((1, folder), (2, url)):
        own = [
            f"--data.sources.0.path={root}/tokens",
            f"--data.cache_dir={tmp_path}/{count}",
            f"--run_dir={tmp_path}/run{count}",
        ]
        with started(count, 2 // count, [*flags, *own], tmp_path) as processes:
            assert {process.wait(300) for process in processes} == {0}, (tmp_path / "0.log").read_text()[-2000:]
        rows = read_rows(tmp_path / f"run{count}" / "metrics.jsonl")
        found.append([row.get("loss", row.get("validation_loss")) for row in rows])
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert len(found[0]) == 5


@pytest.mark.parametrize("fits", [True, False])
def test_rows_are_read_by_themselves_and_a_file_that_fits_is_kept_whole(memory, folder, tmp_path, monkeypatch, behind, fits):
    system, url = memory
    system.put(str(folder), url, recursive=True)
    asked = []
    read = StorePath.read_ranges
    monkeypatch.setattr(StorePath, "read_ranges", lambda self, ranges: asked.extend(ranges) or read(self, ranges))
    ids = np.load(folder / "ids.npy")
    most = 80_000 if fits else 60_000  # of 60,128 bytes

    def tokens():
        return StoreTokens(StorePath(f"{url}/ids.npy"), ids.dtype, len(ids), 128, BlockCache(tmp_path / "blocks", most))

    spans = [(100, 150), (140, 200), (29_990, 30_000), (100, 150)]
    for array in (first := tokens(), first):
        array.fetch(spans)
        for start, stop in spans:
            assert np.array_equal(array[start:stop], ids[start:stop])
    assert asked == [(128 + 2 * start, 128 + 2 * stop) for start, stop in spans[:3]]  # once, and no byte more
    assert np.array_equal(first[:], ids)  # a scan is read in passing
    asked.clear()
    assert len(behind) == fits
    for work in behind * 2:
        work()  # the second time nothing is left to fetch
    if fits:
        assert len(asked) == -(-60_128 // 960)  # READ_BYTES in whole blocks
        assert sum(stop - start for start, stop in asked) == 60_128
        asked.clear()
        later = tokens()
        assert np.array_equal(later[100:200], ids[100:200])
        assert asked == []  # blocks survive the process
    assert len([path for path in (tmp_path / "blocks").rglob("*[0-9]") if path.is_file()]) == fits * -(-60_128 // 64)


def test_the_cache_is_bounded_and_damage_in_it_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(store_tokens, "MEMORY_BYTES", 0)
    cache = BlockCache(tmp_path, 1000)
    for number in range(50):
        cache.put("file", number, bytes([number]) * 100)
    files = sorted(tmp_path.rglob("*[0-9]"), key=lambda path: int(path.name))
    assert sum(path.stat().st_size for path in files) <= 1000
    assert files[-1].name == "49"
    assert cache.get("file", 49) == bytes([49]) * 100
    assert cache.get("file", 0) is None
    files[-1].write_bytes(files[-1].read_bytes()[:-1])
    assert cache.get("file", 49) is None


def test_a_full_disk_is_told_once_and_the_run_goes_on(tmp_path, caplog):
    (tmp_path / "blocks").write_text("no folder")
    cache = BlockCache(tmp_path / "blocks", 1000)
    for number in range(3):
        cache.put("file", number, b"x" * 100)
    assert len(caplog.records) == 1
    assert "blocks are fetched again; the run goes on" in caplog.text


def test_what_may_pass_is_tried_again_and_what_lasts_is_not(memory, monkeypatch, caplog):
    system, url = memory
    system.pipe_file(f"{url}/a.bin", b"0123456789")
    failures = []

    def failing(error, times):
        def cat(self, *arguments, **options):
            if len(failures) < times:
                failures.append(1)
                raise error
            return [b"012"]

        failures.clear()
        monkeypatch.setattr(type(system), "cat_ranges", cat)

    failing(ConnectionResetError("reset by peer"), 2)
    assert StorePath(f"{url}/a.bin").read_ranges([(0, 3)]) == [b"012"]
    assert caplog.text.count("reset by peer; trying again") == 2
    failing(ConnectionResetError("reset by peer"), 3)
    with pytest.raises(DataError, match=r"a\.bin: ConnectionResetError: reset by peer"):
        StorePath(f"{url}/a.bin").read_ranges([(0, 3)])
    failing(PermissionError("Forbidden"), 9)
    with pytest.raises(DataError, match="access is denied"):
        StorePath(f"{url}/a.bin").read_ranges([(0, 3)])
    assert len(failures) == 1


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("memory://bucket/data/*.bin", "matches no file; memory://bucket/data has *.jsonl, *.npy, *.parquet in it"),
        ("memory://bucket/nothing/*.txt", "memory://bucket/nothing: there is no such file"),
        ("memory://bucket/data/no.npy", "memory://bucket/data/no.npy: there is no such file"),
        ("nowhere://bucket/a.txt", "Protocol not known: nowhere"),
        ("abfs://box/a.txt", "pip install adlfs"),
        ("gs://box/a.txt", "pip install 'jaxtrain[gcs]'"),
    ],
)
def test_what_is_not_there_is_one_line(memory, folder, make_config, path, words):
    if path.startswith("gs") and shutil.which("gcsfs"):
        pytest.skip("gcsfs is installed")
    system, url = memory
    system.put(str(folder), url, recursive=True)
    with pytest.raises(DataError) as raised:
        open_data(make_config(DataSource(kind="tokens", path=path)))
    assert str(raised.value).startswith("data.sources.0.path=")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_of_a_store_without_the_bucket_or_credentials_is_one_line(s3, make_config, monkeypatch):
    with pytest.raises(DataError, match=r"s3://none: The specified bucket does not exist|s3://none/x: The specified bucket"):
        open_data(make_config(DataSource(kind="text", path="s3://none/x/*.txt")))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(DataError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        open_data(make_config(DataSource(kind="text", path="s3://bucket/x/*.txt")))


def test_a_file_url_is_a_path(folder, make_config):
    local = open_data(make_config(DataSource(kind="text", path=f"{folder}/books/*.txt")))
    assert open_data(make_config(DataSource(kind="text", path=f"file://{folder}/books/*.txt"))).fingerprint == local.fingerprint
