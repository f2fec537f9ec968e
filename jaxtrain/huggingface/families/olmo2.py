"""OLMo 2: norms after each block only, and norms on queries and keys over the whole width."""

from __future__ import annotations

from functools import partial

from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import Family, biases, fixed, standard
from jaxtrain.huggingface.rope import rope

NORMS = {"attention/post_norm": "post_attention_layernorm", "mlp/post_norm": "post_feedforward_layernorm"}
PARTS = (*standard(), rope(), biases(), fixed(norm_placement="post", qk_norm="width"))
FAMILY = Family("olmo2", "Olmo2ForCausalLM", PARTS, partial(rows.llama, norms=NORMS))
