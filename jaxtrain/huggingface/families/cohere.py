"""Cohere's Command R: one LayerNorm for attention and MLP side by side, neighbours rotated, logits scaled."""

from __future__ import annotations

from functools import partial

from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import Family, biases, expects, fixed, same, standard, written
from jaxtrain.huggingface.rope import rope

OWN = (
    expects("use_qk_norm", False),
    written(use_qk_norm=False),
    fixed(norm="layer", residual="parallel_one_norm"),
    same("layer_norm_eps", "norm_epsilon", 1e-5),
    same("logit_scale", "logit_scale", 0.0625),
)
PARTS = (*standard(tied=True), rope(5e5), biases(), *OWN)
attention = partial(rows.attention, pairs=True)
weights = partial(rows.llama, own_attention=attention, norms={"attention/norm": "input_layernorm"})
FAMILY = Family("cohere", "CohereForCausalLM", PARTS, weights, left_out=["head_dim", "rms_norm_eps"])
