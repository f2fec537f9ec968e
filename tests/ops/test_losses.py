"""The vocabulary-parallel, chunked cross-entropy against log-softmax in float64, and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxtrain.config import MESH_AXES
from jaxtrain.ops.losses import IGNORED, MASKED_LOGIT, Logits, count_targets, token_losses
from jaxtrain.sharding import sum_over, vary

BATCH, LENGTH, WIDTH, VOCAB, PADDED = 3, 20, 7, 21, 32
ALL_BUT_TENSOR = tuple(axis for axis in MESH_AXES if axis != "tensor")


def mesh_of(tensor: int) -> Mesh:
    """So many of the fake devices, all along tensor."""
    devices = np.array(jax.devices()[:tensor]).reshape(1, 1, 1, 1, 1, 1, tensor)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 7)


def case(seed: int = 0, length: int = LENGTH, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, head (with rubbish in its padding), targets of which some are ignored."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(BATCH, length, WIDTH)).astype(dtype)
    head = rng.normal(size=(WIDTH, PADDED)).astype(dtype)
    targets = np.where(rng.random((BATCH, length)) < 0.3, IGNORED, rng.integers(0, VOCAB, (BATCH, length)))
    return x, head, targets.astype(np.int32)


def expected(x: np.ndarray, head: np.ndarray, targets: np.ndarray, scale: float, z_loss: float) -> dict[str, np.ndarray]:
    """Loss, its first term, and gradients of the loss: the formula, in float64 numpy."""
    x, head = x.astype(np.float64), head.astype(np.float64)
    logits = (x @ head)[..., :VOCAB]
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    counted = targets != IGNORED
    one_hot = np.eye(VOCAB)[np.where(counted, targets, 0)]
    likelihood = scale * ((log_z - (logits * one_hot).sum(-1)) * counted).sum()
    softmax = np.exp(logits - log_z[..., None])
    d_logits = scale * counted[..., None] * (softmax * (1 + 2 * z_loss * log_z[..., None]) - one_hot)
    d_head = np.zeros_like(head)
    d_head[:, :VOCAB] = np.einsum("bld,blv->dv", x, d_logits)
    return {
        "loss": likelihood + scale * z_loss * (log_z**2 * counted).sum(),
        "likelihood": likelihood,
        "x": np.einsum("blv,dv->bld", d_logits, head[:, :VOCAB]),
        "head": d_head,
    }


@functools.cache
def compiled(tensor: int, chunk: int, z_loss: float, factor: float = 1.0):
    """Jitted (x, head, targets, scale) -> (loss, first term, dx, d head), for `factor` times the loss."""

    def region(x, head, targets, scale):
        x, head, targets, scale = vary((x, head, targets, scale))

        def loss(x, head):
            total, reported = token_losses(x, head, targets, scale, Logits(VOCAB), chunk, z_loss)
            likelihood = reported["loss"]
            return factor * total, (total, likelihood)

        (dx, d_head), (total, likelihood) = jax.grad(loss, (0, 1), has_aux=True)(x, head)
        value, reported = token_losses(x, head, targets, scale, Logits(VOCAB), chunk, z_loss)  # the path without gradients
        alone = reported["loss"]
        sums = sum_over(jnp.stack([total, likelihood, value, alone]), MESH_AXES)
        return sums, sum_over(dx, ALL_BUT_TENSOR), sum_over(d_head, ALL_BUT_TENSOR)

    specs = (P(None, "tensor"), P(None, "tensor"), P(), P())
    out = (P(), P(None, "tensor"), P(None, "tensor"))
    mapped = jax.shard_map(region, mesh=mesh_of(tensor), in_specs=specs, out_specs=out)
    # The time of these tests is LLVM's.
    return jax.jit(mapped)


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize(("tensor", "chunk"), [(1, 64), (1, 6), (2, 8), (4, 7), (4, 1)])
def test_values_and_gradients(tensor: int, chunk: int, z_loss: float):
    """Chunks that do and do not divide the length, one chunk longer than it, and one shorter than the tensor axis."""
    x, head, targets = case()
    want = expected(x, head, targets, 1 / 17, z_loss)
    sums, dx, d_head = map(np.asarray, compiled(tensor, chunk, z_loss)(x, head, targets, np.float32(1 / 17)))
    np.testing.assert_allclose(sums, [want["loss"], want["likelihood"]] * 2, rtol=2e-6)
    np.testing.assert_allclose(dx, want["x"], atol=1e-6)
    np.testing.assert_allclose(d_head, want["head"], atol=1e-6)
    assert (d_head[:, VOCAB:] == 0).all()
    if z_loss:
        assert sums[0] > sums[1] * 1.001
    else:
        assert sums[0] == sums[1]


def test_against_autodiff_of_the_plain_formula():
    x, head, targets = case(1)

    def plain(x, head):
        log_p = jax.nn.log_softmax((x @ head)[..., :VOCAB])
        taken = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
        return -jnp.sum(taken * (targets != IGNORED)) / 10

    dx, d_head = jax.grad(plain, (0, 1))(x, head)
    sums, got_dx, got_d_head = compiled(2, 8, 0.0)(x, head, targets, np.float32(0.1))
    np.testing.assert_allclose(sums[0], plain(x, head), rtol=2e-6)
    np.testing.assert_allclose(got_dx, dx, atol=2e-6)
    np.testing.assert_allclose(got_d_head, d_head, atol=2e-6)


def test_the_gradient_is_scaled_by_what_follows():
    """The loss is not always the last thing: its cotangent counts."""
    x, head, targets = case()
    once, thrice = compiled(2, 8, 0.0), compiled(2, 8, 0.0, factor=3.0)
    for one, three in zip(once(x, head, targets, np.float32(1))[1:], thrice(x, head, targets, np.float32(1))[1:], strict=True):
        np.testing.assert_allclose(three, 3 * one, rtol=1e-6)


def test_a_batch_without_targets_is_zero():
    x, head, targets = case()
    sums, dx, d_head = compiled(2, 8, 0.0)(x, head, np.full_like(targets, IGNORED), np.float32(1))
    assert not np.asarray(sums).any()
    assert not np.asarray(dx).any()
    assert not np.asarray(d_head).any()


def test_ignored_positions_get_no_gradient():
    x, head, targets = case()
    _, dx, _ = compiled(4, 7, 0.01)(x, head, targets, np.float32(1))
    assert (np.asarray(dx)[targets == IGNORED] == 0).all()
    assert (np.abs(np.asarray(dx)[targets != IGNORED]).max(-1) > 0).all()


def test_large_logits_do_not_overflow():
    x, head, targets = case()
    want = expected(100 * x, 10 * head, targets, 1.0, 0.0)
    sums, dx, _ = compiled(2, 8, 0.0)(100 * x, 10 * head, targets, np.float32(1))
    np.testing.assert_allclose(sums[0], want["loss"], rtol=1e-5)
    np.testing.assert_allclose(dx, want["x"], rtol=1e-3, atol=1e-3)


def test_bfloat16_inputs_have_a_float32_loss():
    """Products of bfloat16 numbers are summed in float32: the loss is that of the rounded inputs, not a rounded loss."""
    x, head, targets = case()
    x16, head16 = jnp.asarray(x, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    want = expected(np.asarray(x16, np.float32), np.asarray(head16, np.float32), targets, 0.1, 0.0)
    sums, dx, d_head = compiled(2, 8, 0.0)(x16, head16, targets, np.float32(0.1))
    assert (sums.dtype, dx.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(sums[0], want["loss"], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(dx, np.float32), want["x"], atol=0.02 * np.abs(want["x"]).max())
    np.testing.assert_allclose(np.asarray(d_head, np.float32), want["head"], atol=0.02 * np.abs(want["head"]).max())


def test_padding_of_the_vocabulary_is_masked_wherever_it_lies():
    """With 4 shares of 8 ids and 21 in use, the third share is cut inside and the last is all padding."""
    mask = jax.shard_map(
        lambda head: Logits(VOCAB).of(vary(jnp.ones((2, 1, 1))), head)[:, 0],
        mesh=mesh_of(4),
        in_specs=P(None, "tensor"),
        out_specs=P(None, "tensor"),
        check_vma=False,
    )
    masked = np.asarray(mask(jnp.ones((1, PADDED))))
    assert (masked[:, :VOCAB] == 1).all()
    assert (masked[:, VOCAB:] == np.float32(MASKED_LOGIT)).all()


def test_targets_are_counted():
    targets = case()[2]
    assert count_targets(jnp.asarray(targets)) == (targets != IGNORED).sum()
    assert count_targets(jnp.asarray(targets)).dtype == jnp.float32


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def temporary_bytes(length: int, vocab: int, chunk: int) -> int:
    """What the compiled loss with its gradients needs beside its arguments and results, B = 1, D = 8."""

    def region(x, head, targets):
        x, head, targets = vary((x, head, targets))
        loss = lambda x, head: token_losses(x, head, targets, vary(jnp.ones(())), Logits(vocab), chunk, 0.0)[0]  # noqa: E731
        value, gradients = jax.value_and_grad(loss, (0, 1))(x, head)
        return sum_over(value, MESH_AXES), *(sum_over(g, ALL_BUT_TENSOR) for g in gradients)

    shapes = (
        jax.ShapeDtypeStruct((1, length, 8), jnp.float32),
        jax.ShapeDtypeStruct((8, vocab), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
    )
    specs = (P(None, "tensor"), P(None, "tensor"), P())
    out = (P(), P(None, "tensor"), P(None, "tensor"))
    step = jax.jit(jax.shard_map(region, mesh=mesh_of(1), in_specs=specs, out_specs=out))
    return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_full_logits_never_exist():
    """Logits of [2048, 4096] would take 32 MiB; a chunk of 64 positions takes 1."""
    length, vocab, chunk = 2048, 4096, 64
    logits, logits_of_chunk = 4 * length * vocab, 4 * chunk * vocab
    chunked = temporary_bytes(length, vocab, chunk)
    assert chunked < 4 * logits_of_chunk
    assert temporary_bytes(length, vocab, length) >= logits
    # Twice the length: the logits of a chunk stay, only what is as long as the sequence grows.
    assert temporary_bytes(2 * length, vocab, chunk) - chunked < logits_of_chunk
