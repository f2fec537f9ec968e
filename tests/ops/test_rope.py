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


def yarn_oracle(width, theta, factor, length, fast, slow):
    """YaRN's section 3.2 by a pair's turns r within `length`: kept where r is high, stretched where low, between a ramp."""
    pairs = np.arange(width // 2)
    plain = theta ** (-2 * pairs / width)
    turns = lambda index: length * theta ** (-2 * index / width) / (2 * math.pi)  # noqa: E731
    grid = np.linspace(0, width, 2_000_001)
    low, high = (grid[np.argmin(np.abs(turns(grid) - r))] for r in (fast, slow))
    stretched = np.clip((pairs - low) / (high - low), 0, 1)
    return plain * (1 - stretched + stretched / factor)


def test_linear_yarn_and_longrope_frequencies():
    plain = oracle_frequencies(16, 1e4, None)
    np.testing.assert_allclose(rope_frequencies(16, 1e4, RopeScaling("linear", 4.0)), plain / 4, rtol=1e-12)
    yarn = RopeScaling("yarn", 8.0, original_length=256, beta_fast=20.0, beta_slow=1.5, truncate=False)
    oracle = yarn_oracle(64, 1e4, 8.0, 256, 20.0, 1.5)
    np.testing.assert_allclose(rope_frequencies(64, 1e4, yarn), oracle, rtol=1e-5)
    factors = {"short_factors": (1.0, 1.5), "long_factors": (2.0, 8.0)}
    long = RopeScaling("longrope", original_length=16, **factors)
    for length, name in ((16, "short_factors"), (17, "long_factors")):
        expected = oracle_frequencies(4, 1e4, None) / factors[name]
        np.testing.assert_allclose(rope_frequencies(4, 1e4, long, length), expected, rtol=1e-12)


def test_longrope_follows_each_row():
    """Rows of 16 and 17 tokens in one array have the factors that they have alone; cos and sin are multiplied."""
    scaling = RopeScaling(
        "longrope", original_length=16, attention_factor=1.2, short_factors=(1.0, 1.5), long_factors=(2.0, 8.0)
    )
    x = np.random.default_rng(3).normal(size=(2, 5, 3, 4))
    positions, lengths = np.arange(10).reshape(2, 5), np.array([[16], [17]])
    both = rope(jnp.asarray(x, jnp.float32), jnp.asarray(positions), 100.0, scaling, length=jnp.asarray(lengths))
    for row, factors in enumerate((scaling.short_factors, scaling.long_factors)):
        angles = positions[row][:, None, None] * oracle_frequencies(4, 100.0, None) / factors
        turned = 1.2 * (x[row, ..., :2] + 1j * x[row, ..., 2:]) * np.exp(1j * angles)
        np.testing.assert_allclose(both[row], np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-5)


def test_a_part_of_a_head_and_neighbours():
    """The numbers beyond the fraction stay; pairs of neighbours, permuted to halves, turn as neighbours do."""
    x = np.random.default_rng(4).normal(size=(1, 7, 2, 10))
    positions = np.arange(7)[None]
    angles = positions[..., None, None] * oracle_frequencies(4, 100.0, None)
    neighbours = (x[..., 0:4:2] + 1j * x[..., 1:4:2]) * np.exp(1j * angles)
    permuted = np.concatenate([x[..., 0:4:2], x[..., 1:4:2], x[..., 4:]], axis=-1)
    got = np.asarray(rope(jnp.asarray(permuted, jnp.float32), jnp.asarray(positions), 100.0, fraction=0.45))
    np.testing.assert_allclose(got[..., :2] + 1j * got[..., 2:4], neighbours, atol=2e-5)
    np.testing.assert_allclose(got[..., 4:], x[..., 4:], rtol=1e-6)


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
