"""How a layer's queries and keys learn their positions."""

from __future__ import annotations

import jax
from jax import lax

from jaxtrain.config import ModelConfig
from jaxtrain.models.packing import Packing
from jaxtrain.ops.rope import rope


def with_positions(x_BLHN: jax.Array, packing: Packing, config: ModelConfig) -> jax.Array:
    """Rotate queries or keys by RoPE as the layer's kind says; return them unchanged where the layer has none.

    Args:
      x_BLHN: N is a head's width, or with latent attention that of the part that is rotated.
      config: of one kind of layer (`layer_config`).
    """
    (kind,) = config.kinds
    if kind == "nope" or config.learned_positions:
        return x_BLHN
    own_base = kind == "local" and config.local_rope_theta > 0
    theta, scaling = (config.local_rope_theta, None) if own_base else (config.rope_theta, config.rope_scaling)
    length = packing.positions.shape[1] * lax.axis_size("context") if packing.lengths is None else packing.lengths
    return rope(x_BLHN, packing.positions, theta, scaling, config.rope_fraction, length)
