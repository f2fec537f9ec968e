"""Rotary position embedding (RoPE) in HuggingFace's layout, so that Llama weights fit unchanged."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.config import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Return the angles per position, in radians: float64 [head_dim / 2].

    frequency_i = theta^(-2i / head_dim) (Su et al. 2021, arXiv:2104.09864, section 3.2.2). With `scaling`, Llama 3.1's
    stretching (`apply_scaling` in github.com/meta-llama/llama-models models/llama3/reference_impl/model.py, and
    `_compute_llama3_parameters` in transformers/modeling_rope_utils.py): with wavelength w = 2 pi / frequency,

    - w < original_length / high_frequency_factor: unchanged;
    - w > original_length / low_frequency_factor: frequency / factor;
    - between: (1 - s) frequency / factor + s frequency, s = (original_length / w - low) / (high - low).
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    # Clipping s to [0, 1] gives the two outer cases; it is infinite where low = high, which is a step.
    with np.errstate(divide="ignore", invalid="ignore"):
        s = np.clip(np.nan_to_num((scaling.original_length / wavelengths - low) / (high - low), nan=1.0), 0.0, 1.0)
    return (1 - s) * frequencies / scaling.factor + s * frequencies


def rope(x_BLHN: jax.Array, positions_BL: jax.Array, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
    """Rotate each pair (x_i, x_{i + N/2}) of a head by the angle position * frequency_i.

    out_i = x_i cos - x_{i + N/2} sin, out_{i + N/2} = x_{i + N/2} cos + x_i sin: `apply_rotary_pos_emb` with
    `rotate_half` of transformers/models/llama/modeling_llama.py. (Meta's own checkpoints pair neighbours instead, and are
    permuted on conversion.) The dot product of a rotated query and a rotated key depends only on the distance of their
    positions. Angles, sines, cosines and the rotation are float32.

    Args:
      x_BLHN: queries or keys, N even.
      positions_BL: int32, position of each token in its document.
      theta: base of the wavelengths.
      scaling: Llama 3.1's stretching, or None.

    Returns:
      The shape and dtype of x_BLHN.
    """
    frequencies = jnp.asarray(rope_frequencies(x_BLHN.shape[-1], theta, scaling), jnp.float32)
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x_BLHN.astype(jnp.promote_types(x_BLHN.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHN.dtype)
