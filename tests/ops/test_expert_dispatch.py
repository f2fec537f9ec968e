"""The exchange of rows against a simulation of `ragged_all_to_all`, which no CPU has; capacity against counting by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtrain.config import MeshConfig
from jaxtrain.layout import padded_rows, room_of_expert
from jaxtrain.mesh import make_mesh
from jaxtrain.ops.expert_dispatch import (
    ExpertBackend,
    _fitting,
    dispatch_capacity,
    dispatch_dropless,
    exchange,
    plan_exchange,
    take_rows,
)
from jaxtrain.sharding import vary

DEVICES, LOCAL, ROOM, WIDTH = 4, 2, 6, 3


def plans(counts, kept, tile):
    """Every device's plan, as numpy."""
    whole = [plan_exchange(jnp.asarray(counts), jnp.asarray(kept), tile, me) for me in range(DEVICES)]
    return [jax.tree.map(np.asarray, plan) for plan in whole]


def simulated(rows, plans, length):
    """What the definition of `lax.ragged_all_to_all` says: each device writes its slices into the others' outputs."""
    output = np.zeros((DEVICES, length, WIDTH), np.float32)
    for source, plan in enumerate(plans):
        for segment, (size, start, landing) in enumerate(
            zip(plan.send_sizes, plan.send_starts, plan.landing_starts, strict=True)
        ):
            target, of_expert = divmod(segment, LOCAL)
            assert size == plans[target].receive_sizes[source * LOCAL + of_expert]
            output[target, landing : landing + size] = rows[source, start : start + size]
    return output


@pytest.mark.parametrize(("seed", "tile", "rows_taken"), [(0, 1, None), (1, 4, None), (2, 4, 9)])
def test_the_padded_exchange_is_the_ragged_one_there_and_back(seed, tile, rows_taken):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, ROOM // LOCAL + 1, (DEVICES, DEVICES, LOCAL)).astype(np.int32)
    counts[1, 2] = 0
    kept = counts if rows_taken is None else np.asarray(_fitting(jnp.asarray(counts), rows_taken))
    sent, length = DEVICES * ROOM, padded_rows(DEVICES * ROOM, LOCAL, tile) + 1
    rows = rng.normal(size=(DEVICES, sent, WIDTH)).astype(np.float32)
    gradient = rng.normal(size=(DEVICES, length, WIDTH)).astype(np.float32)

    def region(rows, gradient, counts, kept):
        rows, gradient, counts, kept = vary((rows[0], gradient[0], counts, kept))
        plan = plan_exchange(counts, kept, tile, jax.lax.axis_index("expert"))
        received, transpose = jax.vjp(lambda rows: exchange(length, ROOM, False, rows, plan), rows)
        back = exchange(sent, ROOM, False, received, plan.reversed())
        return received[None], transpose(gradient)[0][None], back[None]

    mesh = make_mesh(MeshConfig(fsdp=1, expert=DEVICES), jax.devices()[:DEVICES])
    lead = P(("replica", "pipe", "data", "fsdp", "expert", "context", "tensor"))
    step = jax.jit(jax.shard_map(region, mesh=mesh, in_specs=(lead, lead, P(), P()), out_specs=lead))
    got = step.lower(rows, gradient, counts, kept).compile()(rows, gradient, counts, kept)
    there = plans(counts, kept, tile)
    back = [plan.reversed() for plan in there]
    np.testing.assert_array_equal(got[0], simulated(rows, there, length))
    np.testing.assert_array_equal(got[1], simulated(gradient, back, sent))
    meant = np.zeros((DEVICES, sent), bool)
    for source, plan in enumerate(there):
        for start, size in zip(plan.send_starts, plan.send_sizes, strict=True):
            meant[source, start : start + size] = True
        slots = {
            slot
            for first, size in zip(plan.receive_starts, plan.receive_sizes, strict=True)
            for slot in range(first, first + size)
        }
        assert len(slots) == kept[:, source].sum() <= (rows_taken or sent)
    np.testing.assert_array_equal(got[2], np.where(meant[..., None], rows, 0))


@pytest.mark.parametrize("seed", range(4))
def test_what_fits_is_as_much_as_possible_and_as_even_as_possible(seed):
    """Against raising one level by one row at a time; a level that no expert reaches leaves all rows."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 9, (DEVICES, DEVICES, 5)).astype(np.int32)
    counts[:, 0], counts[:, 1, 1:] = 0, 0
    for rows in (1, 17, 60, 1000):
        kept = np.asarray(_fitting(jnp.asarray(counts), rows))
        for target in range(DEVICES):
            whole = counts[:, target].sum(0)
            level = max(c for c in range(whole.max() + 1) if np.minimum(whole, c).sum() <= rows)
            np.testing.assert_array_equal(kept[:, target].sum(0), np.minimum(whole, level))
            before = np.cumsum(counts[:, target], 0) - counts[:, target]
            np.testing.assert_array_equal(kept[:, target], np.clip(level - before, 0, counts[:, target]))


def test_dropped_rows_are_those_beyond_the_buffer_and_add_nothing():
    """Every token wants expert 0 of 4 on 2 devices, then its own: of 2 x 8 rows a device with factor 1 takes 8."""
    tokens, experts = 8, np.stack([np.zeros(16), np.arange(16) % 3 + 1], 1).astype(np.int32)
    x = np.random.default_rng(0).normal(size=(16, WIDTH)).astype(np.float32)

    def region(x, experts, factor):
        x, experts = vary((x, experts))
        found = dispatch_dropless(x, experts, 4, ExpertBackend(ragged=False, tile=1), factor)
        y, pull = jax.vjp(lambda x: dispatch_dropless(x, experts, 4, ExpertBackend(False, 1), factor).rows, x)
        return found.back(found.rows), found.kept_TK, pull(y)[0], vary(jnp.full(1, found.rows.shape[0]))

    mesh = make_mesh(MeshConfig(fsdp=1, expert=2), jax.devices()[:2])
    lead = P("expert")
    for factor in (0.0, 1.0):
        step = jax.shard_map(
            functools.partial(region, factor=factor), mesh=mesh, in_specs=lead, out_specs=lead, check_vma=False
        )
        back, kept, gradient, rows = map(np.asarray, jax.jit(step)(x, experts))
        np.testing.assert_array_equal(back, np.where(kept[..., None], x[:, None], 0))
        np.testing.assert_allclose(gradient, x * kept.sum(1, keepdims=True), rtol=1e-6)
        assert (rows == (2 * tokens if factor else 4 * tokens)).all()
        if factor:
            # Device 0 has 16 rows of expert 0 and 6 of expert 1 for 16 places; device 1 has 10 rows.
            assert kept[:, 1].all()
            assert kept[:, 0].sum() == 10
            assert kept[:8, 0].all()
        else:
            assert kept.all()


def test_taking_rows_is_undone_by_its_transpose():
    x = jnp.arange(8.0).reshape(4, 2)
    index, inverse = jnp.array([2, -1, 0]), jnp.array([2, -1, 0, -1])
    y, vjp = jax.vjp(lambda x: take_rows(x, index, inverse), x)
    np.testing.assert_array_equal(y, [[4, 5], [0, 0], [0, 1]])
    np.testing.assert_array_equal(vjp(y)[0], [[0, 1], [0, 0], [4, 5], [0, 0]])


def test_room_is_rounded_up_and_never_more_than_the_tokens():
    assert room_of_expert(10, 2, 8, 1.0) == 3
    assert room_of_expert(10, 2, 8, 1.25) == 4
    assert room_of_expert(4, 2, 8, 100.0) == 4


def test_first_choices_are_placed_before_second_ones():
    """Room for two rows: expert 0 is the second choice of tokens 0 and 1, and the first of 2 and 3, which take it."""
    experts = jnp.array([[1, 0], [2, 0], [0, 3], [0, 3]], jnp.int32)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])

    def region(experts):
        dispatched = dispatch_capacity(jnp.arange(4.0)[:, None], experts, 4, group=4, capacity_factor=1.0)
        return dispatched.rows, dispatched.kept_TK

    rows, kept = jax.shard_map(region, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)(experts)
    np.testing.assert_array_equal(kept, [[True, False], [True, False], [True, True], [True, True]])
    np.testing.assert_array_equal(rows[0, :, 0], [2, 3])
    np.testing.assert_array_equal(rows[3, :, 0], [2, 3])
