"""Rotary position embedding (RoPE) in HuggingFace's layout, so that Llama weights fit unchanged."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.config import RopeScaling


def rope_frequencies(width: int, theta: float, scaling: RopeScaling | None, length: int = 0) -> np.ndarray:
    """Return the angles per position, in radians: float64 [width / 2].

    frequency_i = theta^(-2i / width) (Su et al. 2021, arXiv:2104.09864, section 3.2.2), stretched as `scaling` says:
    linear divides all by `factor`; the others are below.

    Args:
      width: numbers of a head that are rotated.
      length: of the whole sequence, in tokens: longrope has other factors above original_length.
    """
    frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "longrope":
        return frequencies / np.asarray(scaling.long_factors if length > scaling.original_length else scaling.short_factors)
    kept = (_kept_by_llama3 if scaling.kind == "llama3" else _kept_by_yarn)(frequencies, theta, scaling)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _kept_by_llama3(frequencies: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Return the share of each frequency that is not stretched (`apply_scaling` in github.com/meta-llama/llama-models
    models/llama3/reference_impl/model.py, and `_compute_llama3_parameters` in transformers/modeling_rope_utils.py).

    With wavelength w = 2 pi / frequency it is (original_length / w - low) / (high - low), between 0 and 1: wavelengths below
    original_length / high are unchanged, those above original_length / low are stretched fully.
    """
    del theta
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    # It is infinite where low = high, which is a step.
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(np.nan_to_num((scaling.original_length / wavelengths - low) / (high - low), nan=1.0), 0.0, 1.0)


def _kept_by_yarn(frequencies: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Return the share of each frequency that is not stretched (YaRN, Peng et al. 2023, arXiv:2309.00071, section 3.2).

    A frequency turns r times within original_length at index d(r) = width ln(original_length / (2 pi r)) / (2 ln theta). Those
    up to d(beta_fast) are kept, those from d(beta_slow) on are stretched, linearly between (`_compute_yarn_parameters` in
    transformers/modeling_rope_utils.py, whose rounding and bounds these are).
    """
    count = len(frequencies)

    def index(rotations: float) -> float:
        return count * math.log(scaling.original_length / (2 * math.pi * rotations)) / math.log(theta)

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * count - 1)
    return 1 - np.clip((np.arange(count) - low) / (high - low if high > low else 0.001), 0, 1)


def rope(
    x_BLHN: jax.Array,
    positions_BL: jax.Array,
    theta: float,
    scaling: RopeScaling | None = None,
    fraction: float = 1.0,
    length: int | jax.Array = 0,
) -> jax.Array:
    """Rotate each pair (x_i, x_{i + N/2}) of a head by the angle position * frequency_i.

    out_i = x_i cos - x_{i + N/2} sin, out_{i + N/2} = x_{i + N/2} cos + x_i sin: `apply_rotary_pos_emb` with
    `rotate_half` of transformers/models/llama/modeling_llama.py. (Checkpoints that pair neighbours instead are permuted on
    conversion.) The dot product of a rotated query and a rotated key depends only on the distance of their positions. Angles,
    sines, cosines and the rotation are float32.

    Args:
      x_BLHN: queries or keys.
      positions_BL: int32, position of each token in its document.
      theta: base of the wavelengths.
      scaling: stretching of the wavelengths, or None. Its attention_factor multiplies sines and cosines.
      fraction: share of the N numbers, the first ones, that is rotated; their number is even.
      length: see `rope_frequencies`; int32 [B, L or 1] where sequences differ.

    Returns:
      The shape and dtype of x_BLHN.
    """
    width = rotated_width(x_BLHN.shape[-1], fraction)
    frequencies = _frequencies(width, theta, scaling, length)
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies
    factor = scaling.attention_factor if scaling else 1.0
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    x32 = x_BLHN.astype(jnp.promote_types(x_BLHN.dtype, jnp.float32))
    first, second, rest = jnp.split(x32, [width // 2, width], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x_BLHN.dtype)


def _frequencies(width: int, theta: float, scaling: RopeScaling | None, length: int | jax.Array) -> jax.Array:
    """Return `rope_frequencies` in float32, [width / 2] or, by each token's sequence, [B, L or 1, 1, width / 2]."""
    if isinstance(length, int) or scaling is None or scaling.kind != "longrope":
        return jnp.asarray(rope_frequencies(width, theta, scaling, length if isinstance(length, int) else 0), jnp.float32)
    short, stretched = (rope_frequencies(width, theta, scaling, n) for n in (0, scaling.original_length + 1))
    is_long_BL11 = (length > scaling.original_length)[..., None, None]
    return jnp.where(is_long_BL11, stretched.astype(np.float32), short.astype(np.float32))


def rotated_width(head_dim: int, fraction: float) -> int:
    """Return how many numbers of a head are rotated: int(head_dim * fraction), as in `transformers`."""
    return int(head_dim * fraction)
