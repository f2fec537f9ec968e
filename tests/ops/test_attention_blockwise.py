"""Blockwise attention: what it costs, the pieces that ring attention needs, and that it lives in the manual region."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxtrain.ops.attention import attention
from jaxtrain.ops.attention_blockwise import (
    block_attention,
    block_gradients,
    block_pairs,
    blockwise_attention,
    merge_blocks,
    pick_block_size,
)
from jaxtrain.ops.attention_mask import Rule

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def draw(seed, batch, length, dtype=np.float32):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, length, HEADS, HEAD_DIM)).astype(dtype)
    k, v = (rng.normal(size=(batch, length, KV_HEADS, HEAD_DIM)).astype(dtype) for _ in range(2))
    segments = np.sort(rng.integers(1, 4, (batch, length)), axis=1).astype(np.int32)
    return q, k, v, segments


def relative(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def dot_flops(jaxpr) -> int:
    """2 m n k of every matmul that a program runs, those in a scan times its length."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[d] for d in contracted)
        for inner in jaxprs_in_params(equation.params):
            total += times * dot_flops(inner)
    return total


def gradient(backend, **options):
    def loss(q, k, v, segments):
        return attention(q, k, v, backend=backend, segments_BL=segments, **options).astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))


def shapes(length):
    q, kv = ((1, length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS))
    return [jax.ShapeDtypeStruct(s, jnp.float32) for s in (q, kv, kv)] + [jax.ShapeDtypeStruct((1, length), jnp.int32)]


def test_memory_grows_with_the_length_not_its_square():
    def bytes_at(backend, length):
        return jax.jit(gradient(backend)).lower(*shapes(length)).compile().memory_analysis().temp_size_in_bytes

    assert bytes_at("blockwise", 8192) / bytes_at("blockwise", 2048) < 4.1  # both with blocks of 512
    assert bytes_at("reference", 4096) / bytes_at("reference", 1024) > 12


@pytest.mark.parametrize("length", [1024, 4096, 5000])
def test_flops_are_those_of_the_lower_triangle(length):
    num_blocks = math.ceil(length / pick_block_size(length))
    triangle = 2 * HEADS * HEAD_DIM * pick_block_size(length) ** 2 * num_blocks * (num_blocks + 1) // 2
    forward = jax.make_jaxpr(functools.partial(attention, backend="blockwise"))(*shapes(length)[:3]).jaxpr
    both = jax.make_jaxpr(gradient("blockwise"))(*shapes(length)).jaxpr
    assert dot_flops(forward) == 2 * triangle
    assert dot_flops(both) == (2 + 5) * triangle  # backward: the scores again, dV, dP, dQ, dK
    assert triangle < 0.66 * 2 * HEADS * HEAD_DIM * length**2


def test_program_size_does_not_grow_with_the_length():
    def operations(jaxpr):
        return len(jaxpr.eqns) + sum(operations(inner) for e in jaxpr.eqns for inner in jaxprs_in_params(e.params))

    program = jax.make_jaxpr(gradient("blockwise"))
    assert operations(program(*shapes(16384)).jaxpr) == operations(program(*shapes(2048)).jaxpr)


@pytest.mark.parametrize(
    ("length", "block"), [(1, 1), (100, 100), (256, 128), (512, 128), (1000, 256), (2048, 512), (9000, 512)]
)
def test_block_sizes(length, block):
    assert pick_block_size(length) == block


def test_the_pairs_are_the_lower_triangle():
    pairs = block_pairs(5, 4, Rule())
    assert sorted(map(tuple, pairs)) == [(i, j) for i in range(5) for j in range(i + 1)]


def test_blocks_merge_in_any_order_and_rows_that_see_nothing_vanish():
    order = [2, 0, 1]
    rng = np.random.default_rng(0)
    q, do = (jnp.asarray(rng.normal(size=(1, 2, 3, 4, 8)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(1, 2, 12, 8)), jnp.float32) for _ in range(2))
    visible = rng.random((4, 12)) < 0.5
    visible[0, :8] = visible[1, 4:] = False  # whole blocks of which a row sees nothing
    visible[:, 5] = [False, False, True, True]
    visible[0, 9] = visible[1, 2] = True
    whole, logsumexp = block_attention(q, k, v, visible)
    cut = [slice(4 * j, 4 * j + 4) for j in order]
    parts = [block_attention(q, k[:, :, c], v[:, :, c], visible[:, c]) for c in cut]
    o, total = functools.reduce(lambda a, b: merge_blocks(*a, *b), parts)
    assert relative(o, whole) < 1e-6
    assert relative(total, logsumexp) < 1e-6
    delta = jnp.sum(do * whole, axis=-1)
    expected = jax.vjp(lambda q, k, v: block_attention(q, k, v, visible)[0], q, k, v)[1](do)
    gradients = [block_gradients(q, k[:, :, c], v[:, :, c], do, logsumexp, delta, visible[:, c]) for c in cut]
    assert relative(sum(g[0] for g in gradients), expected[0]) < 1e-5
    for n in (1, 2):
        joined = jnp.concatenate([g[n] for _, g in sorted(zip(order, gradients, strict=True), key=lambda x: x[0])], axis=2)
        assert relative(joined, expected[n]) < 1e-5


def saved_by(policy, residual_name, length=32):
    def loss(q, k, v):
        return jnp.sum(blockwise_attention(q, k, v, block_size=8, residual_name=residual_name) ** 2)

    def layer(q, k, v):  # something after it, so that its output is needed again
        return jax.checkpoint(loss, policy=policy)(q, k, v)

    return jax.make_jaxpr(jax.grad(layer, (0, 1, 2)))(*(jnp.asarray(x) for x in draw(0, 1, length)[:3])).jaxpr


def test_saving_by_name_spares_the_second_forward():
    """Matmuls in units of one score block product: forward 2, backward 5, and 2 more where remat repeats the forward."""
    pairs = len(block_pairs(4, 8, Rule()))
    unit = 2 * HEADS * HEAD_DIM * 8 * 8 * pairs
    named = jax.checkpoint_policies.save_only_these_names("attention")
    assert dot_flops(saved_by(named, "attention")) == 7 * unit
    assert dot_flops(saved_by(named, None)) == 9 * unit
    assert dot_flops(saved_by(jax.checkpoint_policies.nothing_saveable, "attention")) == 9 * unit


def largest_array(jaxpr) -> int:
    own = max((math.prod(v.aval.shape) for e in jaxpr.eqns for v in e.outvars), default=0)
    inner = [largest_array(j) for e in jaxpr.eqns for j in jaxprs_in_params(e.params)]
    return max([own, *inner])


@pytest.mark.parametrize("policy", ["dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable"])
def test_a_policy_that_saves_matmuls_does_not_save_score_blocks(policy):
    length = 64
    assert largest_array(saved_by(getattr(jax.checkpoint_policies, policy), "attention", length)) < HEADS * length**2 / 2


def layers(q, k, v, segments, backend, policy):
    """Three attention layers under scan and remat, as the model runs them."""

    def layer(x, scale):
        return attention(x * scale, k, v, backend=backend, segments_BL=segments, residual_name="attention"), None

    layer = jax.checkpoint(layer, policy=policy)
    return jnp.sum(jax.lax.scan(layer, q, jnp.arange(1.0, 4.0))[0] ** 2)


@functools.cache
def layers_on_one_device():
    """The loss and gradients that the manual region must give."""
    return jax.value_and_grad(layers, (0, 1, 2))(*draw(4, 4, 70), "reference", None)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.save_only_these_names("attention")])
def test_inside_the_manual_region_with_scan_remat_and_gradients(backend, policy):
    q, k, v, segments = draw(4, 4, 70)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "tensor", "pipe"), axis_types=(AxisType.Auto,) * 3)
    heads, rows = P("data", None, "tensor"), P("data")

    def local(q, k, v, segments):
        # Queries vary over pipe too, as activations do in a pipeline; keys, values and segments do not.
        varying = jax.lax.pcast(q, "pipe", to="varying")
        loss, gradients = jax.value_and_grad(layers, (0, 1, 2))(varying, k, v, segments, backend, policy)
        dq, dk, dv = gradients
        return jax.lax.psum(loss, ("data", "tensor", "pipe")) / 2, jax.lax.psum(dq, "pipe") / 2, dk / 2, dv / 2

    manual = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=(P(), heads, heads, heads), check_vma=True
        )
    )
    loss, *gradients = manual(q, k, v, segments)
    expected_loss, expected = layers_on_one_device()
    assert abs(loss / expected_loss - 1) < 1e-6
    for g, e in zip(gradients, expected, strict=True):
        assert relative(g, e) < 1e-5
