"""Model FLOPs and parameter counts of the decoder, in closed form.

Notation: D embed_dim, H query heads, K kv heads, N head_dim, F mlp_dim, V vocab_size, L sequence length.

**Parameters.** A dense layer has the projections Q (D x HN), K and V (D x KN each), O (HN x D) and SwiGLU's gate, up and down
(D x F each):

    P_attention = 2 D H N + 2 D K N,    P_mlp = 3 D F

(without a gate 2 D F) plus two norm scales (D each) and, with QK-norm, two of N, or of HN and KN. `_vectors` counts further
norms, biases and sinks where the settings have them. The model adds the embedding table (V x D), the final norm (D)
and, untied, the output projection (D x V).

Latent attention, with ranks Q of queries and C of keys and values, RoPE width R and value width M, has

    P_attention = D Q + Q H (N + R) + D (C + R) + C H (N + M) + H M D        (without Q: D H (N + R) for the first two)

and two more norms, of Q and C. A mixture of E experts of width F_e, S of them shared, has the router and its experts,

    P_mlp = D E + 3 D F_e (E + S)

and, where it is used, a bias of E. A token goes through k of the E experts: its *active* parameters have k in place of E.

**FLOPs.** Multiplying by a weight costs one multiply-add, 2 FLOPs, per token in the forward pass; the backward pass does it
twice more (for the input's gradient and for the weight's). So every parameter that is multiplied costs 6 FLOPs a token:

    P_matmul = sum over layers of the active P_attention + P_mlp, + D V   (the output projection is a matmul, tied or not)

The embedding lookup multiplies nothing and is not counted, nor are norms, RoPE, softmax and activations (all of them well
below 1%), nor the rows that only pad the vocabulary, nor what capacity leaves empty or drops, nor anything that remat computes
again: these are *model* FLOPs.

**Attention.** Per layer and token, QK^T and PV are each H N multiply-adds per key: 2 * 2 H N L FLOPs over L keys, forward;
three times that with the backward pass:

    A = 12 L H N per layer per token        (latent attention: 6 L H (N + R + M))

This is the convention "full": the whole L x L square counts although half of it is masked (PaLM, appendix B; torchtitan;
nanochat). The convention "causal" counts half of it, as Megatron-LM does. With a sliding window of W < L tokens a query sees
W - W^2 / 2L keys in the mean, where without it is L / 2: L is replaced by twice that. Document masks change neither: figures
stay comparable between data sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxtrain.config import Config, ModelConfig
from jaxtrain.parts import plugged

Convention = Literal["full", "causal"]
"""Whether attention's FLOPs count the whole square or half of it."""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters, without the rows that pad the vocabulary."""

    embedding: int
    """The embedding table, V D, and that of positions."""
    output: int
    """The output projection, V D; 0 if it is tied to the embedding table."""
    layers: int
    """All decoder layers with their norms."""
    final_norm: int
    """The scale of the last norm, D, and its bias."""
    matmul: int
    """Parameters in a token's matmuls: the layers' projections and the (tied or untied) output projection."""
    idle: int
    """Parameters of the experts that a token does not use; 0 for a dense model."""

    @property
    def total(self) -> int:
        return self.embedding + self.output + self.layers + self.final_norm

    @property
    def non_embedding(self) -> int:
        """All but the embedding table and the output projection: N of Kaplan et al. 2020."""
        return self.layers + self.final_norm


def _attention_parameters(model: ModelConfig) -> tuple[int, int]:
    """(projections, vectors) of one layer's attention, without the norm of its input."""
    width, heads, latent = model.embed_dim, model.num_heads, model.latent_attention
    if latent is None:
        queries, keys = heads * model.head_dim, model.num_kv_heads * model.head_dim
        vectors = {"none": 0, "head": 2 * model.head_dim, "width": queries + keys}[model.qk_norm]
        vectors += {"none": 0, "qkv": queries + 2 * keys, "all": queries + 2 * keys + width}[model.attention_bias]
        return 2 * width * (queries + keys), vectors + (heads if model.attention_sinks else 0)
    head, rank = model.head_dim + latent.rope_dim, latent.query_rank
    queries = width * rank + rank * heads * head if rank else width * heads * head
    down, up = width * (latent.kv_rank + latent.rope_dim), latent.kv_rank * heads * (model.head_dim + latent.value_dim)
    return queries + down + up + heads * latent.value_dim * width, rank + latent.kv_rank


def _vectors(model: ModelConfig) -> tuple[int, int, int]:
    """(norms of a layer, biases of its MLP, biases of its experts and their router): numbers of parameters."""
    width, moe, matrices = model.embed_dim, model.moe, 2 if model.gated_mlp else 1
    norms = {"pre": 2, "post": 2, "both": 4}[model.norm_placement] - (model.residual == "parallel_one_norm")
    experts = 0
    if moe:
        experts = moe.num_experts * (moe.router_bias + moe.has_selection_bias)
        experts += moe.num_experts * (matrices * moe.mlp_dim + width) if model.mlp_bias else 0
    biases = matrices * model.mlp_dim + width if model.mlp_bias else 0
    return norms * width * (1 + model.norm_bias), biases, experts


def num_parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of the decoder (formulas above); of one with parts that are plugged in, as they declare them."""
    if plugged(model.parts):
        return _count_declared(model)
    width, moe, dense_layers = model.embed_dim, model.moe, model.num_layers
    attention, attention_vectors = _attention_parameters(model)
    norms, mlp_biases, expert_biases = _vectors(model)
    projections = idle = 0
    if moe:
        dense_layers, expert = model.first_dense_layers, 3 * width * moe.mlp_dim
        projections = model.stacked_layers * (width * moe.num_experts + expert * (moe.num_experts + moe.shared_experts))
        idle = model.stacked_layers * expert * (moe.num_experts - moe.experts_per_token)
    projections += model.num_layers * attention + dense_layers * (3 if model.gated_mlp else 2) * width * model.mlp_dim
    vectors = model.num_layers * (norms + attention_vectors) + dense_layers * mlp_biases + model.stacked_layers * expert_biases
    table = model.vocab_size * width
    return ParameterCount(
        embedding=table + model.learned_positions * width,
        output=0 if model.tie_embeddings else table,
        layers=projections + vectors,
        final_norm=width * (1 + model.norm_bias),
        matmul=projections - idle + table,
        idle=idle,
    )


def describe_parameters(config: Config) -> str:
    """Return a config's numbers of parameters in words; with adapters or frozen parameters also that of the trained ones.

    Raises:
      ConfigError: lora.targets or train.frozen names no parameter.
    """
    from jaxtrain.models.trained import describe_trained

    count = num_parameters(config.model)
    return f"{count.total:,} parameters ({count.non_embedding:,} without embeddings){describe_trained(config)}"


def _count_declared(model: ModelConfig) -> ParameterCount:
    """Return the parameters by the shapes that the decoder declares; leaves of two dims and more are matrices."""
    import jax

    from jaxtrain.models.decoder import initialize

    numbers = np.arange(model.stacked_layers)[None, None]
    shapes = jax.eval_shape(lambda: initialize(model.base, jax.random.key(0), numbers))
    layers = jax.tree.leaves(shapes["layers"])
    first = jax.tree.leaves(shapes["outer"].get("first_layers", {}))
    table = model.vocab_size * model.embed_dim
    matrices = sum(leaf.size for leaf in layers if leaf.ndim >= 5) + sum(leaf.size for leaf in first if leaf.ndim >= 3)
    moe, idle = model.moe, 0
    if moe and model.parts.layer is None:
        idle = 3 * model.embed_dim * moe.mlp_dim * model.stacked_layers * (moe.num_experts - moe.experts_per_token)
    return ParameterCount(
        embedding=table,
        output=0 if model.tie_embeddings else table,
        layers=sum(leaf.size for leaf in (*layers, *first)),
        final_norm=model.embed_dim,
        matmul=matrices - idle + table,
        idle=idle,
    )


def attention_flops_per_token(model: ModelConfig, sequence_length: int, convention: Convention) -> int:
    """Return the FLOPs of QK^T and PV per token, forward and backward, all layers (formula above)."""
    latent, length = model.latent_attention, sequence_length
    widths = model.head_dim + latent.rope_dim + latent.value_dim if latent else 2 * model.head_dim
    pairs = 0  # twice the (query, visible key) pairs of all layers: a layer's full square without a window
    for layer in range(model.num_layers):
        window = min(model.window_of(model.kinds[layer % len(model.kinds)]) or length, length)
        pairs += 2 * window * length - window**2
    per_sequence = 6 * pairs * model.num_heads * widths
    return per_sequence // ({"full": 1, "causal": 2}[convention] * length)


def model_flops_per_token(model: ModelConfig, sequence_length: int, convention: Convention) -> int:
    """Return the model FLOPs of a training step per token: 6 P_matmul + attention (formulas above)."""
    return 6 * num_parameters(model).matmul + attention_flops_per_token(model, sequence_length, convention)


def model_flops_per_step(model: ModelConfig, sequence_length: int, global_batch_size: int, convention: Convention) -> int:
    """Return the model FLOPs of a training step over all devices: tokens in the global batch x FLOPs per token."""
    return global_batch_size * sequence_length * model_flops_per_token(model, sequence_length, convention)


def mfu(flops_per_second_per_device: float, peak_flops: float | None) -> float | None:
    """model FLOP/s per device / the chip's peak FLOP/s; None if the peak is unknown."""
    return None if peak_flops is None else flops_per_second_per_device / peak_flops
