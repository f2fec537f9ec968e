"""Granite 3: Llama with factors on embeddings, attention, blocks and logits."""

from __future__ import annotations

from jaxtrain.huggingface import rows
from jaxtrain.huggingface.families import llama
from jaxtrain.huggingface.fields import Family, Part, same

FACTORS = (
    same("embedding_multiplier", "embedding_scale", 1.0),
    same("attention_multiplier", "attention_scale", 1.0),
    same("residual_multiplier", "residual_scale", 1.0),
    # Logits are divided by logits_scaling.
    Part(
        lambda fields: {"logit_scale": 1 / fields.take("logits_scaling", 1.0)},
        lambda model: {"logits_scaling": 1 / model.logit_scale},
    ),
)
FAMILY = Family("granite", "GraniteForCausalLM", (*llama.PARTS, *FACTORS), rows.llama, left_out=["head_dim"])
