"""The cache is built once, safely by several processes, and again where it was damaged."""

import json
import multiprocessing
import os
import time

import numpy as np
import pytest

from jaxtrain.data import token_cache
from jaxtrain.data.file_hashes import file_hashes
from jaxtrain.data.pipeline import open_data
from jaxtrain.data.token_cache import new_folder


def stream_folder(config):
    (folder,) = [entry.path for entry in os.scandir(f"{config.data.cache_dir}/streams") if entry.is_dir()]
    return folder


def forbid_tokenizing(monkeypatch):
    def fail(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(token_cache, "write_streams", fail)
    monkeypatch.setattr(token_cache, "train_bpe", fail)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:280"])
def test_a_second_run_reads_the_cache(make_config, books, monkeypatch, tokenizer):
    config = make_config(books, tokenizer=tokenizer)
    first = open_data(config)
    forbid_tokenizing(monkeypatch)
    second = open_data(config)
    assert first.fingerprint == second.fingerprint
    assert np.array_equal(first.train_batch(3, slice(None))["tokens"], second.train_batch(3, slice(None))["tokens"])


def damage(kind, folder):
    path = f"{folder}/train.bin"
    with open(path, "r+b") as file:
        if kind == "truncated":
            file.truncate(os.path.getsize(path) - 2)
        elif kind == "altered":
            file.seek(20)
            byte = file.read(1)
            file.seek(20)
            file.write(bytes([byte[0] ^ 1]))
    if kind == "no metadata":
        os.remove(f"{folder}/train.json")
    elif kind == "broken metadata":
        with open(f"{folder}/train.json", "w") as file:
            file.write("{")
    elif kind == "no file":
        os.remove(path)


@pytest.mark.parametrize("kind", ["truncated", "altered", "no metadata", "broken metadata", "no file"])
def test_a_damaged_cache_is_made_again(make_config, books, kind):
    config = make_config(books)
    before = open_data(config)
    reference = before.train_batch(0, slice(None))["tokens"]
    damage(kind, stream_folder(config))
    after = open_data(config)
    assert after.fingerprint == before.fingerprint
    assert np.array_equal(after.train_batch(0, slice(None))["tokens"], reference)
    assert [entry.name for entry in os.scandir(f"{config.data.cache_dir}/streams") if "unfinished" in entry.name] == []


def test_a_damaged_tokenizer_is_trained_again(make_config, books):
    config = make_config(books, tokenizer="bpe:280")
    before = open_data(config).fingerprint
    (folder,) = [entry.path for entry in os.scandir(f"{config.data.cache_dir}/tokenizers") if entry.is_dir()]
    with open(f"{folder}/tokenizer.json", "w") as file:
        file.write('{"model"')
    assert open_data(config).fingerprint == before


def open_and_report(config, barrier, queue):
    barrier.wait()
    queue.put(open_data(config).fingerprint)


def test_processes_may_build_at_the_same_time(make_config, books):
    config = make_config(books, tokenizer="bpe:280")
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [context.Process(target=open_and_report, args=(config, barrier, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    fingerprints = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert fingerprints == {open_data(config).fingerprint}
    assert stream_folder(config)


def test_a_build_that_fails_leaves_nothing(tmp_path):
    target = tmp_path / "target"

    def build():
        with new_folder(target) as folder:
            (folder / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_abandoned_long_ago_is_cleared_and_a_fresh_one_is_not(tmp_path):
    for name, age in (("old", 100_000), ("fresh", 0)):
        folder = tmp_path / f"target.unfinished-jaxtrain-{name}"
        folder.mkdir()
        (folder / "train.bin").write_text("x")
        stamp = time.time() - age
        os.utime(folder / "train.bin", (stamp, stamp))
        os.utime(folder, (stamp, stamp))
    with new_folder(tmp_path / "target") as folder:
        (folder / "done").write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target", "target.unfinished-jaxtrain-fresh"]


def test_the_split_is_written_down(make_config, books, texts):
    config = make_config(books)
    open_data(config)
    folder = stream_folder(config)
    metadata = {}
    for split in ("train", "validation"):
        with open(f"{folder}/{split}.json") as file:
            metadata[split] = json.load(file)
    assert sum(data["documents"] for data in metadata.values()) == len(texts)
    assert sum(data["utf8_bytes"] for data in metadata.values()) == sum(len(text.encode()) for text in texts)
    assert all(data["count"] == data["utf8_bytes"] + data["documents"] + 1 for data in metadata.values())
    assert all(data["dtype"] == "uint16" and data["largest_id"] == 256 for data in metadata.values())


def test_hashes_are_remembered_only_for_settled_files(tmp_path):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("one")
    first = file_hashes([path], cache, "reading")
    assert not (cache / "hashes").exists()
    stat = path.stat()
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_hashes([path], cache, "reading") != first
    os.utime(path, (1e9, 1e9))
    second = file_hashes([path], cache, "reading")
    assert len(list((cache / "hashes").iterdir())) == 1
    assert file_hashes([path], cache, "reading") == second
    path.write_text("three")
    assert file_hashes([path], cache, "reading") != second
