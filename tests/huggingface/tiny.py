"""The tiny model of each family: the config as `transformers` takes it, weights from a seeded generator, one batch.

The sizes are odd on purpose: heads x head_dim differs from the width where the family allows it, few key and value heads, a
vocabulary that is a multiple of nothing, windows shorter than the sequence, several groups of a pattern and a remainder.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

VOCAB, LENGTH = 101, 32
IGNORED = -1
ENDS = (LENGTH, 11, 25)
"""Row 0 is one document of the whole length; row 1 holds documents that end at 11 and at 25, then padding."""

COMMON = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 5, "num_attention_heads": 4}
COMMON |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0, "original_max_position_embeddings": 16}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
LATENT = {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10, "num_key_value_heads": 4}
DEEPSEEK = {**EXPERTS, **LATENT, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 2, "rms_norm_eps": 1e-6}
del DEEPSEEK["num_experts"]


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4, "head_dim": 16, **_rope(1e4)}),
    "llama3_1": ("LlamaConfig", {"head_dim": 16, **_rope(5e4, **LLAMA3, original_max_position_embeddings=16)}),
    "llama3_2": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, **_rope(5e4)}),
    "mistral": ("MistralConfig", {"head_dim": 16, "sliding_window": 7, **_rope(1e4)}),
    "mixtral": ("MixtralConfig", {"head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 2, **_rope(1e4)}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True, **_rope(1e6)}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, **_rope(1e6)}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 16, "norm_topk_prob": True, **EXPERTS, **_rope(1e6)}),
    "gemma": ("GemmaConfig", {"head_dim": 16, "num_key_value_heads": 1, **_rope(1e4)}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0}
        | {"final_logit_softcapping": 2.0, **_rope(1e4)},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20, "num_hidden_layers": 8}
        | {"layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2 + ["sliding_attention"] * 2}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            }
        },
    ),
    "gpt2": ("GPT2Config", {"activation_function": "gelu_new"}),
    "gpt_neox": ("GPTNeoXConfig", {"hidden_act": "gelu", **_rope(1e4, partial_rotary_factor=0.5)}),
    "gpt_neox_sequential": (
        "GPTNeoXConfig",
        {"use_parallel_residual": False, "tie_word_embeddings": True, **_rope(1e4, partial_rotary_factor=0.34)},
    ),
    "olmo2": ("Olmo2Config", _rope(5e5)),
    "olmoe": ("OlmoeConfig", {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 40, **_rope(1e4)}),
    "phi3": (
        "Phi3Config",
        {"original_max_position_embeddings": 16, "sliding_window": 9, "hidden_size": 64}
        | _rope(
            1e4,
            rope_type="longrope",
            partial_rotary_factor=0.75,
            short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            long_factor=[1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
        ),
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 1, 0, 1, 1], **_rope(2e4)}),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 1.5,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            **_rope(1e4),
        },
    ),
    "cohere": ("CohereConfig", {"logit_scale": 0.5, **_rope(1e4)}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {"head_dim": 16, "attention_bias": True, "use_qk_norm": True, "n_routed_experts": 8, "num_experts_per_tok": 3}
        | {"moe_intermediate_size": 40, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7, "num_mtp_layers": 0}
        | _rope(1e4, partial_rotary_factor=0.5),
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {**DEEPSEEK, "q_lora_rank": 20, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
        | {"routed_scaling_factor": 1.3, **_rope(1e4, **YARN, mscale=0.7, mscale_all_dim=0.9)},
    ),
    "deepseek_v2_lite": ("DeepseekV2Config", {**DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy", **_rope(1e4)}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**DEEPSEEK, "q_lora_rank": 20, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_mtp_layers": 0}
        | _rope(1e4, **YARN, mscale=1.0, mscale_all_dim=1.0),
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"head_dim": 16, "sliding_window": 6, "num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 40}
        | _rope(1.5e4, **YARN, truncate=False),
    ),
}
"""Name -> (class of the config in `transformers`, its arguments beside COMMON)."""


def arguments(family: str) -> dict[str, Any]:
    """The arguments of the family's config class."""
    if FAMILIES[family][0] == "GPT2Config":
        renamed = {"n_embd": 48, "n_layer": 5, "n_head": 4, "n_positions": 64, "n_inner": 80, "vocab_size": VOCAB}
        return renamed | {"bos_token_id": 1, "eos_token_id": 2} | FAMILIES[family][1]
    return COMMON | FAMILIES[family][1]


def weight(name: str, shape: tuple[int, ...], family: str = "") -> np.ndarray:
    """A weight of a tiny model, float32: a norm's scale near 1, a bias near 0, a matrix's of about unit gain."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        is_norm = name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
        return np.float32(is_norm and not family.startswith("gemma")) + np.float32(0.2) * drawn
    if any(word in name for word in ("embed_tokens", "embed_in", "wte")):
        return np.float32(0.25) * drawn
    return drawn / np.float32(np.sqrt(shape[-1]))


def direction(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Four seeded directions of unit size, [4, *shape]: a gradient's products with them tell it from one of the same norm."""
    return np.random.default_rng(zlib.crc32(f"directions of {name}".encode())).standard_normal((4, *shape)) / 2


def batch() -> dict[str, np.ndarray]:
    """int32 [2, LENGTH]: tokens, positions, segments (0 is padding) and targets (-1: none)."""
    tokens = np.random.default_rng(5).integers(0, VOCAB, (2, LENGTH)).astype(np.int32)
    places = np.arange(LENGTH)
    starts = np.stack([np.zeros(LENGTH, int), np.select([places < 11, places < 25], [0, 11], 25)])
    segments = np.stack([np.ones(LENGTH, int), np.select([places < 11, places < 25], [1, 2], 0)])
    targets = np.full_like(tokens, IGNORED)
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    targets[:, :-1] = np.where(same, tokens[:, 1:], IGNORED)
    ints = {"tokens": tokens, "positions": places - starts, "segments": segments, "targets": targets}
    return {name: value.astype(np.int32) for name, value in ints.items()}


NEW_TOKENS = 64
"""Tokens of an answer, longer than every window and than the contexts that RoPE stretches."""


def prompts() -> list[list[int]]:
    """Prompts of unequal lengths."""
    random = np.random.default_rng(7)
    return [random.integers(0, VOCAB, count).tolist() for count in (3, 19, 9)]


def with_room(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return a config.json, and the shapes of its weights, with positions for an answer, which no token ends."""
    length = "n_positions" if "n_positions" in config else "max_position_embeddings"
    tables = {"transformer.wpe.weight": (128, 48)} if length == "n_positions" else {}
    return config | {length: 128, "eos_token_id": None}, shapes | tables
