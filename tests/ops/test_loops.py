"""A loop of hidden length against `lax.scan`, and what a reader of the program sees of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxtrain.config import MESH_AXES
from jaxtrain.ops.loops import scan_of_hidden_length
from jaxtrain.program.hlo import matmul_flops
from jaxtrain.sharding import sum_over, vary

WIDTH = 4


def program(scan, length: int, times: int):
    """Compile a loop of products inside of a loop, as that over chunks of the loss is inside of that over microbatches."""

    def step(carry, x):
        carry = jnp.tanh(carry @ x["by"]) + x["more"]
        return carry, (carry[0], {"sum": carry.sum()})

    def region(start, xs):
        def outer(carry, _):
            carry, ys = scan(step, carry, xs)
            return carry, ys

        carry, ys = outer(*vary((start, xs))[:1], None) if times == 1 else scan(outer, vary(start), jnp.arange(times))
        return jax.tree.map(lambda y: sum_over(y, MESH_AXES), (carry, ys))

    mesh = Mesh(np.array(jax.devices()[:1]).reshape((1,) * 7), MESH_AXES, axis_types=(AxisType.Auto,) * 7)
    rng = np.random.default_rng(length)
    xs = {"by": rng.normal(size=(length, WIDTH, WIDTH)).astype(np.float32), "more": np.arange(length, dtype=np.float32)}
    arguments = rng.normal(size=(WIDTH, WIDTH)).astype(np.float32), xs
    mapped = jax.jit(jax.shard_map(region, mesh=mesh, in_specs=(P(), P()), out_specs=P()))
    return mapped.lower(*arguments).compile(), arguments


@pytest.mark.parametrize(("length", "times"), [(1, 1), (5, 1), (5, 3)])
def test_it_is_a_scan_whose_length_is_hidden(length: int, times: int):
    (hidden, arguments), (known, _) = (program(scan, length, times) for scan in (scan_of_hidden_length, lax.scan))
    jax.tree.map(np.testing.assert_array_equal, hidden(*arguments), known(*arguments))
    assert matmul_flops(hidden.as_text()) == matmul_flops(known.as_text()) == times * length * 2 * WIDTH**3
