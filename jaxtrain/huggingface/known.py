"""The list of families: `families/README.md` says how to add one."""

from __future__ import annotations

from jaxtrain.huggingface.families import (
    cohere,
    deepseek_v2,
    deepseek_v3,
    gemma,
    gemma2,
    gemma3,
    glm4_moe,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from jaxtrain.huggingface.fields import Family

MODULES = (
    llama,
    mistral,
    qwen2,
    qwen3,
    qwen3_moe,
    mixtral,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    olmo2,
    olmoe,
    phi3,
    smollm3,
    granite,
    cohere,
    glm4_moe,
    deepseek_v3,
    deepseek_v2,
    gpt_oss,
)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in MODULES}
"""By config.json's `model_type`. A model of ours is exported as the first that can express it."""
