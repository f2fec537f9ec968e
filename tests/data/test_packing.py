"""Packing against an oracle written token by token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data.packing import num_full_windows, num_padded_windows, pack, read_window

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
