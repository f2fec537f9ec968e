"""Mistral: Llama with a sliding window."""

from __future__ import annotations

from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import Family, same, standard
from jaxtrain.huggingface.rope import rope

PARTS = (*standard(), rope(), same("sliding_window", "sliding_window", 0, or_null=True))
FAMILY = Family("mistral", "MistralForCausalLM", PARTS, rows.llama, [r".*rotary_emb\.inv_freq"])
