"""GPT-NeoX and Pythia: attention and MLP side by side, part of each head rotated, one projection for q, k and v."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import Family, Fields, standard, standard_back
from jaxtrain.huggingface.rope import read_rope, write_rope
from jaxtrain.huggingface.rows import linear
from jaxtrain.huggingface.table import Row

LAYER = "gpt_neox.layers.{layer}."


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json."""
    fields.take("num_key_value_heads", None)  # not a field of this family
    model = standard(fields, activation="hidden_act") | read_rope(fields, 1e4, "rotary_emb_base", "rotary_pct")
    return model | {
        "norm": "layer",
        "norm_bias": True,
        "norm_epsilon": fields.take("layer_norm_eps", 1e-5),
        "gated_mlp": False,
        "mlp_bias": True,
        "attention_bias": "all" if fields.take("attention_bias", True) else "none",
        "residual": "parallel" if fields.take("use_parallel_residual", True) else "sequential",
    }


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    own = {"layer_norm_eps": model.norm_epsilon, "use_parallel_residual": model.residual == "parallel"}
    own |= {"attention_bias": model.attention_bias == "all"}
    shared = standard_back(model)
    for name in ("head_dim", "num_key_value_heads", "rms_norm_eps"):
        del shared[name]
    rope = write_rope(model)
    rope["rope_parameters"]["partial_rotary_factor"] = model.rope_fraction
    return shared | rope | own


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


UNNEEDED = [r".*attention\.(masked_)?bias", r".*rotary_emb\.inv_freq"]
FAMILY = Family("gpt_neox", "GPTNeoXForCausalLM", read, write, weights, UNNEEDED)
