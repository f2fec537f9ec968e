"""GPT-2: LayerNorm, learned positions, a plain MLP, biases, and matrices that are stored [inputs, outputs]."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import ACTIVATIONS, OF_ACTIVATION, Family, Fields
from jaxtrain.huggingface.table import Row

LAYER = "transformer.h.{layer}."


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json."""
    for name, value in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        fields.expect(name, value)
    fields.take("reorder_and_upcast_attn", None)  # only how it is computed
    width, heads = fields.take("n_embd"), fields.take("n_head")
    own = {"norm": "layer", "norm_bias": True, "gated_mlp": False, "mlp_bias": True, "attention_bias": "all"}
    return own | {
        "num_layers": fields.take("n_layer"),
        "embed_dim": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "mlp_dim": fields.take("n_inner", 4 * width),
        "vocab_size": fields.take("vocab_size"),
        "norm_epsilon": fields.take("layer_norm_epsilon", 1e-5),
        "tie_embeddings": fields.take("tie_word_embeddings", True),
        "activation": fields.one_of("activation_function", ACTIVATIONS, "gelu_new"),
        "learned_positions": fields.peek("n_positions", 1024),
    }


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    sizes = {"n_layer": model.num_layers, "n_embd": model.embed_dim, "n_head": model.num_heads, "n_inner": model.mlp_dim}
    sizes |= {"vocab_size": model.vocab_size, "n_positions": model.learned_positions}
    activation = "gelu_new" if model.activation == "gelu_tanh" else OF_ACTIVATION[model.activation]
    own = {"layer_norm_epsilon": model.norm_epsilon, "tie_word_embeddings": model.tie_embeddings}
    return sizes | own | {"activation_function": activation}


def weights(model: ModelConfig) -> list[Row]:
    """Return the rows."""
    found = rows.outer(model, "transformer.wte", "transformer.ln_f")
    found += [Row("outer/positions", "transformer.wpe.weight", "P D -> P D")]
    found += rows.norm("layers/attention/norm", f"{LAYER}ln_1", model) + rows.norm("layers/mlp/norm", f"{LAYER}ln_2", model)
    for number, name in enumerate(("query", "key", "value")):
        fused = f"{LAYER}attn.c_attn"
        found += [Row(f"layers/attention/{name}", f"{fused}.weight", f"D ({number}/3 H N) -> D H N")]
        found += [Row(f"layers/attention/{name}_bias", f"{fused}.bias", f"({number}/3 H N) -> H N")]
    for ours, theirs, axes, bias in (
        ("attention/out", "attn.c_proj", "(H N) D -> H N D", "D -> D"),
        ("mlp/up", "mlp.c_fc", "D F -> D F", "F -> F"),
        ("mlp/down", "mlp.c_proj", "F D -> F D", "D -> D"),
    ):
        found += [Row(f"layers/{ours}", f"{LAYER}{theirs}.weight", axes)]
        found += [Row(f"layers/{ours}_bias", f"{LAYER}{theirs}.bias", bias)]
    return found


FAMILY = Family("gpt2", "GPT2LMHeadModel", read, write, weights, [r".*attn\.(masked_)?bias"])
