"""Qwen3: RMSNorm on every head of queries and keys."""

from __future__ import annotations

from jaxtrain.huggingface import rows
from jaxtrain.huggingface.families.qwen2 import WINDOWS
from jaxtrain.huggingface.fields import Family, biases, fixed, standard
from jaxtrain.huggingface.rope import rope

FAMILY = Family("qwen3", "Qwen3ForCausalLM", (*standard(), rope(), WINDOWS, biases(), fixed(qk_norm="head")), rows.llama)
