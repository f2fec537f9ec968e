"""RoPE against the formula in numpy float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import RopeScaling
from jaxtrain.ops.rope import rope, rope_frequencies

SCALINGS = [None, RopeScaling()]


def oracle_frequencies(head_dim, theta, scaling):
    """The loop of Meta's `apply_scaling`, a frequency at a time."""
    out = []
    for i in range(head_dim // 2):
        f = theta ** (-2 * i / head_dim)
        if scaling is not None:
            wavelength = 2 * math.pi / f
            if wavelength > scaling.original_length / scaling.low_frequency_factor:
                f = f / scaling.factor
            elif wavelength >= scaling.original_length / scaling.high_frequency_factor:
                s = scaling.original_length / wavelength - scaling.low_frequency_factor
                s /= scaling.high_frequency_factor - scaling.low_frequency_factor
                f = (1 - s) * f / scaling.factor + s * f
        out.append(f)
    return np.array(out)


@pytest.mark.parametrize("scaling", [*SCALINGS, RopeScaling("llama3", 4.0, 2.0, 2.0, 64)])
def test_frequencies(scaling):
    np.testing.assert_allclose(
        rope_frequencies(128, 500_000.0, scaling), oracle_frequencies(128, 500_000.0, scaling), rtol=1e-12
    )


def test_llama_31_keeps_fast_pairs_and_stretches_slow_ones_by_the_factor():
    plain, scaled = (rope_frequencies(128, 500_000.0, s) for s in SCALINGS)
    ratio = plain / scaled
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(8)
    assert (np.diff(ratio) >= -1e-12).all()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_turns_halves_as_huggingface_does(scaling):
    rng = np.random.default_rng(0)
    x_BLHN, positions_BL = rng.normal(size=(2, 9, 3, 8)), rng.integers(0, 100, (2, 9))
    angles = positions_BL[..., None, None] * oracle_frequencies(8, 100.0, scaling)
    turned = (x_BLHN[..., :4] + 1j * x_BLHN[..., 4:]) * np.exp(1j * angles)  # the pair (i, i + N/2) is a complex number
    actual = rope(jnp.asarray(x_BLHN, jnp.float32), jnp.asarray(positions_BL), 100.0, scaling)
    np.testing.assert_allclose(actual, np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-5)


def test_scores_depend_on_the_distance_only():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(np.broadcast_to(rng.normal(size=8), (1, 6, 1, 8)), jnp.float32) for _ in range(2))

    def score(q_position, k_position):
        turned = rope(q, jnp.full((1, 6), q_position), 100.0), rope(k, jnp.full((1, 6), k_position), 100.0)
        return float(jnp.sum(turned[0][0, 0] * turned[1][0, 0]))

    for distance in (0, 3, 50):
        assert score(distance, 0) == pytest.approx(score(200 + distance, 200), abs=1e-4)
    assert score(3, 0) != pytest.approx(score(4, 0), abs=1e-3)


def test_keeps_norms_and_dtype():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 5, 2, 8)), jnp.bfloat16)
    positions = jnp.arange(5)[None]
    turned = rope(x, positions, 10_000.0)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    norms = [jnp.linalg.norm(rope(x.astype(jnp.float32), p, 1e4), axis=-1) for p in (positions, 0 * positions)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-6)
