"""Llama 2, 3, 3.1 and 3.2."""

from __future__ import annotations

from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import Family, biases, same, standard
from jaxtrain.huggingface.rope import rope

PARTS = (*standard(), rope(), biases(), same("mlp_bias", "mlp_bias", False))
FAMILY = Family("llama", "LlamaForCausalLM", PARTS, rows.llama, [r".*rotary_emb\.inv_freq"])
