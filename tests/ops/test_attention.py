"""The attention backends against softmax(Q K^T / sqrt(d_k)) V written out in numpy float64, and the choice of backend."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxtrain.errors import ExplainedError
from jaxtrain.jax_private import fused_attention
from jaxtrain.ops.attention import BLOCKWISE_FROM_LENGTH, attention, choose_backend, cudnn_attention
from jaxtrain.ops.attention_blockwise import blockwise_attention
from jaxtrain.ops.attention_mask import CAUSAL, Rule

TOLERANCE = 1e-5


def oracle(q_BLHN, k_BLKN, v_BLKM, do_BLHM, segments_BL, rule=CAUSAL, sinks_H=None):
    """Output and gradients of attention, a query and a head at a time, float64; with sinks their gradient too."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q_BLHN, k_BLKN, v_BLKM, do_BLHM))
    o, dq, dk, dv = np.zeros_like(do), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    batch, length, heads, head_dim = q.shape
    group, window, factor = heads // k.shape[2], rule.window or length, rule.scale or 1 / np.sqrt(head_dim)
    sinks = np.full(heads, -np.inf) if sinks_H is None else np.asarray(sinks_H, np.float64)
    d_sinks = np.zeros(heads)
    for b, h, i in np.ndindex(batch, heads, length):
        seen = [j for j in range(max(0, i - window + 1), i + 1) if segments_BL[b, j] == segments_BL[b, i]]
        keys, values = k[b, seen, h // group], v[b, seen, h // group]
        scores, slope = keys @ q[b, i, h] * factor, 1.0
        if rule.softcap:
            slope = 1 / np.cosh(scores / rule.softcap) ** 2
            scores = rule.softcap * np.tanh(scores / rule.softcap)
        largest = max(scores.max(), sinks[h])
        weights, at_sink = np.exp(scores - largest), np.exp(sinks[h] - largest)
        total = weights.sum() + at_sink
        weights /= total
        o[b, i, h] = weights @ values
        d_weights = values @ do[b, i, h]
        d_sinks[h] -= at_sink / total * (weights @ d_weights)
        d_scores = weights * (d_weights - weights @ d_weights) * slope * factor
        dq[b, i, h] = d_scores @ keys
        dk[b, seen, h // group] += np.outer(d_scores, q[b, i, h])
        dv[b, seen, h // group] += np.outer(weights, do[b, i, h])
    return (o, dq, dk, dv) if sinks_H is None else (o, dq, dk, dv, d_sinks)


def relative(actual, expected):
    difference = np.linalg.norm(np.asarray(actual, np.float64) - expected)
    return difference / max(np.linalg.norm(expected), 1e-30)


def ragged_segments(rng, batch, length):
    """Documents of random lengths, numbered from 1, then padding (0) of random length."""
    segments = np.zeros((batch, length), np.int32)
    for row in segments:
        end = rng.integers(1, length + 1)
        cuts = np.sort(rng.integers(0, end, rng.integers(0, 4)))
        row[:end] = 1 + np.searchsorted(cuts, np.arange(end), side="right")
    return segments


def draw(seed, batch, length, heads, kv_heads, head_dim, dtype=np.float32):
    rng = np.random.default_rng(seed)
    q, do = (rng.normal(size=(batch, length, heads, head_dim)).astype(dtype) for _ in range(2))
    k, v = (rng.normal(size=(batch, length, kv_heads, head_dim)).astype(dtype) for _ in range(2))
    return (q, k, v, do), ragged_segments(rng, batch, length)


@functools.partial(jax.jit, static_argnames=("backend", "block_size"))
def with_gradients(q, k, v, do, segments, backend, block_size=None):
    """(output, dq, dk, dv) of a backend."""
    if backend == "blockwise":
        compute = functools.partial(blockwise_attention, segments_BL=segments, block_size=block_size)
    else:
        compute = functools.partial(attention, backend=backend, segments_BL=segments)
    o, pull = jax.vjp(compute, q, k, v)
    return o, *pull(do)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    backend=st.sampled_from(["reference", "blockwise"]),
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 2, 7, 16, 29]),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6, 8]),
    block_size=st.sampled_from([1, 4, 8, 64]),
)
def test_matches_the_formula_with_gradients(backend, seed, batch, length, kv_heads, group, head_dim, block_size):
    arrays, segments = draw(seed, batch, length, kv_heads * group, kv_heads, head_dim)
    actual = with_gradients(*arrays, segments, backend, block_size if backend == "blockwise" else None)
    for name, a, e in zip(("o", "dq", "dk", "dv"), actual, oracle(*arrays, segments), strict=True):
        assert np.isfinite(a).all()
        # A sequence of one token, or of one-token documents, has no gradient in q and k: the norm to compare with is 0.
        assert relative(a, e) < TOLERANCE or np.abs(a - e).max() < 1e-6, name


@pytest.mark.parametrize(("backend", "window"), [("reference", 5), ("blockwise", 1), ("blockwise", 5), ("blockwise", 12)])
def test_a_window_and_values_of_their_own_width(backend, window):
    (q, k, v, do), segments = draw(7, 2, 29, 4, 2, 6)
    rng = np.random.default_rng(8)
    v, do = (rng.normal(size=(2, 29, h, 4)).astype(np.float32) for h in (2, 4))
    if backend == "blockwise":
        compute = functools.partial(blockwise_attention, segments_BL=segments, rule=Rule(window=window), block_size=4)
    else:
        compute = functools.partial(attention, backend=backend, segments_BL=segments, rule=Rule(window=window))
    o, pull = jax.vjp(compute, q, k, v)
    expected = oracle(q, k, v, do, segments, Rule(window=window))
    for name, a, e in zip(("o", "dq", "dk", "dv"), (o, *pull(do)), expected, strict=True):
        assert relative(a, e) < TOLERANCE or np.abs(a - e).max() < 1e-6, name


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("rule", [Rule(scale=0.9, softcap=1.5), Rule(window=6, softcap=0.7), Rule(scale=0.1)])
def test_sinks_scale_and_bound_of_the_scores(backend, rule):
    (q, k, v, do), segments = draw(9, 2, 150, 4, 2, 6)
    sinks = np.random.default_rng(10).normal(size=4).astype(np.float32)

    def compute(q, k, v, sinks):
        return attention(q, k, v, backend=backend, rule=rule, segments_BL=segments, sinks_H=sinks)

    o, pull = jax.vjp(compute, q, k, v, sinks)
    expected = oracle(q, k, v, do, segments, rule, sinks)
    for name, a, e in zip(("o", "dq", "dk", "dv", "dsinks"), (o, *pull(do)), expected, strict=True):
        assert relative(a, e) < TOLERANCE, name


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_without_segments_it_is_one_document(backend):
    arrays, _ = draw(0, 2, 19, 4, 2, 8)
    actual = with_gradients(*arrays, None, backend)
    for a, e in zip(actual, oracle(*arrays, np.ones((2, 19), np.int32)), strict=True):
        assert relative(a, e) < TOLERANCE


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_huge_logits_stay_finite_and_padding_does_not_leak(backend):
    (q, k, v, do), segments = draw(1, 2, 24, 2, 1, 8)
    segments[0, 10:] = 0
    segments[1] = 0  # a row of nothing but padding
    q = q * 1e4
    first = with_gradients(q, k, v, do, segments, backend, 8 if backend == "blockwise" else None)
    assert all(np.isfinite(x).all() for x in first)
    k[0, 10:], v[0, 10:] = 1e4, -1e4
    second = with_gradients(q, k, v, do, segments, backend, 8 if backend == "blockwise" else None)
    np.testing.assert_array_equal(first[0][0, :10], second[0][0, :10])


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_bfloat16_keeps_its_dtype_and_a_float32_softmax(backend):
    arrays, segments = draw(2, 1, 33, 2, 1, 16)
    arrays = tuple(jnp.asarray(x, jnp.bfloat16) for x in arrays)
    actual = with_gradients(*arrays, segments, backend)
    for a, e in zip(actual, oracle(*(np.asarray(x, np.float64) for x in arrays), segments), strict=True):
        assert a.dtype == jnp.bfloat16
        assert relative(a, e) < 1e-2


def test_shapes_and_names_are_checked():
    (q, k, v, _), _ = draw(0, 1, 4, 3, 2, 4)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k, v, backend="reference")
    with pytest.raises(ValueError, match="did you mean 'reference'"):
        attention(q[:, :, :2], k, v, backend="referense")


def test_keys_and_values_are_never_repeated():
    """No array of the program is [.., H, N] over all keys except what the queries themselves need."""
    (q, k, v, _), segments = draw(0, 1, 32, 6, 1, 4)
    for backend in ("reference", "blockwise"):
        text = str(jax.make_jaxpr(functools.partial(attention, backend=backend))(q, k, v, segments_BL=segments))
        assert "concatenate" not in text
        assert not any("broadcast_in_dim" in line and "1,32,6,4" in line for line in text.splitlines()), backend


CHOICE = {"platform": "gpu", "dtype": "bfloat16", "head_dim": 128, "sequence_length": 4096, "masks_documents": True}


@pytest.mark.parametrize(
    ("change", "expected", "reason"),
    [
        ({}, "cudnn_dense", "masks as a dense array"),
        ({"compute_capability": 9.0}, "cudnn", "in its packed layout"),
        ({"platform": "cpu"}, "blockwise", "needs an NVIDIA GPU, and this platform is cpu"),
        ({"platform": "cpu", "sequence_length": BLOCKWISE_FROM_LENGTH - 1}, "reference", "is below"),
        ({"dtype": "float32"}, "blockwise", "needs bfloat16 or float16"),
        ({"head_dim": 100}, "blockwise", "multiple of 8"),
        ({"head_dim": 256}, "blockwise", "at most 128"),
        ({"head_dim": 256, "compute_capability": 9.0}, "cudnn", "head_dim 256"),
        ({"sequence_length": 131072, "compute_capability": 9.0, "in_pieces": True}, "cudnn", "in its packed layout"),
        ({"window": 1024, "compute_capability": 9.0}, "cudnn", "in its packed layout"),
        ({"sequence_length": 4095}, "blockwise", "even sequence length"),
        ({"sequence_length": 8192}, "blockwise", "a dense 128 MiB a sequence"),
        ({"sequence_length": 8192, "masks_documents": False}, "cudnn", "fused kernel"),
        ({"sequence_length": 8192, "masks_documents": False, "window": 1024}, "cudnn", "fused kernel"),
        ({"sequence_length": 8192, "masks_documents": False, "window": 99, "in_pieces": True}, "blockwise", "over pieces"),
        ({"window": 1024, "in_pieces": True, "compute_capability": 9.0}, "cudnn_dense", "masks as a dense array"),
        ({"head_dim": 192, "value_dim": 128}, "blockwise", "at most 128"),
        ({"head_dim": 192, "value_dim": 128, "compute_capability": 9.0}, "cudnn", "head_dim 192"),
    ],
)
def test_auto_takes_the_fastest_that_works_and_says_why(change, expected, reason):
    name, said = choose_backend("auto", **(CHOICE | change))
    assert name == expected
    assert reason in said
    assert "\n" not in said
    if expected.startswith("cudnn"):
        assert choose_backend("cudnn", **(CHOICE | change))[0] == expected
    else:
        with pytest.raises(ExplainedError, match="use auto, blockwise or reference"):
            choose_backend("cudnn", **(CHOICE | change))


def test_an_explicit_request_is_granted_or_refused():
    assert choose_backend("reference", **CHOICE)[0] == "reference"
    assert choose_backend("blockwise", **CHOICE)[0] == "blockwise"
    with pytest.raises(ExplainedError, match="did you mean 'blockwise'"):
        choose_backend("blockwize", **CHOICE)


@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_traces_and_saving_its_primitive_spares_the_second_forward(monkeypatch, masked):
    """Traced only: there is no GPU to run it on. The version query is the one thing that needs the library."""
    from jaxtrain.ops.attention_cudnn import CUDNN_FORWARD_PRIMITIVE

    monkeypatch.setattr(fused_attention(), "check_cudnn_version", lambda: 91000)
    (q, k, v, _), segments = draw(0, 2, 32, 4, 2, 16)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    compute = functools.partial(cudnn_attention, segments_BL=segments if masked else None)  # masked: as a dense array
    assert jax.eval_shape(compute, q, k, v).shape == q.shape

    def forward_kernels(policy):
        loss = jax.checkpoint(lambda *x: compute(*x).astype(jnp.float32).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, v)).count(CUDNN_FORWARD_PRIMITIVE)

    assert forward_kernels(lambda primitive, *_, **__: primitive.name == CUDNN_FORWARD_PRIMITIVE) == 1
    assert forward_kernels(lambda *_, **__: False) == 2


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "masked"), [("cudnn", False), ("cudnn", True), ("cudnn_dense", True)])
def test_cudnn_matches_the_reference_on_a_gpu(backend, masked):
    arrays, segments = draw(3, 2, 1024, 4, 2, 64)
    segments[1] = 1 + np.arange(1024) // 20  # more short documents than one call has slots for
    arrays = tuple(jnp.asarray(x, jnp.bfloat16) for x in arrays)
    segments = segments if masked else None
    expected = with_gradients(*(x.astype(jnp.float32) for x in arrays), segments, "reference")
    for a, e in zip(with_gradients(*arrays, segments, backend), expected, strict=True):
        assert relative(np.asarray(a, np.float32), np.asarray(e)) < 2e-2
