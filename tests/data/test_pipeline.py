"""Batches are a pure function of (fingerprint, seed, step); held-out tokens are scored once; mixtures keep their weights."""

import dataclasses
import gzip
import threading

import numpy as np
import pytest

from jaxtrain.config import DataSource
from jaxtrain.data.order import FEW_WINDOWS, Order
from jaxtrain.data.pipeline import open_data

NAMES = ("tokens", "targets", "positions", "segments")


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in NAMES)


def join(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in NAMES}


def host_rows(host, hosts, batch_size=8):
    share = batch_size // hosts
    return slice(host * share, (host + 1) * share)


@pytest.fixture
def mixture(make_config, books, jsonl_file):
    rows = DataSource(kind="jsonl", path=str(jsonl_file), weight=3.0)
    return make_config(books, rows, DataSource(kind="synthetic", weight=1.0))


def test_batch_shapes_and_dtypes(make_config, books):
    batch = open_data(make_config(books)).train_batch(0, slice(2, 5))
    assert set(batch) == set(NAMES)
    assert all(array.shape == (3, 16) and array.dtype == np.int32 for array in batch.values())


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_same_global_batches_on_any_number_of_hosts_and_after_a_resume(mixture, hosts):
    whole = open_data(mixture)
    reference = [whole.train_batch(step, slice(None)) for step in range(12)]
    data = [open_data(mixture) for _ in range(hosts)]
    streams = [host.train_batches(0, host_rows(i, hosts)) for i, host in enumerate(data)]
    for step in range(7):
        assert same(join([next(stream) for stream in streams]), reference[step])
    for stream in streams:
        stream.close()
    resumed = [host.train_batches(7, host_rows(i, hosts)) for i, host in enumerate(data)]
    for step in range(7, 12):
        assert same(join([next(stream) for stream in resumed]), reference[step])
    for stream in resumed:
        stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("jaxtrain-data")]


def test_worker_threads_do_not_change_the_batches(mixture):
    one = open_data(mixture)
    many = open_data(dataclasses.replace(mixture, data=dataclasses.replace(mixture.data, workers=4, prefetch=6)))
    with many.train_batches(3, slice(0, 4)) as batches:
        assert all(same(next(batches), one.train_batch(step, slice(0, 4))) for step in range(3, 20))


def test_an_epoch_gives_every_training_window_once_and_the_next_another_order(make_config, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(2000))
    source = DataSource(kind="tokens", path=str(tmp_path / "ids.npy"))
    data = open_data(make_config(source, batch_size=1, vocab_size=2000, tokenizer="none"))
    windows = data.tokens_per_epoch // 16
    first_ids = [[int(data.train_batch(n + e * windows, slice(0, 1))["tokens"][0, 0]) for n in range(windows)] for e in (0, 1)]
    assert sorted(first_ids[0]) == sorted(first_ids[1]) == [16 * i for i in range(windows)]
    assert first_ids[0] != first_ids[1]


def test_the_seed_changes_the_order_and_nothing_else(make_config, books):
    a, b = open_data(make_config(books, seed=0)), open_data(make_config(books, seed=1))
    assert not same(a.train_batch(0, slice(None)), b.train_batch(0, slice(None)))
    assert a.fingerprint == b.fingerprint
    assert same(a.validation_batch(0, slice(None), 8), b.validation_batch(0, slice(None), 8))


def test_training_targets_are_the_training_documents(make_config, books, texts):
    """Every training window, put back in order by its place in the joined documents, is the joined documents."""
    data = open_data(make_config(books, batch_size=1))
    windows = data.tokens_per_epoch // 16
    rows = {data.train_batch(n, slice(0, 1))["tokens"].tobytes() for n in range(windows)}
    held_out = data.tokenizer.decode(_targets(data, 8))
    training = [text for text in texts if text not in held_out]
    stream = np.array([256] + [b for text in training for b in [*text.encode(), 256]], np.int32)
    assert rows == {stream[i * 16 : i * 16 + 16].tobytes() for i in range(windows)}
    assert windows == (len(stream) - 1) // 16


def _targets(data, batch_size):
    batches = [
        data.validation_batch(i, slice(None), batch_size)["targets"] for i in range(data.num_validation_batches(batch_size))
    ]
    targets = np.concatenate(batches).ravel()
    return targets[targets >= 0]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_every_held_out_token_is_scored_once(make_config, books, jsonl_file, texts, batch_size):
    data = open_data(make_config(books, DataSource(kind="jsonl", path=str(jsonl_file))))
    targets = _targets(data, batch_size)
    assert len(targets) == data.validation_tokens
    assert (targets != 256).sum() == data.validation_bytes
    documents = bytes(np.where(targets == 256, 0, targets).astype(np.uint8)).decode().split("\0")[:-1]
    assert documents
    assert set(documents) <= set(texts)
    assert sum(len(text.encode()) for text in documents) == data.validation_bytes
    assert data.gzip_bits_per_byte is not None


def test_validation_rows_of_hosts_join_to_the_whole_batch(make_config, books):
    data = open_data(make_config(books))
    for i in range(data.num_validation_batches(8)):
        parts = [data.validation_batch(i, host_rows(host, 4), 8) for host in range(4)]
        assert same(join(parts), data.validation_batch(i, slice(None), 8))


def test_padding_rows_have_no_targets(make_config, books):
    data = open_data(make_config(books))
    batch = data.validation_batch(data.num_validation_batches(1000) - 1, slice(990, 1000), 1000)
    assert (batch["targets"] == -1).all()
    assert not batch["tokens"].any()
    assert not batch["segments"].any()


def test_gzip_is_what_gzip_makes_of_the_held_out_documents(make_config, books):
    data = open_data(make_config(books))
    targets = _targets(data, 8)
    text = bytes(targets[targets != 256].astype(np.uint8))
    size = len(gzip.compress(text, compresslevel=9, mtime=0))
    assert data.gzip_bits_per_byte == pytest.approx(8 * size / len(text), rel=1e-3)
    assert data.bits_per_byte(np.log(2)) == pytest.approx(len(targets) / len(text))


def test_mixture_weights_are_obeyed(make_config, tmp_path):
    sources = []
    for i, weight in enumerate((1.0, 2.5, 0.5)):
        np.save(tmp_path / f"{i}.npy", np.full(2000, i, np.uint16))
        sources.append(DataSource(kind="tokens", path=str(tmp_path / f"{i}.npy"), weight=weight))
    data = open_data(make_config(*sources, batch_size=400))
    for step in range(3):
        counts = np.bincount(data.train_batch(step, slice(None))["tokens"][:, 0], minlength=3)
        assert np.abs(counts - np.array([100, 250, 50])).max() <= 2


def test_without_document_masks(make_config, books):
    data = open_data(make_config(books, mask_documents=False))
    batch = data.train_batch(0, slice(None))
    assert (batch["segments"] == 1).all()
    assert (batch["positions"] == np.arange(16)).all()


def test_the_fingerprint_follows_the_data_and_the_cut_but_no_path(make_config, books, text_folder, tmp_path):
    def fingerprint(*sources, **fields):
        return open_data(make_config(*sources, **fields)).fingerprint

    original = fingerprint(books)
    assert fingerprint(books) == original
    moved = tmp_path / "elsewhere"
    text_folder.rename(moved)
    books = dataclasses.replace(books, path=f"{moved}/*.txt")
    assert fingerprint(books, cache_dir=str(tmp_path / "another")) == original
    different = [
        fingerprint(books, sequence_length=8),
        fingerprint(books, tokenizer="bpe:280"),
        fingerprint(books, validation_fraction=0.6),
        fingerprint(books, mask_documents=False),
        fingerprint(books, DataSource(kind="synthetic")),
    ]
    path = moved / "03.txt"
    path.write_text(path.read_text(encoding="utf-8").replace("alpha", "omega", 1), encoding="utf-8")
    different.append(fingerprint(books))
    assert len({original, *different}) == 1 + len(different)


def test_sample_prompt_is_held_out_text(make_config, books):
    data = open_data(make_config(books))
    prompt = data.sample_prompt(12)
    assert prompt.shape == (12,)
    assert prompt[0] == 256
    held_out = data.tokenizer.decode(_targets(data, 8))
    assert data.tokenizer.decode(prompt).rstrip("\ufffd") in held_out


def test_description_is_one_line_with_the_figures(make_config, books):
    words = open_data(make_config(books)).description
    assert "\n" not in words
    assert "held-out" in words
    assert "257 ids" in words


@pytest.mark.parametrize("counts", [[1], [2], [3, 7], [FEW_WINDOWS - 1, 2], [FEW_WINDOWS]])
def test_each_source_gives_its_windows_once_an_epoch_in_an_order_of_its_own(counts):
    """From one window to more than are shuffled in the plain way; and any place by itself, without those before it."""
    order = Order(counts, [1.0] * len(counts), seed=3)
    for source, count in enumerate(counts):
        picks = [order[i * len(counts) + source] for i in range(4 * count)]
        assert {pick[0] for pick in picks} == {source}
        epochs = [[window for _, window in picks[epoch * count : (epoch + 1) * count]] for epoch in range(4)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert count < 7 or len({tuple(epoch) for epoch in epochs}) == 4
    far = 10**12 + 7
    assert Order(counts, [1.0] * len(counts), seed=3)[far] == order[far]
    if counts[0] > 100:
        assert [order[i] for i in range(9)] != [Order(counts, [1.0] * len(counts), seed=4)[i] for i in range(9)]


def test_two_windows_come_in_both_orders():
    """Overfitting one batch: over many epochs each window is first half the time, and neighbours differ in it."""
    order = Order([2], [1.0], seed=0)
    firsts = [order[2 * epoch][1] for epoch in range(2000)]
    assert 900 < sum(firsts) < 1100
    assert 900 < sum(a != b for a, b in zip(firsts, firsts[1:], strict=False)) < 1100
