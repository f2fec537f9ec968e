"""Packing against an oracle written token by token."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.config import DataSource
from jaxtrain.config.rules import find_problems
from jaxtrain.data import document_rows
from jaxtrain.data.packing import num_full_windows, num_padded_windows, pack, read_window
from jaxtrain.data.pipeline import open_data
from jaxtrain.errors import DataError

SEPARATOR = 99
documents_strategy = st.lists(st.lists(st.integers(0, 98), min_size=1, max_size=9), min_size=1, max_size=12)


def join(documents):
    return np.array([SEPARATOR] + [i for document in documents for i in [*document, SEPARATOR]], np.uint16)


def cut(stream, length, count):
    windows, sizes = np.zeros((count, length + 1), np.int32), np.zeros(count, np.int64)
    for row in range(count):
        sizes[row] = read_window(stream, row * (windows.shape[1] - 1), windows[row])
    return pack(windows, sizes, np.full(count, SEPARATOR), mask_documents=True)


def naive_row(stream, row, length):
    """tokens, targets, positions and segments of one row, one token at a time."""
    ids = list(stream[row * length : row * length + length + 1])
    tokens, targets, positions, segments = [], [], [], []
    segment = position = 0
    for i in range(length):
        if i + 1 >= len(ids):
            tokens.append(0), targets.append(-1), positions.append(0), segments.append(0)
            continue
        if i == 0 or ids[i] == SEPARATOR:
            segment, position = segment + 1, 0
        tokens.append(ids[i]), targets.append(ids[i + 1]), positions.append(position), segments.append(segment)
        position += 1
    return {"tokens": tokens, "targets": targets, "positions": positions, "segments": segments}


@given(documents_strategy, st.integers(1, 11))
@settings(max_examples=150, deadline=None)
def test_pack_is_the_naive_packing(documents, length):
    stream = join(documents)
    count = num_padded_windows(len(stream), length)
    batch = cut(stream, length, count)
    for row in range(count):
        for name, expected in naive_row(stream, row, length).items():
            assert batch[name][row].tolist() == expected, name
            assert batch[name].dtype == np.int32


@given(documents_strategy, st.integers(1, 11))
@settings(max_examples=100, deadline=None)
def test_every_token_and_closing_separator_is_a_target_once_in_order(documents, length):
    stream = join(documents)
    targets = cut(stream, length, num_padded_windows(len(stream), length))["targets"]
    assert targets[targets >= 0].tolist() == stream[1:].tolist()
    full = num_full_windows(len(stream), length)
    assert (targets[:full] >= 0).all()
    assert full in (len(targets), len(targets) - 1)


def test_a_separator_is_predicted_from_the_document_that_it_closes():
    batch = cut(join([[1, 2], [3]]), 5, 1)
    assert batch["tokens"].tolist() == [[99, 1, 2, 99, 3]]
    assert batch["targets"].tolist() == [[1, 2, 99, 3, 99]]
    assert batch["segments"].tolist() == [[1, 1, 1, 2, 2]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1]]


def test_without_document_masks_a_row_is_one_document():
    windows = np.array([[5, 99, 6, 7], [1, 2, 0, 0], [0, 0, 0, 0]], np.int32)
    batch = pack(windows, np.array([4, 2, 0]), np.full(3, SEPARATOR), mask_documents=False)
    assert batch["segments"].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 0]]
    assert batch["targets"].tolist() == [[99, 6, 7], [2, -1, -1], [-1, -1, -1]]


@pytest.mark.parametrize(("tokens", "full", "padded"), [(0, 0, 0), (1, 0, 0), (2, 0, 1), (5, 1, 1), (6, 1, 2), (9, 2, 2)])
def test_window_counts(tokens, full, padded):
    assert (num_full_windows(tokens, 4), num_padded_windows(tokens, 4)) == (full, padded)


def test_best_fit_rows_have_each_document_whole_and_each_token_once(make_config, jsonl_file, texts, monkeypatch):
    """Of an epoch: every segment is a piece of a text after its separator, with what follows as its targets; only texts that
    are longer than a row are cut. Five pieces are packed at a time.
    """
    monkeypatch.setattr(document_rows, "GROUP", 5)
    length = 256
    config = make_config(
        DataSource(kind="jsonl", path=str(jsonl_file)),
        sequence_length=length,
        batch_size=1,
        validation_fraction=0.0,
        packing="best_fit",
    )
    data, again = open_data(config), open_data(config)
    assert data.fingerprint != open_data(replace(config, data=replace(config.data, packing="stream"))).fingerprint
    batches = [data.train_batch(n, slice(None)) for n in range(data.row_counts[0])]
    assert all(
        np.array_equal(again.train_batch(n, slice(None))[name], a) for n, b in enumerate(batches) for name, a in b.items()
    )
    documents = [[256, *text.encode()] for text in texts]
    found = []
    for batch in batches:
        row = {name: array[0] for name, array in batch.items()}
        used = row["segments"] > 0
        assert used.sum() == (row["targets"] >= 0).sum()
        assert not row["tokens"][~used].any()
        assert (np.diff(used.astype(int)) <= 0).all()
        for segment in range(1, row["segments"].max() + 1):
            own = row["segments"] == segment
            assert row["positions"][own].tolist() == list(range(own.sum()))
            tokens, targets = row["tokens"][own].tolist(), row["targets"][own].tolist()
            assert tokens[1:] == targets[:-1]
            found.append((tokens, targets[-1]))
    pieces = [
        (ids[i : i + length], [*ids, 256][min(i + length, len(ids))]) for ids in documents for i in range(0, len(ids), length)
    ]
    assert sorted(found) == sorted(pieces)
    assert len(pieces) > len(documents) > 2
    cut = sum(len(ids) > length for ids in documents)
    share = sum(map(len, documents)) / (len(batches) * length)
    assert f"rows {share:.1%} full by best fit, {cut / 12:.1%} of documents cut" in data.words


def test_best_fit_needs_documents_and_masks(make_config, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(200))
    config = make_config(DataSource(kind="tokens", path=str(tmp_path / "ids.npy")), tokenizer="none", packing="best_fit")
    with pytest.raises(DataError, match="these ids are one stream; give data.sources.0.separator"):
        open_data(config)
    _, problems = find_problems(replace(config, data=replace(config.data, mask_documents=False)), 1)
    assert any("data.packing=best_fit packs documents" in problem for problem in problems)
    (source,) = config.data.sources
    ordered = replace(config.data, sources=(replace(source, order="files"),))
    assert ["in no order" in problem for problem in find_problems(replace(config, data=ordered), 1)[1]] == [True]
    shuffled, in_order = (replace(data, packing="stream") for data in (config.data, ordered))
    assert len({open_data(replace(config, data=data)).fingerprint for data in (shuffled, in_order)}) == 2
