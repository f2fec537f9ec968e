"""GLM-4.5 and 4.6: experts chosen in groups by sigmoid scores, dense first layers, half of each head rotated."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig, MoEConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import Family, Fields, biases, standard, standard_back
from jaxtrain.huggingface.rope import read_rope, write_rope


def grouped(fields: Fields, router: str = "sigmoid") -> MoEConfig:
    """Translate the experts of DeepSeek-V3 and its kin."""
    fields.expect("scoring_func", router)
    fields.expect("moe_layer_freq", 1)
    return MoEConfig(
        num_experts=fields.take("n_routed_experts"),
        experts_per_token=fields.take("num_experts_per_tok"),
        mlp_dim=fields.take("moe_intermediate_size"),
        shared_experts=fields.take("n_shared_experts", 0),
        first_dense_layers=fields.take("first_k_dense_replace", 0),
        router="sigmoid" if router == "sigmoid" else "softmax",
        normalize_weights=fields.take("norm_topk_prob", True),
        weight_scale=fields.take("routed_scaling_factor", 1.0),
        groups=fields.take("n_group", 1),
        groups_per_token=fields.take("topk_group", 1),
        selection_bias=router == "sigmoid",
    )


def grouped_back(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of `grouped`."""
    moe = model.moe
    assert moe is not None
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.mlp_dim,
        "n_shared_experts": moe.shared_experts,
        "first_k_dense_replace": moe.first_dense_layers,
        "norm_topk_prob": moe.normalize_weights,
        "routed_scaling_factor": moe.weight_scale,
        "n_group": moe.groups,
        "topk_group": moe.groups_per_token,
    }


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json."""
    own = {"moe": grouped(fields), "qk_norm": "head" if fields.take("use_qk_norm", False) else "none"}
    rope = read_rope(fields, 1e4)
    return standard(fields) | rope | biases(fields, "qkv") | own


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields; the layers that predict further tokens are not part of the model."""
    own = {"attention_bias": model.attention_bias == "qkv", "use_qk_norm": model.qk_norm == "head", "num_mtp_layers": 0}
    return standard_back(model) | write_rope(model) | grouped_back(model) | own


FAMILY = Family("glm4_moe", "Glm4MoeForCausalLM", read, write, rows.llama, [r"model\.layers\.(46|92)\..*"])
