"""Gemma 2: norms before and after each block, soft caps, every second layer local."""

from __future__ import annotations

from functools import partial

from jaxtrain.huggingface import rows
from jaxtrain.huggingface.families import gemma
from jaxtrain.huggingface.fields import ACTIVATIONS, Family, Part, fixed, ignored, layers, same, standard
from jaxtrain.huggingface.rope import rope

NORMS = {"attention/norm": "input_layernorm", "attention/post_norm": "post_attention_layernorm"}
NORMS |= {"mlp/norm": "pre_feedforward_layernorm", "mlp/post_norm": "post_feedforward_layernorm"}


def _whole(number: float) -> float:
    """Return the whole number where it is one up to rounding."""
    return round(number) if abs(number - round(number)) < 1e-9 * number else number


SHARED = (
    # As `transformers` reads it: the models were trained with the tanh form.
    *standard(tied=True, activation="hidden_activation", activations=ACTIVATIONS | {"gelu": "gelu_tanh"}),
    ignored("hidden_act"),  # `transformers` reads hidden_activation alone; published files have both
    *gemma.SHARED,
    fixed(norm_placement="both"),
    Part(
        lambda fields: {"attention_scale": fields.take("query_pre_attn_scalar") ** -0.5},
        lambda model: {"query_pre_attn_scalar": _whole(model.attention_scale**-2)},
    ),
    same("attn_logit_softcapping", "attention_softcap", 0.0, or_null=True),
    same("final_logit_softcapping", "logit_softcap", 0.0, or_null=True),
)
"""What Gemma 3 shares."""
weights = partial(rows.llama, norms=NORMS)
FAMILY = Family("gemma2", "Gemma2ForCausalLM", (*SHARED, rope(), layers(lambda _, i: i % 2 == 0)), weights)
