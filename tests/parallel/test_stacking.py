"""How layers lie in memory: any cut keeps their order, loses none, and leaves zeros where it holds nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.parallel.stacking import Stacking


@st.composite
def stackings(draw) -> Stacking:
    stages, chunks = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    return Stacking(draw(st.integers(stages * chunks, 60)), stages, chunks, folded=draw(st.booleans()))


def in_order(stacking: Stacking, by_stage: np.ndarray) -> np.ndarray:
    """[chunks, stages, ...] -> [part, ...]: odd chunks of a folded stack begin at the last stage."""
    chunks = [chunk[::-1] if stacking.folded and i % 2 else chunk for i, chunk in enumerate(by_stage)]
    return np.concatenate(chunks)


@given(stackings())
def test_counts(stacking: Stacking):
    counts = stacking.counts()
    assert counts.shape == (stacking.chunks, stacking.stages)
    assert counts.sum() == stacking.num_layers
    assert counts.max() - counts.min() <= 1
    assert counts.max() == stacking.layers_per_part
    assert stacking.is_even == (counts.min() == counts.max())


@given(stackings())
def test_the_outermost_parts_are_spared_first(stacking: Stacking):
    """The last part, which does the loss, then the first, which embeds, and so on inward."""
    counts = in_order(stacking, stacking.counts())
    parts = len(counts)
    order = [part for i in range(parts) for part in (parts - 1 - i, i)]
    spared = sum(counts < stacking.layers_per_part)
    assert set(np.flatnonzero(counts < stacking.layers_per_part)) == set(list(dict.fromkeys(order))[:spared])


@settings(max_examples=25, deadline=None)
@given(stackings())
def test_round_trip(stacking: Stacking):
    """Part p = chunk * stages + stage holds the next counts[p] layers in its first slots, and zeros in the rest."""
    canonical = np.random.default_rng(0).normal(size=(stacking.num_layers, 2, 3)).astype(np.float32)
    stacked = np.asarray(stacking.stack(canonical))
    assert stacked.shape == (*stacking.shape, 2, 3)
    assert np.array_equal(np.asarray(stacking.unstack(stacked)), canonical)
    parts = in_order(stacking, stacked)
    start = 0
    for part, count in zip(parts, in_order(stacking, stacking.counts()), strict=True):
        assert np.array_equal(part[:count], canonical[start : start + count])
        assert not part[count:].any()
        start += count


@given(stackings())
def test_slots_are_the_held_ones_in_order(stacking: Stacking):
    slots = stacking.layer_slots()
    assert len(set(slots.tolist())) == stacking.num_layers
    assert np.array_equal(stacking.layer_numbers().ravel()[slots], np.arange(stacking.num_layers))
    part_of_layer = slots // stacking.layers_per_part
    assert np.array_equal(np.bincount(part_of_layer, minlength=stacking.stages * stacking.chunks), stacking.counts().ravel())


@pytest.mark.parametrize("stages", range(1, 6))
def test_an_even_cut_is_a_reshape(stages: int):
    stacking = Stacking(12 * stages, stages, 3)
    canonical = np.arange(12 * stages)[:, None]
    assert np.array_equal(np.asarray(stacking.stack(canonical)), canonical.reshape(3, stages, 4, 1))


def test_the_worked_example():
    """100 layers in 10 parts on 5 nodes: node i holds layers 10 i to 10 i + 9 (part i) and 50 on from there (part i + 5)."""
    stacking = Stacking(100, stages=5, chunks=2)
    stacked = np.asarray(stacking.stack(np.arange(100)[:, None]))[..., 0]
    for node in range(5):
        assert stacked[0, node].tolist() == list(range(10 * node, 10 * node + 10))
        assert stacked[1, node].tolist() == list(range(50 + 10 * node, 60 + 10 * node))
