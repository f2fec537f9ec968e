"""The order of the samples is grain's, element for element: its MapDataset is the oracle."""

import sys

import numpy as np
import pytest

from jaxtrain.data.order import AT_ONCE, FEW_WINDOWS, Order, shuffle_seed, take_turns
from jaxtrain.data.permutation import permuted

grain = pytest.importorskip("grain")
FAR = 10**12 + 7


@pytest.mark.parametrize("count", [FEW_WINDOWS, 65_536, 65_537, 65_538, 2**20 + 3, 2**31 - 1, 2**33 + 7])
@pytest.mark.parametrize("start", [0, 65_500, FAR])
def test_a_source_is_shuffled_as_grain_does(count, start):
    theirs = grain.MapDataset.range(count).shuffle(seed=shuffle_seed(5, 0)).repeat()
    ours = Order([count], [1.0], seed=5).stretch(start, start + 100)
    assert ours == [(0, theirs[place]) for place in range(start, start + 100)]


@pytest.mark.parametrize("weights", [[1, 1], [1, 2.5, 0.37], [0.001, 2000.5, 1e4], [1e9, 1]])
@pytest.mark.parametrize("start", [0, AT_ONCE - 50, FAR, 10**17])
def test_sources_take_turns_as_in_grains_mixture(weights, start):
    def turns(source):
        return grain.MapDataset.range(sys.maxsize).map(lambda place: (source, place))

    theirs = grain.MapDataset.mix([turns(source) for source in range(len(weights))], weights)
    order = Order([1] * len(weights), weights, seed=0)
    sources, places = take_turns(order.shares, start, 100)
    assert list(zip(sources.tolist(), places.tolist(), strict=True)) == [theirs[start + i] for i in range(100)]


def test_a_stretch_is_its_elements_one_by_one():
    order = Order([5, 3000], [1, 2], seed=1)
    assert order.stretch(AT_ONCE - 3, 2 * AT_ONCE + 3) == [order[i] for i in range(AT_ONCE - 3, 2 * AT_ONCE + 3)]
    assert order.stretch(7, 7) == []


@pytest.mark.parametrize("count", [1, 2, 1000, 70_000])
def test_every_element_has_one_place(count):
    assert sorted(permuted(np.arange(count), count, seed=2**32 - 1).tolist()) == list(range(count))
