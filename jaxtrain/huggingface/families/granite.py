"""Granite 3: Llama with factors on embeddings, attention, blocks and logits."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.families.llama import read as read_llama
from jaxtrain.huggingface.families.llama import write as write_llama
from jaxtrain.huggingface.fields import Family, Fields


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json; logits are divided by logits_scaling."""
    return read_llama(fields) | {
        "embedding_scale": fields.take("embedding_multiplier", 1.0),
        "attention_scale": fields.take("attention_multiplier", 1.0),
        "residual_scale": fields.take("residual_multiplier", 1.0),
        "logit_scale": 1 / fields.take("logits_scaling", 1.0),
    }


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    own = {"embedding_multiplier": model.embedding_scale, "attention_multiplier": model.attention_scale}
    own |= {"residual_multiplier": model.residual_scale, "logits_scaling": 1 / model.logit_scale}
    shared = write_llama(model) | own
    del shared["head_dim"]
    return shared


FAMILY = Family("granite", "GraniteForCausalLM", read, write, rows.llama)
