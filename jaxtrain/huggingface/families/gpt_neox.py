"""GPT-NeoX and Pythia: attention and MLP side by side, part of each head rotated, one projection for q, k and v."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import Family, Part, biases, fixed, flag, ignored, same, standard
from jaxtrain.huggingface.rope import rope, write_rope
from jaxtrain.huggingface.rows import linear
from jaxtrain.huggingface.table import Row

LAYER = "gpt_neox.layers.{layer}."


def rope_back(model: ModelConfig) -> dict[str, Any]:
    """Return RoPE's fields, always with the fraction of a head that is rotated: by default it is a quarter here."""
    found = write_rope(model)
    found["rope_parameters"]["partial_rotary_factor"] = model.rope_fraction
    return found


def weights(model: ModelConfig) -> list[Row]:
    """Return the rows."""
    found = rows.outer(model, "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out")
    found += rows.norm("layers/attention/norm", f"{LAYER}input_layernorm", model)
    found += rows.norm("layers/mlp/norm", f"{LAYER}post_attention_layernorm", model)
    biased = model.attention_bias != "none"
    for number, name in enumerate(("query", "key", "value")):
        axes = f"(H {number}/3 N) D -> D H N"
        found += linear(f"layers/attention/{name}", f"{LAYER}attention.query_key_value", axes, biased)
    found += [Row("layers/attention/out", f"{LAYER}attention.dense.weight", "D (H N) -> H N D")]
    found += [Row("layers/attention/out_bias", f"{LAYER}attention.dense.bias", "D -> D")] if biased else []
    found += linear("layers/mlp/up", f"{LAYER}mlp.dense_h_to_4h", "F D -> D F", True)
    return found + linear("layers/mlp/down", f"{LAYER}mlp.dense_4h_to_h", "D F -> F D", True)


PARTS = (
    ignored("num_key_value_heads"),  # not a field of this family
    *standard(),
    Part(rope(1e4, "rotary_emb_base", "rotary_pct").read, rope_back),
    fixed(norm="layer", norm_bias=True, gated_mlp=False, mlp_bias=True),
    same("layer_norm_eps", "norm_epsilon", 1e-5),
    biases(default=True),
    flag("use_parallel_residual", "residual", "parallel", "sequential", default=True),
)
UNNEEDED = [r".*attention\.(masked_)?bias", r".*rotary_emb\.inv_freq"]
LEFT_OUT = ["head_dim", "num_key_value_heads", "rms_norm_eps"]
FAMILY = Family("gpt_neox", "GPTNeoXForCausalLM", PARTS, weights, UNNEEDED, LEFT_OUT)
