"""The order of rows through the stages of a run: every token counted."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jaxtrain.data import stage_order
from jaxtrain.data.stage_order import Draws, StageOrder

STEPS = 60


@pytest.fixture(autouse=True)
def small_rounds(monkeypatch):
    """Rounds of three blocks, so that a few blocks have several."""
    monkeypatch.setattr(stage_order, "BLOCKS_TOGETHER", 3)


def random_stages(random: np.random.Generator, lengths: list[int], sources: int) -> list[Draws]:
    """Three stages or more, each of other weights (some 0), batch and length."""
    firsts = [0, *sorted(random.choice(np.arange(1, STEPS), len(lengths) - 1, replace=False).tolist())]
    weights = [np.where(random.random(sources) < 0.3, 0, random.uniform(0.1, 2, sources)) for _ in lengths]
    weights = [tuple((row if row.any() else row + 1).tolist()) for row in weights]
    return [Draws(f, int(random.integers(1, 7)), w, length) for f, w, length in zip(firsts, weights, lengths, strict=True)]


def rows_of(order: StageOrder, stages: list[Draws], first: int, last: int):
    """(stage, source, spans) of all rows of the batches `first` to `last` - 1."""
    for batch in range(first, last):
        stage = next(stage for stage in reversed(stages) if stage.first <= batch)
        for row in range(stage.batch_size):
            yield (stage, *order.rows(batch, range(row, row + 1))[0])


@pytest.mark.parametrize("seed", range(40))
def test_no_token_is_lost_or_repeated(seed):
    """Over random stages: whenever a token is read, all others have been read as often, or once less. Nothing is padded but
    the last row of what a change of the length has left.
    """
    random = np.random.default_rng(seed)
    block = 16
    lengths = [int(n) for n in random.choice([2, 4, 8, 16], random.integers(3, 6))]
    counts = [int(n) for n in random.integers(1, 12, 3)]
    stages = random_stages(random, lengths, 3)
    order = StageOrder(stages, counts, block, seed, (seed % 2 == 0, False, False))
    seen = [np.zeros((count, block), int) for count in counts]
    rows, short = dict.fromkeys(range(len(stages)), 0), 0
    for stage, source, spans in rows_of(order, stages, 0, STEPS):
        tokens = 0
        for span in spans:
            read = seen[source][span.block, span.start : span.start + span.length]
            assert read.size == span.length > 0
            assert (read == read[0]).all()
            assert read[0] == seen[source].min(), "read again before all others"
            read += 1
            tokens += span.length
        assert 0 < tokens <= stage.length
        short += tokens < stage.length
        rows[stages.index(stage)] += 1
    assert short <= 3 * (len(stages) - 1)
    for number, stage in enumerate(stages):
        last = stages[number + 1].first if number + 1 < len(stages) else STEPS
        assert rows[number] == (last - stage.first) * stage.batch_size


@pytest.mark.parametrize("seed", range(10))
def test_any_process_begins_anywhere(seed):
    """20 interruptions: a new order gives the same rows from any step on. Later stages do not change the past, earlier rows
    being those of the stages that had begun.
    """
    random = np.random.default_rng(seed)
    stages = random_stages(random, [4, 16, 8], 2)
    counts = [5, 9]
    whole = list(rows_of(StageOrder(stages, counts, 16, 1), stages, 0, STEPS))
    cuts = [0, *sorted(random.choice(np.arange(1, STEPS), 20, replace=False).tolist()), STEPS]
    parts = [rows_of(StageOrder(stages, counts, 16, 1), stages, a, b) for a, b in itertools.pairwise(cuts)]
    assert list(itertools.chain(*parts)) == whole
    for begun in (1, 2):
        past = rows_of(StageOrder(stages[:begun], counts, 16, 1), stages[:begun], 0, stages[begun].first)
        assert list(past) == whole[: len(list(rows_of(StageOrder(stages, counts, 16, 1), stages, 0, stages[begun].first)))]


@pytest.mark.parametrize("lengths", [(16,), (4,), (4, 16)])
def test_a_source_in_order_is_read_as_it_lies(lengths):
    """Beside a shuffled one, through a change of the length, and the same in the next epoch."""
    stages = [Draws(5 * i, 4, (1.0, 1.0), length) for i, length in enumerate(lengths)]
    order = StageOrder(stages, [5, 7], 16, 0, (True, False))
    found = [span for _, source, spans in rows_of(order, stages, 0, 20) for span in spans if source == 0]
    places = [
        place for span in found for place in range(span.block * 16 + span.start, span.block * 16 + span.start + span.length)
    ]
    assert places == [i % 80 for i in range(len(places))]
    assert len(places) > 80


def test_rows_of_a_stage_are_mixed_and_then_whole():
    """Short rows come from all blocks of a round; after a change to long rows, what is left of a block is joined."""
    stages = [Draws(0, 1, (1.0,), 2), Draws(7, 1, (1.0,), 16)]
    order = StageOrder(stages, [6], 16, 0)
    short = [order.rows(batch, range(1))[0][1] for batch in range(7)]
    assert len({span.block for (span,) in short}) == 3
    joined, after = (
        [order.rows(batch, range(1))[0][1] for batch in (7, 8, 9)],
        [order.rows(batch, range(1))[0][1] for batch in (10, 11)],
    )
    assert sum(span.length for spans in joined for span in spans) == 3 * 16 - 7 * 2
    assert {span.length for spans in joined for span in spans} - {2}
    assert [len(spans) for spans in after] == [1, 1]
    assert {spans[0].start for spans in after} == {0}


def test_stages_of_one_length_are_read_like_a_run_without_stages():
    """Other weights and batches alone move no window to another place in its source's order."""
    plain = StageOrder([Draws(0, 4, (1.0,), 8)], [11], 8, 3)
    staged = StageOrder([Draws(0, 4, (1.0,), 8), Draws(5, 2, (1.0,), 8)], [11], 8, 3)
    before = [row for batch in range(10) for row in plain.rows(batch, range(4))]
    after = [row for batch in range(5) for row in staged.rows(batch, range(4))]
    after += [row for batch in range(5, 15) for row in staged.rows(batch, range(2))]
    assert after == before
