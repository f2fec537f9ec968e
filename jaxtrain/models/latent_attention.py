"""Multi-head latent attention: queries, keys and values are projected up from small latents.

Shape letters: B batch, L length, D embed, H heads, N width of the part of a head without position, R width of the part that
RoPE turns, M width of a value, Q and C widths of the latents of queries, and of keys and values. In the manual region L of the
residual stream is this device's slice over `tensor`, and H its share over `tensor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.config import LatentAttentionConfig, ModelConfig
from jaxtrain.models.block import Block
from jaxtrain.models.packing import Packing
from jaxtrain.models.parameters import parameter
from jaxtrain.models.positions import with_positions
from jaxtrain.ops.attention_context import AttentionPlan
from jaxtrain.ops.matmul import multiply
from jaxtrain.ops.norm import rms_norm
from jaxtrain.parallel.turns import Turn
from jaxtrain.sharding import all_gather, reduce_scatter


class LatentAttention(Block):
    """x + softmax(Q K^T / sqrt(N + R)) V W_out (DeepSeek-V2, arXiv:2405.04434, section 2.1; V3, arXiv:2412.19437, 2.1.1).

    With h = RMSNorm(x), a head has
        query = [c_q W_q, rope(c_q W_qr)],  key = [c W_k, rope(h W_kr)],  value = c W_v,
        c_q = RMSNorm(h W_dq),  c = RMSNorm(h W_dkv);
    the turned part of the key is one for all heads. With query_rank=0 c_q is h itself. RoPE pairs a head's halves, as
    everywhere in this model, where DeepSeek's own checkpoints pair neighbours (their columns are permuted on conversion).

    The latents are computed on the sequence shards of `tensor` and gathered together: Q + C + R numbers per token instead of
    D. Then each device projects up to its own heads.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.latent_attention is not None
        self.config, latent = config, config.latent_attention
        d, h, n = config.embed_dim, config.num_heads, config.head_dim
        q, c, r, m = latent.query_rank, latent.kv_rank, latent.rope_dim, latent.value_dim
        std, dtype = config.init_std, config.param_dtype
        self.declare_norms(rngs)
        if q:
            self.query_down = parameter(rngs, (d, q), ("embed", "rank"), std, dtype)
            self.query_norm = parameter(rngs, (q,), ("norm",), None, dtype)
        into_queries = (q, "latent") if q else (d, "embed")
        self.query_up = parameter(rngs, (into_queries[0], h, n + r), (into_queries[1], "heads", "head_dim"), std, dtype)
        self.kv_down = parameter(rngs, (d, c), ("embed", "rank"), std, dtype)
        self.kv_norm = parameter(rngs, (c,), ("norm",), None, dtype)
        self.rope_key = parameter(rngs, (d, r), ("embed", "rank"), std, dtype)
        self.key_up = parameter(rngs, (c, h, n), ("latent", "heads", "head_dim"), std, dtype)
        self.value_up = parameter(rngs, (c, h, m), ("latent", "heads", "head_dim"), std, dtype)
        out_std = std / math.sqrt(2 * config.num_layers)
        self.out = parameter(rngs, (h, m, d), ("heads", "head_dim", "embed"), out_std, dtype)

    @property
    def latent(self) -> LatentAttentionConfig:
        """The block's own part of the config."""
        assert self.config.latent_attention is not None
        return self.config.latent_attention

    def _latents(self, x_BLD: jax.Array) -> list[jax.Array]:
        """Return over the whole length: the queries' latent, the latent of keys and values, the key's part for RoPE."""
        epsilon = self.config.norm_epsilon
        h_BLD = self.normed(x_BLD)
        c_BLC = rms_norm(multiply("BLD,DC->BLC", h_BLD, self.kv_down[...]), self.kv_norm[...], epsilon)
        turned_BLR = multiply("BLD,DR->BLR", h_BLD, self.rope_key[...])
        if not self.latent.query_rank:
            parts = [h_BLD, c_BLC, turned_BLR]
        else:
            q_BLQ = multiply("BLD,DQ->BLQ", h_BLD, self.query_down[...])
            parts = [rms_norm(q_BLQ, self.query_norm[...], epsilon), c_BLC, turned_BLR]
        ends = [parts[0].shape[-1], parts[0].shape[-1] + parts[1].shape[-1]]
        return jnp.split(all_gather(jnp.concatenate(parts, axis=-1), "tensor", dim=1), ends, axis=-1)

    def __call__(self, x_BLD: jax.Array, packing: Packing, plan: AttentionPlan) -> Turn[jax.Array]:
        config = self.config
        x_BLD = yield x_BLD
        q_BLQ, c_BLC, turned_BLR = yield self._latents(x_BLD)

        def turn(x_BLHR: jax.Array) -> jax.Array:
            return with_positions(x_BLHR, packing, config)

        q_BLHN = checkpoint_name(multiply("BLQ,QHN->BLHN", q_BLQ, self.query_up[...]), "query")
        if plan.absorbs:
            out_BLD = yield from self._absorbed(q_BLHN, c_BLC, turn(turned_BLR[:, :, None]), turn, plan)
            return self.joined(x_BLD, out_BLD)
        k_BLHN = checkpoint_name(multiply("BLC,CHN->BLHN", c_BLC, self.key_up[...]), "key")
        v_BLHM = checkpoint_name(multiply("BLC,CHM->BLHM", c_BLC, self.value_up[...]), "value")
        q_BLHN, k_BLHN, v_BLHM = yield (q_BLHN, k_BLHN, v_BLHM)
        q_plain, q_turned = jnp.split(q_BLHN, [config.head_dim], axis=-1)
        q_BLHN = jnp.concatenate([q_plain, turn(q_turned)], axis=-1)
        k_turned = jnp.broadcast_to(turn(turned_BLR[:, :, None]), (*k_BLHN.shape[:3], turned_BLR.shape[-1]))
        k_BLHN = jnp.concatenate([k_BLHN, k_turned], axis=-1)
        with jax.named_scope("attention"):
            a_BLHM = plan.attend(q_BLHN, k_BLHN, v_BLHM, segments_BL=packing.segments, residual_name="attention")
        out_BLD = yield multiply("BLHM,HMD->BLD", a_BLHM, self.out[...])
        out_BLD = reduce_scatter(out_BLD, "tensor", dim=1)
        return self.joined(x_BLD, checkpoint_name(out_BLD, "attention_out"))

    def _absorbed(
        self, q_BLHN: jax.Array, c_BLC: jax.Array, turned_BL1R: jax.Array, turn: Callable[[jax.Array], jax.Array], plan: Any
    ) -> Turn[jax.Array]:
        """Return the block's output by attention to the latents: one key head [c, rope(h W_kr)], whose value is c.

        q W_k^T c = (W_k q) c, and sum w (W_v c) = W_v sum w c: so a cache holds latents alone (arXiv:2405.04434, 2.1.2).
        """
        q_plain, q_turned = jnp.split(q_BLHN, [self.config.head_dim], axis=-1)
        q_BLHC = yield jnp.einsum("BLHN,CHN->BLHC", q_plain, self.key_up[...])
        q_BLHE = jnp.concatenate([q_BLHC, turn(q_turned)], axis=-1)
        k_BL1E = jnp.concatenate([c_BLC[:, :, None], turned_BL1R], axis=-1)
        a_BLHC = plan.attend(q_BLHE, k_BL1E, None, head_dim=q_BLHN.shape[-1], value_dim=c_BLC.shape[-1])
        a_BLHM = jnp.einsum("BLHC,CHM->BLHM", a_BLHC, self.value_up[...])
        return reduce_scatter((yield multiply("BLHM,HMD->BLD", a_BLHM, self.out[...])), "tensor", dim=1)
