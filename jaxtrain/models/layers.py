"""The decoder's modules: parameters declared in one place (shape, initializer, logical dims) beside the forward code.

Shape letters: B batch, L length, D embed, H query heads, K kv heads, N head_dim, F mlp, V vocab. Inside the manual region L of
the residual stream is this device's slice over `tensor` (sequence sharding), and H, K, F and V are its share over `tensor`.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.config import ModelConfig
from jaxtrain.models.latent_attention import LatentAttention
from jaxtrain.models.moe import MoE
from jaxtrain.models.packing import Packing
from jaxtrain.models.parameters import parameter
from jaxtrain.ops.attention_context import AttentionPlan, context_attention
from jaxtrain.ops.expert_dispatch import ExpertBackend
from jaxtrain.ops.norm import rms_norm
from jaxtrain.ops.rope import rope
from jaxtrain.parallel.turns import Turn, scoped
from jaxtrain.sharding import all_gather, reduce_scatter, vary


class Attention(nnx.Module):
    """x + softmax(Q K^T / sqrt(N)) V W_out, with Q, K, V = projections of RMSNorm(x), RoPE on Q and K."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        d, h, k, n = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        std, dtype = config.init_std, config.param_dtype
        self.norm = parameter(rngs, (d,), ("norm",), None, dtype)
        self.query = parameter(rngs, (d, h, n), ("embed", "heads", "head_dim"), std, dtype)
        self.key = parameter(rngs, (d, k, n), ("embed", "kv_heads", "head_dim"), std, dtype)
        self.value = parameter(rngs, (d, k, n), ("embed", "kv_heads", "head_dim"), std, dtype)
        out_std = std / math.sqrt(2 * config.num_layers)
        self.out = parameter(rngs, (h, n, d), ("heads", "head_dim", "embed"), out_std, dtype)
        if config.qk_norm:
            self.query_norm = parameter(rngs, (n,), ("norm",), None, dtype)
            self.key_norm = parameter(rngs, (n,), ("norm",), None, dtype)

    def __call__(self, x_BLD: jax.Array, packing: Packing, plan: AttentionPlan) -> Turn[jax.Array]:
        config = self.config
        x_BLD = yield x_BLD
        h_BLD = yield all_gather(rms_norm(x_BLD, self.norm[...], config.norm_epsilon), "tensor", dim=1)
        q_BLHN = checkpoint_name(jnp.einsum("BLD,DHN->BLHN", h_BLD, self.query[...]), "query")
        k_BLKN = checkpoint_name(jnp.einsum("BLD,DKN->BLKN", h_BLD, self.key[...]), "key")
        v_BLKN = checkpoint_name(jnp.einsum("BLD,DKN->BLKN", h_BLD, self.value[...]), "value")
        q_BLHN, k_BLKN, v_BLKN = yield (q_BLHN, k_BLKN, v_BLKN)
        if config.qk_norm:
            q_BLHN = rms_norm(q_BLHN, self.query_norm[...], config.norm_epsilon)
            k_BLKN = rms_norm(k_BLKN, self.key_norm[...], config.norm_epsilon)
        q_BLHN = rope(q_BLHN, packing.positions, config.rope_theta, config.rope_scaling)
        k_BLKN = rope(k_BLKN, packing.positions, config.rope_theta, config.rope_scaling)
        with jax.named_scope("attention"):
            a_BLHN = context_attention(q_BLHN, k_BLKN, v_BLKN, plan, segments_BL=packing.segments, residual_name="attention")
        out_BLD = yield jnp.einsum("BLHN,HND->BLD", a_BLHN, self.out[...])
        out_BLD = reduce_scatter(out_BLD, "tensor", dim=1)
        return x_BLD + checkpoint_name(out_BLD, "attention_out")


class MLP(nnx.Module):
    """x + (silu(h W_gate) * (h W_up)) W_down with h = RMSNorm(x): SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        d, f, std, dtype = config.embed_dim, config.mlp_dim, config.init_std, config.param_dtype
        self.norm = parameter(rngs, (d,), ("norm",), None, dtype)
        self.gate = parameter(rngs, (d, f), ("embed", "mlp"), std, dtype)
        self.up = parameter(rngs, (d, f), ("embed", "mlp"), std, dtype)
        self.down = parameter(rngs, (f, d), ("mlp", "embed"), std / math.sqrt(2 * config.num_layers), dtype)

    def __call__(self, x_BLD: jax.Array) -> Turn[jax.Array]:
        x_BLD = yield x_BLD
        h_BLD = yield all_gather(rms_norm(x_BLD, self.norm[...], self.config.norm_epsilon), "tensor", dim=1)
        gate_BLF = yield checkpoint_name(jnp.einsum("BLD,DF->BLF", h_BLD, self.gate[...]), "mlp_gate")
        up_BLF = checkpoint_name(jnp.einsum("BLD,DF->BLF", h_BLD, self.up[...]), "mlp_up")
        # Not after the last matmul: the backward pass would recompute it only for the barrier.
        hidden_BLF = yield checkpoint_name(jax.nn.silu(gate_BLF) * up_BLF, "mlp_hidden")
        out_BLD = reduce_scatter(jnp.einsum("BLF,FD->BLD", hidden_BLF, self.down[...]), "tensor", dim=1)
        return x_BLD + checkpoint_name(out_BLD, "mlp_out")


class Layer(nnx.Module):
    """Attention, then MLP or mixture of experts, each added to the residual stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
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
        x_BLD = yield from scoped("attention_block", as_turn(self.attention, x_BLD, packing, plan))
        if not hasattr(self, "moe"):
            x_BLD = yield from scoped("mlp_block", as_turn(self.mlp, x_BLD))
            return x_BLD, vary(jnp.zeros(())), {}
        counted = vary(jnp.zeros(packing.positions.shape, bool)) if packing.counted is None else packing.counted
        scale = vary(jnp.zeros(())) if packing.scale is None else packing.scale
        return (yield from scoped("moe_block", self.moe(x_BLD, counted, scale, experts)))


def layer_kind(config: ModelConfig) -> tuple[type[nnx.Module], ModelConfig]:
    """Return (the class of the decoder's layers, its config)."""
    return config.parts.layer or Layer, config


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
        self.norm = parameter(rngs, (d,), ("norm",), None, dtype)
        if not config.tie_embeddings:
            self.head = parameter(rngs, (d, v), ("embed", "vocab"), std, dtype)

    def embed(self, tokens_BL: jax.Array) -> jax.Array:
        """Look tokens up in this device's share of the table; the shares' sum leaves each device its slice of the length."""
        # Looked up in float32, so that the transpose adds many rows of gradient in float32.
        dtype, table_VD = self.table[...].dtype, self.table[...].astype(jnp.float32)
        local = tokens_BL - lax.axis_index("tensor") * table_VD.shape[0]
        mine = (local >= 0) & (local < table_VD.shape[0])
        x_BLD = jnp.where(mine[..., None], table_VD[jnp.clip(local, 0, table_VD.shape[0] - 1)], 0)
        return reduce_scatter(x_BLD.astype(dtype), "tensor", dim=1)

    def head_DV(self) -> jax.Array:
        """Return the output projection; with tied embeddings the transposed table."""
        return self.table[...].T if self.config.tie_embeddings else self.head[...]
