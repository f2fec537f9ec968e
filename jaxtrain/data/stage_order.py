"""The order of training rows through the stages of a run. A row is a pure function of the stages that begin before it.

A source is cut into blocks as long as the longest row of any stage. Each epoch shuffles the blocks. A stage with rows of that
length reads block after block. One with shorter rows takes `BLOCKS_TOGETHER` blocks at a time, a round, and shuffles their
parts. When the length changes, the parts that are left of a round come first, joined into rows of the new length (the last of
them is padded); then blocks that nobody has read. So every token of an epoch is read once before the next one begins.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from jaxtrain.data.order import Order, drawn, seeds_of, shuffled, take_turns

BLOCKS_TOGETHER = 256
"""Blocks whose parts are shuffled together."""


class Draws(NamedTuple):
    """The rows of a stage."""

    first: int
    """Number of its first batch."""
    batch_size: int
    """Rows of a batch."""
    weights: tuple[float, ...]
    """Share of each source; 0 for none."""
    length: int
    """Tokens in a row; divides the length of a block."""


class Span(NamedTuple):
    """Consecutive tokens of a block."""

    block: int
    start: int
    length: int


Pick = tuple[int, tuple[Span, ...]]
"""A row: the index of its source, and its tokens in the order in which the row has them."""


class StageOrder:
    """The rows of all batches.

    Sources alternate deterministically so that the shares in any stretch of a stage follow the weights. When the weights
    change, each source continues where it stood.

    Args:
      stages: in order; the first begins with batch 0, the last never ends.
      block_counts: blocks of each source, at least 1.
      block_length: tokens of a block.
      in_order: whether each source is read as it lies, not shuffled.
    """

    def __init__(
        self, stages: Sequence[Draws], block_counts: Sequence[int], block_length: int, seed: int, in_order: Sequence[bool] = ()
    ):
        self._stages, self._firsts = stages, [stage.first for stage in stages]
        before, self._before, self._orders = [0] * len(block_counts), list[list[int]](), list[Order]()
        for stage, last in itertools.zip_longest(stages, self._firsts[1:]):
            self._before.append(before)  # rows of each source
            self._orders.append(order := Order(block_counts, stage.weights, seed, before, in_order))
            rows = drawn(order.shares, (last - stage.first) * stage.batch_size) if last is not None else before
            before = [a + b for a, b in zip(before, rows, strict=True)]
        lengths = [stage.length for stage in stages]
        self._has_one_length = set(lengths) == {block_length}
        seeds = seeds_of(seed, len(block_counts), in_order)
        self._sources = [
            _SourceOrder(count, block_length, seeds[i], lengths, [rows[i] for rows in self._before])
            for i, count in enumerate(block_counts)
        ]

    def tokens(self, batches: int) -> list[int]:
        """Return the tokens of each source in the first `batches` batches, padding included."""
        total = [0] * len(self._sources)
        for stage, order, last in zip(self._stages, self._orders, [*self._firsts[1:], batches], strict=True):
            count = max(min(last, batches) - stage.first, 0) * stage.batch_size
            total = [a + rows * stage.length for a, rows in zip(total, drawn(order.shares, count), strict=True)]
        return total

    def rows(self, batch: int, wanted: range) -> list[Pick]:
        """Return rows of a batch.

        One has fewer tokens than the stage's length if it is the last of a round that a change of the length cuts short.
        """
        number = bisect.bisect_right(self._firsts, batch) - 1
        stage, order = self._stages[number], self._orders[number]
        first = (batch - stage.first) * stage.batch_size
        if self._has_one_length:
            found = order.stretch(first + wanted.start, first + wanted.stop)[:: wanted.step]
            return [(source, (Span(window, 0, stage.length),)) for source, window in found]
        sources, places = take_turns(order.shares, first, stage.batch_size)
        before = self._before[number]
        return [
            (source, self._sources[source].row(before[source] + place))
            for source, place in zip(sources[wanted].tolist(), places[wanted].tolist(), strict=True)
        ]


class _Stretch(NamedTuple):
    """The rows of a source that have one length."""

    first: int
    """Rows before it."""
    length: int
    block: int
    """The first block of the endless sequence that nobody has read before."""
    left: tuple[Span, ...]
    """What the stretch before has left of its last round."""
    ends: tuple[int, ...]
    """Tokens in `left` up to the end of each span."""

    @property
    def rows_of_left(self) -> int:
        return -(-self.ends[-1] // self.length) if self.ends else 0


class _SourceOrder:
    """The rows of one source: numbers of blocks in its endless, shuffled sequence, and what is read of each."""

    def __init__(self, count: int, block_length: int, seed: int | None, lengths: Sequence[int], firsts: Sequence[int]):
        self._count, self._block_length, self._seed = count, block_length, seed
        self._stretches = [_Stretch(0, lengths[0], 0, (), ())]
        for length, first in zip(lengths[1:], firsts[1:], strict=True):
            if length != (last := self._stretches[-1]).length:
                block, left = self._left(last, first - last.first)
                if length > last.length:
                    left = _joined(left)
                ends = tuple(itertools.accumulate(span.length for span in left))
                self._stretches.append(_Stretch(first, length, block, left, ends))
        self._firsts = [stretch.first for stretch in self._stretches]

    def row(self, place: int) -> tuple[Span, ...]:
        """Return what the row at `place` of all rows of this source reads."""
        stretch = self._stretches[bisect.bisect_right(self._firsts, place) - 1]
        row = place - stretch.first
        if row < stretch.rows_of_left:
            spans = _cut(stretch, row * stretch.length, (row + 1) * stretch.length)
        else:
            low, high, index = self._round(stretch, row)
            spans = (self._part(stretch.length, low, high, index),)
        blocks = [int(shuffled(self._count, self._seed, np.array([span.block]))[0]) for span in spans]
        return tuple(span._replace(block=block) for span, block in zip(spans, blocks, strict=True))

    def _round(self, stretch: _Stretch, row: int) -> tuple[int, int, int]:
        """(first block, end, index in it) of the round to which a row after those of `left` belongs.

        Rounds do not reach over the end of an epoch; where rows are blocks a round is one.
        """
        parts = self._block_length // stretch.length
        index = row - stretch.rows_of_left
        block = stretch.block + index // parts
        if parts == 1:
            return block, block + 1, 0
        epoch, place = divmod(block, self._count)
        begin = place // BLOCKS_TOGETHER * BLOCKS_TOGETHER
        low = max(epoch * self._count + begin, stretch.block)
        high = epoch * self._count + min(begin + BLOCKS_TOGETHER, self._count)
        return low, high, index - (low - stretch.block) * parts

    def _part(self, length: int, low: int, high: int, index: int) -> Span:
        """Return part `index` of the shuffled parts of the blocks low to high - 1."""
        parts = self._block_length // length
        is_mixed = parts > 1 and self._seed is not None
        part = int(_shuffled_parts(self._seed, low, (high - low) * parts)[index]) if is_mixed else index
        return Span(low + part // parts, part % parts * length, length)

    def _left(self, stretch: _Stretch, rows: int) -> tuple[int, tuple[Span, ...]]:
        """(the first unread block, what is left of the blocks before it) once a stretch has given so many rows."""
        if rows < stretch.rows_of_left:
            return stretch.block, _cut(stretch, rows * stretch.length, stretch.ends[-1])
        low, high, index = self._round(stretch, rows)
        if index == 0:
            return low, ()
        parts = self._block_length // stretch.length
        return high, tuple(self._part(stretch.length, low, high, i) for i in range(index, (high - low) * parts))


def _cut(stretch: _Stretch, begin: int, end: int) -> tuple[Span, ...]:
    """Return tokens `begin` to `end` - 1 of what was left, as far as there are any."""
    spans, first = [], bisect.bisect_right(stretch.ends, begin)
    for span, last in zip(stretch.left[first:], stretch.ends[first:], strict=True):
        before = last - span.length
        if before >= end:
            break
        low, high = max(begin - before, 0), min(end - before, span.length)
        spans.append(Span(span.block, span.start + low, high - low))
    return tuple(spans)


def _joined(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Return the spans sorted, those that follow one another made one, for rows that are longer than they are."""
    found: list[Span] = []
    for span in sorted(spans):
        last = found[-1] if found else None
        if last and (last.block, last.start + last.length) == span[:2]:
            found[-1] = last._replace(length=last.length + span.length)
        else:
            found.append(span)
    return tuple(found)


@lru_cache(maxsize=64)
def _shuffled_parts(seed: int, block: int, count: int) -> np.ndarray:
    """Return a permutation of `count` parts of the blocks from `block` on, [count]; `seed` is below 2^32, and 2^32 is added to
    tell its numbers from those of `order.shuffled`.
    """
    return np.random.Philox(key=np.array([seed + 2**32, block], np.uint64)).random_raw(count).argsort(kind="stable")
