"""Model FLOPs and parameter counts of the decoder, in closed form.

Notation: D embed_dim, H query heads, K kv heads, N head_dim, F mlp_dim, V vocab_size, L sequence length.

**Parameters.** A layer has the projections Q (D x HN), K and V (D x KN each), O (HN x D) and SwiGLU's gate, up and down
(D x F each):

    P_layer = 2 D H N + 2 D K N + 3 D F

plus two RMSNorm scales (D each) and, with QK-norm, two of N. The model adds the embedding table (V x D), the final norm (D)
and, untied, the output projection (D x V).

**FLOPs.** Multiplying by a weight costs one multiply-add, 2 FLOPs, per token in the forward pass; the backward pass does it
twice more (for the input's gradient and for the weight's). So every parameter that is multiplied costs 6 FLOPs a token:

    P_matmul = num_layers P_layer + D V        (the output projection is a matmul whether it is tied or not)

The embedding lookup multiplies nothing and is not counted, nor are norms, RoPE, softmax and activations (all of them well
below 1%), nor the rows that only pad the vocabulary, nor anything that remat computes again: these are *model* FLOPs.

**Attention.** Per layer and token, QK^T and PV are each H N multiply-adds per key: 2 * 2 H N L FLOPs over L keys, forward;
three times that with the backward pass:

    A = 12 L H N per layer per token

This is the convention "full": the whole L x L square counts although half of it is masked (PaLM, appendix B; torchtitan;
nanochat). The convention "causal" counts half of it, as Megatron-LM does. Document masks change neither: figures stay
comparable between data sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtrain.config import ModelConfig

Convention = Literal["full", "causal"]
"""How attention's FLOPs are counted: over the whole square, or over half of it."""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters, without the rows that only pad the vocabulary."""

    embedding: int
    """The embedding table, V D."""
    output: int
    """The output projection, V D; 0 if it is tied to the embedding table."""
    layers: int
    """All decoder layers with their norms."""
    final_norm: int
    """The scale of the last RMSNorm, D."""
    matmul: int
    """Parameters that every token is multiplied by: the layers' projections and the (tied or untied) output projection."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.output + self.layers + self.final_norm

    @property
    def non_embedding(self) -> int:
        """All but the embedding table and the output projection: N of Kaplan et al. 2020."""
        return self.layers + self.final_norm


def num_parameters(model: ModelConfig) -> ParameterCount:
    """Parameters of the decoder (formulas above)."""
    width = model.embed_dim
    attention = 2 * width * model.head_dim * (model.num_heads + model.num_kv_heads)
    projections = model.num_layers * (attention + 3 * width * model.mlp_dim)
    norms = model.num_layers * (2 * width + (2 * model.head_dim if model.qk_norm else 0))
    table = model.vocab_size * width
    return ParameterCount(
        embedding=table,
        output=0 if model.tie_embeddings else table,
        layers=projections + norms,
        final_norm=width,
        matmul=projections + table,
    )


def attention_flops_per_token(model: ModelConfig, sequence_length: int, convention: Convention) -> int:
    """FLOPs of QK^T and PV a token, forward and backward, all layers: 12 L H N per layer, or half of it if causal."""
    per_layer = {"full": 12, "causal": 6}[convention] * sequence_length * model.num_heads * model.head_dim
    return model.num_layers * per_layer


def model_flops_per_token(model: ModelConfig, sequence_length: int, convention: Convention) -> int:
    """Model FLOPs of a training step a token: 6 P_matmul + attention (formulas above)."""
    return 6 * num_parameters(model).matmul + attention_flops_per_token(model, sequence_length, convention)


def model_flops_per_step(model: ModelConfig, sequence_length: int, global_batch_size: int, convention: Convention) -> int:
    """Model FLOPs of a whole training step over all devices: tokens in the global batch times FLOPs a token."""
    return global_batch_size * sequence_length * model_flops_per_token(model, sequence_length, convention)


def mfu(flops_per_second_per_device: float, peak_flops: float | None) -> float | None:
    """Model FLOPs utilisation: the share of the chip's peak FLOP/s that went into model FLOPs. None if the peak is unknown."""
    return None if peak_flops is None else flops_per_second_per_device / peak_flops
