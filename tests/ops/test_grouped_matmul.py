import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.layout import KERNEL_TILE
from jaxtrain.ops.grouped_matmul import grouped_matmul

GROUPS, DEPTH, WIDTH = 3, 80, 208  # whole blocks of 16 only


def padded(sizes, rows):
    """Random rows of groups padded to tiles: padding is zero, as dispatch leaves it."""
    rng = np.random.default_rng(0)
    x, w, ct = (rng.normal(size=s).astype(np.float32) for s in ((rows, DEPTH), (GROUPS, DEPTH, WIDTH), (rows, WIDTH)))
    group, in_tiles = np.full(rows, -1), [-(-s // KERNEL_TILE) * KERNEL_TILE for s in sizes]
    start = 0
    for e, (size, whole) in enumerate(zip(sizes, in_tiles, strict=True)):
        group[start : start + size] = e
        start += whole
    x[group < 0], ct[group < 0] = 0, 0
    return x, w, ct, group, np.array(in_tiles, np.int32)


@pytest.mark.parametrize("kind", ["kernels", "ragged_dot"])
@pytest.mark.parametrize("sizes", [(100, 0, 130), (0, 0, 0), (128, 256, 128)])
def test_grouped_matmul_and_its_gradients(kind, sizes):
    x, w, ct, group, in_tiles = padded(sizes, 5 * KERNEL_TILE)
    bfloat16 = [jnp.asarray(a, jnp.bfloat16) for a in (x, w, ct)]
    x, w, ct = (np.asarray(a, np.float64) for a in bfloat16)
    tile = KERNEL_TILE if kind == "kernels" else 1
    y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, in_tiles, tile, interpret=True), *bfloat16[:2])
    got = (y, *vjp(bfloat16[2]))
    wanted = np.zeros_like(ct), np.zeros_like(x), np.zeros_like(w)
    for e in range(GROUPS):
        own = group == e
        wanted[0][own], wanted[1][own], wanted[2][e] = x[own] @ w[e], ct[own] @ w[e].T, x[own].T @ ct[own]
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2e-2, atol=1e-2 * max(np.abs(b).max(), 1))


def test_what_the_kernels_cannot_take_is_left_to_xla():
    x, w, _, _, in_tiles = padded((100, 0, 130), 5 * KERNEL_TILE)
    program = str(jax.make_jaxpr(lambda x, w: grouped_matmul(x, w, in_tiles, KERNEL_TILE))(x, w))
    assert "ragged_dot" in program
    assert "pallas_call" not in program


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
def test_kernels_on_a_gpu_are_those_that_are_interpreted():
    x, w, ct, _, in_tiles = padded((100, 0, 130), 5 * KERNEL_TILE)
    x, w, ct = (jnp.asarray(a, jnp.bfloat16) for a in (x, w, ct))

    def all_three(interpret):
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, in_tiles, KERNEL_TILE, interpret=interpret), x, w)
        return jax.tree.map(lambda a: np.asarray(a, np.float32), (y, *vjp(ct)))

    for a, b in zip(all_three(False), all_three(True), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-2 * max(np.abs(b).max(), 1))
