"""The decoder's modules: parameters declared in one place (shape, initializer, logical dims) beside the forward code.

Shape letters: B batch, L length, D embed, H query heads, K kv heads, N head_dim, F mlp, V vocab. Inside the manual region L of
the residual stream is this device's slice over `tensor` (sequence sharding), and H, K, F and V are its share over `tensor`.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.config import ModelConfig
from jaxtrain.models.block import Block, declare_norm, norm_scale, norm_std, normalise
from jaxtrain.models.latent_attention import LatentAttention
from jaxtrain.models.moe import MoE
from jaxtrain.models.packing import Packing
from jaxtrain.models.parameters import parameter
from jaxtrain.models.positions import with_positions
from jaxtrain.ops.activation import activate, activate_alone
from jaxtrain.ops.attention_context import AttentionPlan
from jaxtrain.ops.expert_dispatch import ExpertBackend
from jaxtrain.ops.matmul import multiply
from jaxtrain.ops.norm import heads_norm, rms_norm
from jaxtrain.parallel.turns import Turn, scoped
from jaxtrain.sharding import all_gather, once, reduce_scatter, vary


class Attention(Block):
    """x + softmax(Q K^T / sqrt(N)) V W_out, with Q, K, V = projections of norm(x), positions in Q and K."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        d, h, k, n = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        std, dtype = config.init_std, config.param_dtype
        self.declare_norms(rngs)
        self.query = parameter(rngs, (d, h, n), ("embed", "heads", "head_dim"), std, dtype)
        self.key = parameter(rngs, (d, k, n), ("embed", "kv_heads", "head_dim"), std, dtype)
        self.value = parameter(rngs, (d, k, n), ("embed", "kv_heads", "head_dim"), std, dtype)
        out_std = std / math.sqrt(2 * config.num_layers)
        self.out = parameter(rngs, (h, n, d), ("heads", "head_dim", "embed"), out_std, dtype)
        if config.qk_norm == "head":
            self.query_norm = parameter(rngs, (n,), ("norm",), norm_std(config))
            self.key_norm = parameter(rngs, (n,), ("norm",), norm_std(config))
        elif config.qk_norm == "width":
            self.query_norm = parameter(rngs, (h, n), ("heads", "norm"), norm_std(config))
            self.key_norm = parameter(rngs, (k, n), ("kv_heads", "norm"), norm_std(config))
        if config.attention_bias != "none":
            self.query_bias = parameter(rngs, (h, n), ("heads", "bias"), 0.0)
            self.key_bias = parameter(rngs, (k, n), ("kv_heads", "bias"), 0.0)
            self.value_bias = parameter(rngs, (k, n), ("kv_heads", "bias"), 0.0)
        if config.attention_bias == "all":
            self.out_bias = parameter(rngs, (d,), ("bias",), 0.0)
        if config.attention_sinks:
            self.sinks = parameter(rngs, (h,), ("heads_bias",), std)

    def _projected(self, h_BLD: jax.Array, name: str) -> jax.Array:
        """Return the queries, keys or values of all heads of this device."""
        heads_BLHN = multiply("BLD,DHN->BLHN", h_BLD, getattr(self, name)[...])
        if self.config.attention_bias != "none":
            heads_BLHN = heads_BLHN + getattr(self, f"{name}_bias")[...].astype(h_BLD.dtype)
        return checkpoint_name(heads_BLHN, name)

    def _placed(self, x_BLHN: jax.Array, norm: nnx.Param | None, packing: Packing) -> jax.Array:
        """Return queries or keys after their norm, with their positions in them."""
        config = self.config
        if norm is not None:
            norm_of_kind = heads_norm if config.qk_norm == "width" else rms_norm
            x_BLHN = norm_of_kind(x_BLHN, norm_scale(norm[...], config), config.norm_epsilon)
        return with_positions(x_BLHN, packing, config)

    def __call__(self, x_BLD: jax.Array, packing: Packing, plan: AttentionPlan) -> Turn[jax.Array]:
        x_BLD = yield x_BLD
        h_BLD = yield all_gather(self.normed(x_BLD), "tensor", dim=1)
        q_BLHN, k_BLKN, v_BLKN = yield tuple(self._projected(h_BLD, name) for name in ("query", "key", "value"))
        q_BLHN = self._placed(q_BLHN, getattr(self, "query_norm", None), packing)
        k_BLKN = self._placed(k_BLKN, getattr(self, "key_norm", None), packing)
        sinks_H = self.sinks[...] if self.config.attention_sinks else None
        with jax.named_scope("attention"):
            options = {"segments_BL": packing.segments, "sinks_H": sinks_H, "residual_name": "attention"}
            a_BLHN = plan.attend(q_BLHN, k_BLKN, v_BLKN, **options)
        out_BLD = yield multiply("BLHN,HND->BLD", a_BLHN, self.out[...])
        out_BLD = reduce_scatter(out_BLD, "tensor", dim=1)
        if self.config.attention_bias == "all":
            out_BLD = out_BLD + self.out_bias[...].astype(out_BLD.dtype)
        return self.joined(x_BLD, checkpoint_name(out_BLD, "attention_out"))


class MLP(Block):
    """x + (act(h W_gate) * (h W_up)) W_down with h = norm(x), by default SwiGLU (Shazeer 2020); or x + act(h W_up) W_down."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        d, f, std, dtype = config.embed_dim, config.mlp_dim, config.init_std, config.param_dtype
        self.declare_norms(rngs, pre=config.residual != "parallel_one_norm")
        if config.gated_mlp:
            self.gate = parameter(rngs, (d, f), ("embed", "mlp"), std, dtype)
        self.up = parameter(rngs, (d, f), ("embed", "mlp"), std, dtype)
        self.down = parameter(rngs, (f, d), ("mlp", "embed"), std / math.sqrt(2 * config.num_layers), dtype)
        if config.mlp_bias:
            if config.gated_mlp:
                self.gate_bias = parameter(rngs, (f,), ("mlp_bias",), 0.0)
            self.up_bias = parameter(rngs, (f,), ("mlp_bias",), 0.0)
            self.down_bias = parameter(rngs, (d,), ("bias",), 0.0)

    def _projected(self, h_BLD: jax.Array, name: str) -> jax.Array:
        wide_BLF = multiply("BLD,DF->BLF", h_BLD, getattr(self, name)[...])
        if self.config.mlp_bias:
            wide_BLF = wide_BLF + getattr(self, f"{name}_bias")[...].astype(wide_BLF.dtype)
        return checkpoint_name(wide_BLF, f"mlp_{name}")

    def __call__(self, x_BLD: jax.Array, onto_BLD: jax.Array | None = None) -> Turn[jax.Array]:
        """Return `onto_BLD`, by default x itself, with the block's output added."""
        x_BLD = yield x_BLD
        h_BLD = yield all_gather(self.normed(x_BLD), "tensor", dim=1)
        if self.config.gated_mlp:
            gate_BLF = yield self._projected(h_BLD, "gate")
            hidden_BLF = activate(self.config, gate_BLF, self._projected(h_BLD, "up"))
        else:
            up_BLF = yield self._projected(h_BLD, "up")
            hidden_BLF = activate_alone(self.config, up_BLF)
        # Not after the last matmul: the backward pass would recompute it only for the barrier.
        hidden_BLF = yield checkpoint_name(hidden_BLF, "mlp_hidden")
        out_BLD = reduce_scatter(multiply("BLF,FD->BLD", hidden_BLF, self.down[...]), "tensor", dim=1)
        if self.config.mlp_bias:
            out_BLD = out_BLD + self.down_bias[...].astype(out_BLD.dtype)
        return self.joined(x_BLD if onto_BLD is None else onto_BLD, checkpoint_name(out_BLD, "mlp_out"))


class Layer(nnx.Module):
    """Attention, then MLP or mixture of experts, each added to the residual stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        own = LatentAttention if config.latent_attention else Attention
        self.attention = (config.parts.attention or own)(config, rngs)
        if config.moe:
            self.moe = MoE(config, rngs)
        else:
            self.mlp = (config.parts.mlp or MLP)(config, rngs)

    def __call__(
        self, x_BLD: jax.Array, packing: Packing, plan: AttentionPlan, experts: ExpertBackend
    ) -> Turn[tuple[jax.Array, jax.Array, dict[str, jax.Array]]]:
        """(x, this device's share of the auxiliary losses, sums to report)."""
        read_BLD = x_BLD
        x_BLD = yield from scoped("attention_block", as_turn(self.attention, x_BLD, packing, plan))
        # The second block reads what attention left; in parallel it reads what attention read, and adds to what attention left.
        second: tuple[Any, ...] = (x_BLD,)
        if self.config.residual == "parallel":
            second = (read_BLD, x_BLD)
        elif self.config.residual == "parallel_one_norm":
            second = (self.attention.normed(read_BLD), x_BLD)
        if not hasattr(self, "moe"):
            x_BLD = yield from scoped("mlp_block", as_turn(self.mlp, *second))
            return x_BLD, vary(jnp.zeros(())), {}
        counted = vary(jnp.zeros(packing.positions.shape, bool)) if packing.counted is None else packing.counted
        scale = vary(jnp.zeros(())) if packing.scale is None else packing.scale
        given = {"counted_BL": counted, "scale": scale, "given_BLK": packing.experts}
        return (yield from scoped("moe_block", self.moe(*second, backend=experts, **given)))


def layer_kind(config: ModelConfig, place: int = 0) -> tuple[type[nnx.Module], ModelConfig]:
    """Return (the class of the decoder's layers, its config) at a place of the pattern. All places have the same parameters."""
    return config.parts.layer or Layer, replace(config, pattern=(config.kinds[place],))


def as_turn(block: Any, x_BLD: jax.Array, *arguments: Any) -> Turn[Any]:
    """Run a block that takes turns (`parallel/turns.py`), or a plain function, which a part computes at one place."""
    if inspect.isgeneratorfunction(type(block).__call__):
        return (yield from block(x_BLD, *arguments))
    result = block((yield x_BLD), *arguments)
    for _ in range(3):  # a block has four places
        result = yield result
    return result


def run_layer(layer: Any, x_BLD: jax.Array, packing: Packing, plan: AttentionPlan, experts: ExpertBackend) -> Turn[Any]:
    """Run a layer of either kind: (x, this device's share of the auxiliary losses, sums to report)."""
    result = yield from as_turn(layer, x_BLD, packing, plan, experts)
    return result if isinstance(result, tuple) else (result, vary(jnp.zeros(())), {})


class EmbeddingAndHead(nnx.Module):
    """The parts before and after the layers: the embedding table, the final norm and the output head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        d, v, std, dtype = config.embed_dim, config.padded_vocab_size, config.init_std, config.param_dtype
        self.table = parameter(rngs, (v, d), ("vocab", "embed"), std, dtype)
        declare_norm(self, "norm", d, config, rngs)
        if not config.tie_embeddings:
            self.head = parameter(rngs, (d, v), ("embed", "vocab"), std, dtype)
        if config.learned_positions:
            self.positions = parameter(rngs, (config.learned_positions, d), ("positions", "embed"), std, dtype)

    def embed(self, tokens_BL: jax.Array, positions_BL: jax.Array) -> jax.Array:
        """Look tokens up in this device's share of the table; the shares' sum leaves each device its slice of the length.

        With a table of positions, the row of each position is added.
        """
        # Looked up in float32, so that the transpose adds many rows of gradient in float32.
        dtype, table_VD = self.table[...].dtype, self.table[...].astype(jnp.float32)
        local = tokens_BL - lax.axis_index("tensor") * table_VD.shape[0]
        mine = (local >= 0) & (local < table_VD.shape[0])
        x_BLD = jnp.where(mine[..., None], table_VD[jnp.clip(local, 0, table_VD.shape[0] - 1)], 0) * self.config.embedding_scale
        if self.config.learned_positions:
            x_BLD = x_BLD + once(self.positions[...].astype(jnp.float32)[positions_BL], ("tensor",))
        return reduce_scatter(x_BLD.astype(dtype), "tensor", dim=1)

    def head_DV(self) -> jax.Array:
        """Return the output projection; with tied embeddings the transposed table."""
        head, dims = self.head_with_dims()
        return head if dims == "DV" else head.T

    def head_with_dims(self) -> tuple[jax.Array, str]:
        """Return the output projection as it is held, and its dims: of few rows XLA:CPU multiplies a table [V, D] faster so."""
        return (self.table[...], "VD") if self.config.tie_embeddings else (self.head[...], "DV")

    def head_input(self, x_BLD: jax.Array) -> jax.Array:
        """Return what the output projection reads: logit_scale norm(x)."""
        x_BLD, scale = normalise(self, "norm", x_BLD, self.config), self.config.logit_scale
        return x_BLD if scale == 1 else (x_BLD * scale).astype(x_BLD.dtype)
