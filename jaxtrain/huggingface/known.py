"""The list of families: `families/README.md` says how to add one."""

from __future__ import annotations

from importlib import import_module

from jaxtrain.huggingface.fields import Family

NAMES = (
    "llama mistral qwen2 qwen3 qwen3_moe mixtral gemma gemma2 gemma3 gpt2 gpt_neox olmo2 olmoe phi3 smollm3 granite cohere "
    "glm4_moe deepseek_v3 deepseek_v2 gpt_oss"
).split()
"""Modules of `families`, in the order in which a model of ours is exported as the first that can express it."""
_LISTED: list[Family] = [import_module(f"jaxtrain.huggingface.families.{name}").FAMILY for name in NAMES]
FAMILIES = {family.model_type: family for family in _LISTED}
"""By config.json's `model_type`."""
