"""Pack samples into rows of a fixed length: best-fit decreasing, a pure function of the lengths."""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import accumulate

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Return for each row the indices of its samples: [samples in it], in falling order of their lengths.

    Each sample, the longest first, goes into the row with the least room that still takes it (best-fit decreasing, at most
    11/9 of the fewest rows possible + 1). The rows come shuffled, so that any run of them is like the whole.

    Args:
      lengths: [samples], each at least 1 and at most `capacity`.
    """
    row_of, rows = np.zeros(len(lengths), np.int64), 0
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms: list[int] = []  # those that some row has, ascending
    order = np.argsort(-lengths, kind="stable")
    for sample, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room, rows = rows, capacity, rows + 1
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[place]
        row_of[sample] = row
        room -= length
        if room:
            if not with_room[room]:
                insort(rooms, room)
            with_room[room].append(row)
    by_row = order[np.argsort(row_of[order], kind="stable")]
    counts = np.bincount(row_of, minlength=rows).tolist()
    packed = [by_row[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]
    shuffled = (
        np.random.Philox(key=np.array([rows, capacity], np.uint64)).random_raw(rows).argsort(kind="stable") if rows else []
    )
    return [packed[row] for row in shuffled]
