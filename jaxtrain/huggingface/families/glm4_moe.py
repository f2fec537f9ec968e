"""GLM-4.5 and 4.6: experts chosen in groups by sigmoid scores, dense first layers, half of each head rotated."""

from __future__ import annotations

from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import CHOSEN, Family, Part, biases, expects, flag, mixture, same, standard, written
from jaxtrain.huggingface.rope import rope


def grouped(router: str = "sigmoid") -> tuple[Part, ...]:
    """Return the parts of the experts of DeepSeek-V3 and its kin."""
    return (
        expects("scoring_func", router),
        expects("moe_layer_freq", 1),
        same("n_routed_experts", "num_experts"),
        CHOSEN,
        same("moe_intermediate_size", "mlp_dim"),
        same("n_shared_experts", "shared_experts", 0),
        same("first_k_dense_replace", "first_dense_layers", 0),
        same("norm_topk_prob", "normalize_weights", True),
        same("routed_scaling_factor", "weight_scale", 1.0),
        same("n_group", "groups", 1),
        same("topk_group", "groups_per_token", 1),
    )


SIGMOID = mixture(*grouped(), router="sigmoid", selection_bias=True)
# The layers that predict further tokens are not part of the model.
OWN = (SIGMOID, flag("use_qk_norm", "qk_norm", "head"), written(num_mtp_layers=0))
PARTS = (*standard(), rope(), biases("qkv"), *OWN)
FAMILY = Family("glm4_moe", "Glm4MoeForCausalLM", PARTS, rows.llama, [r"model\.layers\.(46|92)\..*"])
