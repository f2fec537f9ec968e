"""The exchange of rows against a simulation of `ragged_all_to_all`, which no CPU has; capacity against counting by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtrain.config import MeshConfig
from jaxtrain.layout import room_of_expert
from jaxtrain.mesh import make_mesh
from jaxtrain.ops.expert_dispatch import dispatch_capacity, exchange, plan_exchange, take_rows
from jaxtrain.sharding import vary

DEVICES, LOCAL, ROOM, WIDTH = 4, 2, 6, 3


def plans(counts):
    """Every device's plan, as numpy."""
    whole = [plan_exchange(jnp.asarray(counts), me) for me in range(DEVICES)]
    return [jax.tree.map(np.asarray, plan) for plan in whole]


def simulated(rows, plans, length):
    """What the definition of `lax.ragged_all_to_all` says: each device writes its slices into the others' outputs."""
    output = np.zeros((DEVICES, length, WIDTH), np.float32)
    for source, plan in enumerate(plans):
        for target in range(DEVICES):
            size, start, landing = plan.send_sizes[target], plan.send_starts[target], plan.landing_starts[target]
            assert size == plans[target].receive_sizes[source]
            output[target, landing : landing + size] = rows[source, start : start + size]
    return output


@pytest.mark.parametrize("seed", range(3))
def test_the_padded_exchange_is_the_ragged_one_there_and_back(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, ROOM // LOCAL + 1, (DEVICES, DEVICES, LOCAL)).astype(np.int32)
    counts[1, 2] = 0
    sent, length = DEVICES * ROOM, DEVICES * ROOM + 1
    rows = rng.normal(size=(DEVICES, sent, WIDTH)).astype(np.float32)
    gradient = rng.normal(size=(DEVICES, length, WIDTH)).astype(np.float32)

    def region(rows, gradient, counts):
        rows, gradient, counts = vary((rows[0], gradient[0], counts))
        plan = plan_exchange(counts, jax.lax.axis_index("expert"))
        received, transpose = jax.vjp(lambda rows: exchange(length, ROOM, False, rows, plan), rows)
        back = exchange(sent, ROOM, False, received, plan.reversed())
        return received[None], transpose(gradient)[0][None], back[None]

    mesh = make_mesh(MeshConfig(fsdp=1, expert=DEVICES), jax.devices()[:DEVICES])
    lead = P(("replica", "pipe", "data", "fsdp", "expert", "context", "tensor"))
    step = jax.jit(jax.shard_map(region, mesh=mesh, in_specs=(lead, lead, P()), out_specs=lead))
    got = step.lower(rows, gradient, counts).compile()(rows, gradient, counts)
    there = plans(counts)
    back = [plan.reversed() for plan in there]
    np.testing.assert_array_equal(got[0], simulated(rows, there, length))
    np.testing.assert_array_equal(got[1], simulated(gradient, back, sent))
    meant = np.arange(sent) < counts.sum((1, 2))[:, None]
    np.testing.assert_array_equal(got[2], np.where(meant[..., None], rows, 0))


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
