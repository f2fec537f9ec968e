"""OLMoE: a mixture of experts in every layer, and norms on queries and keys over the whole width."""

from __future__ import annotations

from jaxtrain.huggingface import rows
from jaxtrain.huggingface.families.qwen3_moe import EXPERTS
from jaxtrain.huggingface.fields import WIDTH, Family, biases, expects, fixed, mixture, standard
from jaxtrain.huggingface.rope import rope

OWN = (expects("clip_qkv"), fixed(qk_norm="width"), mixture(*EXPERTS, WIDTH))
FAMILY = Family("olmoe", "OlmoeForCausalLM", (*standard(), rope(), biases(), *OWN), rows.llama)
