"""Gemma: norms scaled by 1 + weight, GeGLU, embeddings times the square root of the width."""

from __future__ import annotations

import math

from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import Family, Part, biases, expects, fixed, standard
from jaxtrain.huggingface.rope import rope

SHARED = (
    expects("use_bidirectional_attention", False),
    biases(),
    fixed(norm_offset=1.0),
    Part(lambda fields: {"embedding_scale": math.sqrt(fields.peek("hidden_size"))}),
)
"""What all Gemmas share."""
# As `transformers` reads it, whatever the older field says: the models were trained with the tanh form.
TANH = (expects("hidden_activation", "gelu_pytorch_tanh"), fixed(activation="gelu_tanh"))
FAMILY = Family("gemma", "GemmaForCausalLM", (*standard(tied=True), rope(), *SHARED, *TANH), rows.llama)
