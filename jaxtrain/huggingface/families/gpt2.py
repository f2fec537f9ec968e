"""GPT-2: LayerNorm, learned positions, a plain MLP, biases, and matrices that are stored [inputs, outputs]."""

from __future__ import annotations

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import ACTIVATIONS, OF_ACTIVATION, Family, Part, expects, fixed, ignored, same
from jaxtrain.huggingface.table import Row

LAYER = "transformer.h.{layer}."


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


PARTS = (
    expects("scale_attn_weights", True),
    expects("scale_attn_by_inverse_layer_idx", False),
    expects("add_cross_attention", False),
    ignored("reorder_and_upcast_attn"),  # only how it is computed
    fixed(norm="layer", norm_bias=True, gated_mlp=False, mlp_bias=True, attention_bias="all"),
    same("n_layer", "num_layers"),
    same("n_embd", "embed_dim"),
    same("n_head", "num_heads"),
    same("n_inner", "mlp_dim", lambda fields: 4 * fields.peek("n_embd")),
    same("vocab_size", "vocab_size"),
    same("layer_norm_epsilon", "norm_epsilon", 1e-5),
    same("tie_word_embeddings", "tie_embeddings", True),
    Part(lambda fields: {"num_kv_heads": fields.peek("n_head"), "head_dim": fields.peek("n_embd") // fields.peek("n_head")}),
    Part(
        lambda fields: {"learned_positions": fields.peek("n_positions", 1024)},
        lambda model: {"n_positions": model.learned_positions},
    ),
    Part(
        lambda fields: {"activation": fields.one_of("activation_function", ACTIVATIONS, "gelu_new")},
        lambda model: {"activation_function": (OF_ACTIVATION | {"gelu_tanh": "gelu_new"})[model.activation]},
    ),
)
FAMILY = Family("gpt2", "GPT2LMHeadModel", PARTS, weights, [r".*attn\.(masked_)?bias"])
