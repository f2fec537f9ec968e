"""config.json as it is published: every field of a family is read, and what changes the result is refused."""

from __future__ import annotations

import json

import pytest

from jaxtrain.errors import ExplainedError
from jaxtrain.huggingface.config import read_config

# The fields of the models' own repositories, by older and newer versions of transformers and of other tools; small sizes.
SHARED = json.loads("""
{"architectures": ["X"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
 "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 128, "max_position_embeddings": 2048,
 "num_attention_heads": 4, "num_hidden_layers": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
 "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.40", "use_cache": true, "vocab_size":
 1000}
""")
"""The fields that most have."""
OWN = json.loads("""
{
"SmolLM2": {"model_type": "llama", "attention_bias": false, "is_llama_config": true, "mlp_bias": false, "pad_token_id": 2,
 "pretraining_tp": 1, "rope_interleaved": false, "rope_scaling": null, "transformers.js_config": {"dtype": "q4"}},
"Llama-3.1": {"eos_token_id": [1, 2], "model_type": "llama", "attention_bias": false, "mlp_bias": false, "pretraining_tp":
 1, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings":
 1024, "rope_type": "llama3"}},
"Qwen2.5": {"model_type": "qwen2", "max_window_layers": 28, "sliding_window": 1024, "use_mrope": false,
 "use_sliding_window": false},
"Qwen3": {"model_type": "qwen3", "head_dim": 16, "attention_bias": false, "max_window_layers": 28, "rope_scaling": null,
 "sliding_window": null, "use_sliding_window": false},
"Mistral": {"model_type": "mistral", "sliding_window": null, "head_dim": 16},
"Pythia": {"alone": true, "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act":
 "gelu", "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 256, "layer_norm_eps": 1e-05,
 "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 4, "num_hidden_layers": 3,
 "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": false, "torch_dtype": "float16",
 "transformers_version": "4.24.0", "use_cache": true, "use_parallel_residual": true, "vocab_size": 1000},
"gpt2": {"alone": true, "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
 "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
 "model_type": "gpt2", "n_ctx": 1024, "n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 1024, "resid_pdrop": 0.1,
 "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true, "summary_type": "cls_index",
 "summary_use_proj": true, "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}},
 "vocab_size": 1000},
"Gemma-2": {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": true, "model_type": "gemma2", "attention_bias":
 false, "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 16,
 "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16, "sliding_window": 128},
"Gemma-3": {"tie_word_embeddings": true, "model_type": "gemma3_text", "attention_bias": false, "attn_logit_softcapping":
 null, "cache_implementation": "hybrid", "final_logit_softcapping": null, "head_dim": 16, "hidden_activation":
 "gelu_pytorch_tanh", "query_pre_attn_scalar": 16, "rope_local_base_freq": 10000, "rope_scaling": null, "sliding_window":
 128, "sliding_window_pattern": 2},
"Mixtral": {"model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 4, "output_router_logits": false,
 "router_aux_loss_coef": 0.02, "sliding_window": null},
"Phi-3": {"model_type": "phi3", "auto_map": {"a": "b"}, "embd_pdrop": 0.0, "original_max_position_embeddings": 2048,
 "resid_pdrop": 0.0, "rope_scaling": null, "sliding_window": 1024, "attention_bias": false, "pad_token_id": 3},
"OLMo-2": {"model_type": "olmo2", "attention_bias": false, "rope_scaling": null, "pad_token_id": 1},
"Granite": {"model_type": "granite", "attention_bias": false, "attention_multiplier": 0.0156, "embedding_multiplier":
 12.0, "logits_scaling": 8.0, "mlp_bias": false, "residual_multiplier": 0.22, "rope_scaling": null},
"SmolLM3": {"model_type": "smollm3", "attention_bias": false, "layer_types": ["full_attention", "full_attention",
 "full_attention", "full_attention"], "max_window_layers": 28, "mlp_bias": false, "no_rope_layer_interval": 4,
 "no_rope_layers": [1, 1, 1, 0], "pretraining_tp": 2, "rope_scaling": null, "sliding_window": null, "use_sliding_window":
 false},
"Unsloth Llama": {"model_type": "llama", "unsloth_fixed": true, "unsloth_version": "2024.9", "_name_or_path": "x",
 "attention_bias": false, "mlp_bias": false},
"DeepSeek-V3": {"num_key_value_heads": 4, "rms_norm_eps": 1e-06, "model_type": "deepseek_v3", "attention_bias": false,
 "auto_map": {}, "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16,
 "moe_intermediate_size": 32, "moe_layer_freq": 1, "n_group": 2, "n_routed_experts": 8, "n_shared_experts": 1,
 "norm_topk_prob": true, "num_experts_per_tok": 2, "num_nextn_predict_layers": 1, "q_lora_rank": 24, "qk_nope_head_dim":
 16, "qk_rope_head_dim": 8, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
 "mscale_all_dim": 1.0, "original_max_position_embeddings": 1024, "type": "yarn"}, "routed_scaling_factor": 2.5,
 "scoring_func": "sigmoid", "seq_aux": true, "topk_group": 1, "topk_method": "noaux_tc", "v_head_dim": 16},
"gpt-oss": {"model_type": "gpt_oss", "attention_bias": true, "experts_per_token": 2, "head_dim": 16,
 "initial_context_length": 1024, "layer_types": ["sliding_attention", "full_attention", "sliding_attention",
 "full_attention"], "num_experts_per_tok": 2, "num_local_experts": 4, "output_router_logits": false, "quantization_config":
 {"modules_to_not_convert": ["a"], "quant_method": "mxfp4"}, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0,
 "factor": 32.0, "original_max_position_embeddings": 1024, "rope_type": "yarn", "truncate": false}, "router_aux_loss_coef":
 0.9, "sliding_window": 128, "swiglu_limit": 7.0},
"OLMoE": {"model_type": "olmoe", "attention_bias": false, "clip_qkv": null, "num_experts": 4, "num_experts_per_tok": 2,
 "norm_topk_prob": false, "output_router_logits": false, "rope_scaling": null, "router_aux_loss_coef": 0.01,
 "pad_token_id": 1},
"Cohere": {"rms_norm_eps": null, "model_type": "cohere", "attention_bias": false, "layer_norm_eps": 1e-05, "logit_scale":
 0.0625, "use_qk_norm": false, "pad_token_id": 0},
"Qwen3-MoE": {"model_type": "qwen3_moe", "attention_bias": false, "decoder_sparse_step": 1, "head_dim": 16,
 "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 32, "norm_topk_prob": true, "num_experts": 8,
 "num_experts_per_tok": 2, "output_router_logits": false, "rope_scaling": null, "router_aux_loss_coef": 0.001,
 "sliding_window": null, "use_sliding_window": false}
}
""")
PUBLISHED = {name: own if own.pop("alone", False) else SHARED | own for name, own in OWN.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_fields_are_read(name: str):
    model = read_config(PUBLISHED[name], name)
    assert (model.embed_dim, model.vocab_size) == (64, 1000)


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("SmolLM2", {"rope_interleaved": True}, "rope_interleaved=true"),
        ("Qwen2.5", {"use_mrope": True}, "use_mrope=true"),
        ("Phi-3", {"attention_bias": True}, "attention_bias=true"),
        ("Mistral", {"sparse_heads": 2}, "sparse_heads=2"),
        ("Gemma-3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=true"),
        ("Gemma-2", {"hidden_activation": "relu"}, "relu"),
        ("DeepSeek-V3", {"scoring_func": "tanh"}, "scoring_func"),
    ],
)
def test_what_changes_the_result_is_refused(name: str, more: dict, words: str):
    with pytest.raises(ExplainedError, match=words):
        read_config(PUBLISHED[name] | more, name)
