"""What attention, MLP and experts share: a block's norms, and how its output joins the residual stream."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.config import ModelConfig
from jaxtrain.models.parameters import parameter
from jaxtrain.ops.norm import layer_norm, rms_norm


def norm_std(config: ModelConfig) -> float | None:
    """Return the `std` of `parameter` with which a norm's scale is 1 at first: ones, or zeros where norm_offset is 1."""
    return 0.0 if config.norm_offset else None


def norm_scale(weight: jax.Array, config: ModelConfig) -> jax.Array:
    """Return a norm's scale: norm_offset + weight."""
    return weight + config.norm_offset if config.norm_offset else weight


def declare_norm(module: nnx.Module, name: str, width: int, config: ModelConfig, rngs: nnx.Rngs) -> None:
    """Add the weight of a norm as `module.name`, and its bias, if norms have one, as `module.name_bias`.

    The initial scale, norm_offset + weight, is 1.
    """
    setattr(module, name, parameter(rngs, (width,), ("norm",), norm_std(config)))
    if config.norm_bias:
        setattr(module, f"{name}_bias", parameter(rngs, (width,), ("bias",), 0.0))


def normalise(module: nnx.Module, name: str, x: jax.Array, config: ModelConfig) -> jax.Array:
    """Apply the norm that `declare_norm` declared, over the last dim."""
    scale = norm_scale(getattr(module, name)[...], config)
    if config.norm == "rms":
        return rms_norm(x, scale, config.norm_epsilon)
    bias = getattr(module, f"{name}_bias")[...] if config.norm_bias else jnp.zeros_like(scale)
    return layer_norm(x, scale, bias, config.norm_epsilon)


class Block(nnx.Module):
    """x + residual_scale post_norm(out(norm(x))); `norm_placement` says which of the two norms there are."""

    config: ModelConfig

    def declare_norms(self, rngs: nnx.Rngs, *, pre: bool = True) -> None:
        """Add `norm` and `post_norm`, each where the config has one; without `pre` no `norm`."""
        if pre and self.config.norm_placement != "post":
            declare_norm(self, "norm", self.config.embed_dim, self.config, rngs)
        if self.config.norm_placement != "pre":
            declare_norm(self, "post_norm", self.config.embed_dim, self.config, rngs)

    def normed(self, x_BLD: jax.Array) -> jax.Array:
        """Return what the block reads: norm(x), or x where the block has no norm on its input."""
        return normalise(self, "norm", x_BLD, self.config) if hasattr(self, "norm") else x_BLD

    def joined(self, x_BLD: jax.Array, out_BLD: jax.Array) -> jax.Array:
        """Return the residual stream with the block's output added."""
        if self.config.norm_placement != "pre":
            out_BLD = normalise(self, "post_norm", out_BLD, self.config)
        scale = self.config.residual_scale
        return x_BLD + (out_BLD if scale == 1 else (out_BLD * scale).astype(out_BLD.dtype))
