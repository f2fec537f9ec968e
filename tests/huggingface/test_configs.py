"""config.json as it is published: every field of a family is read, and what changes the result is refused."""

from __future__ import annotations

import pytest

from jaxtrain.errors import ExplainedError
from jaxtrain.huggingface.config import read_config

# The fields of the models' own repositories, by older and newer versions of transformers and of other tools; small sizes.
BASE = dict(
    architectures=["X"],
    attention_dropout=0.0,
    bos_token_id=1,
    eos_token_id=2,
    hidden_act="silu",
    hidden_size=64,
    initializer_range=0.02,
    intermediate_size=128,
    max_position_embeddings=2048,
    num_attention_heads=4,
    num_hidden_layers=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.40",
    use_cache=True,
    vocab_size=1000,
)
PUBLISHED = {
    "SmolLM2": BASE
    | dict(
        model_type="llama",
        attention_bias=False,
        is_llama_config=True,
        mlp_bias=False,
        pad_token_id=2,
        pretraining_tp=1,
        rope_interleaved=False,
        rope_scaling=None,
        **{"transformers.js_config": {"dtype": "q4"}},
    ),
    "Llama-3.1": BASE
    | dict(
        model_type="llama",
        attention_bias=False,
        mlp_bias=False,
        eos_token_id=[1, 2],
        pretraining_tp=1,
        rope_scaling=dict(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=1024, rope_type="llama3"
        ),
    ),
    "Qwen2.5": BASE
    | dict(model_type="qwen2", max_window_layers=28, sliding_window=1024, use_mrope=False, use_sliding_window=False),
    "Qwen3": BASE
    | dict(
        model_type="qwen3",
        head_dim=16,
        attention_bias=False,
        max_window_layers=28,
        rope_scaling=None,
        sliding_window=None,
        use_sliding_window=False,
    ),
    "Mistral": BASE | dict(model_type="mistral", sliding_window=None, head_dim=16),
    "Pythia": dict(
        architectures=["GPTNeoXForCausalLM"],
        bos_token_id=0,
        eos_token_id=0,
        hidden_act="gelu",
        hidden_size=64,
        initializer_range=0.02,
        intermediate_size=256,
        layer_norm_eps=1e-5,
        max_position_embeddings=2048,
        model_type="gpt_neox",
        num_attention_heads=4,
        num_hidden_layers=3,
        rotary_emb_base=10000,
        rotary_pct=0.25,
        tie_word_embeddings=False,
        torch_dtype="float16",
        transformers_version="4.24.0",
        use_cache=True,
        use_parallel_residual=True,
        vocab_size=1000,
    ),
    "gpt2": dict(
        activation_function="gelu_new",
        architectures=["GPT2LMHeadModel"],
        attn_pdrop=0.1,
        bos_token_id=50256,
        embd_pdrop=0.1,
        eos_token_id=50256,
        initializer_range=0.02,
        layer_norm_epsilon=1e-5,
        model_type="gpt2",
        n_ctx=1024,
        n_embd=64,
        n_head=4,
        n_layer=3,
        n_positions=1024,
        resid_pdrop=0.1,
        summary_activation=None,
        summary_first_dropout=0.1,
        summary_proj_to_labels=True,
        summary_type="cls_index",
        summary_use_proj=True,
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
        vocab_size=1000,
    ),
    "Gemma-2": BASE
    | dict(
        model_type="gemma2",
        attention_bias=False,
        attn_logit_softcapping=50.0,
        cache_implementation="hybrid",
        final_logit_softcapping=30.0,
        head_dim=16,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=16,
        sliding_window=128,
        tie_word_embeddings=True,
    ),
    "Gemma-3": BASE
    | dict(
        model_type="gemma3_text",
        attention_bias=False,
        attn_logit_softcapping=None,
        cache_implementation="hybrid",
        final_logit_softcapping=None,
        head_dim=16,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=16,
        rope_local_base_freq=10000,
        rope_scaling=None,
        sliding_window=128,
        sliding_window_pattern=2,
        tie_word_embeddings=True,
    ),
    "Mixtral": BASE
    | dict(
        model_type="mixtral",
        num_experts_per_tok=2,
        num_local_experts=4,
        output_router_logits=False,
        router_aux_loss_coef=0.02,
        sliding_window=None,
    ),
    "Phi-3": BASE
    | dict(
        model_type="phi3",
        auto_map={"a": "b"},
        embd_pdrop=0.0,
        original_max_position_embeddings=2048,
        resid_pdrop=0.0,
        rope_scaling=None,
        sliding_window=1024,
        attention_bias=False,
        pad_token_id=3,
    ),
    "OLMo-2": BASE | dict(model_type="olmo2", attention_bias=False, rope_scaling=None, pad_token_id=1),
    "Granite": BASE
    | dict(
        model_type="granite",
        attention_bias=False,
        attention_multiplier=0.0156,
        embedding_multiplier=12.0,
        logits_scaling=8.0,
        mlp_bias=False,
        residual_multiplier=0.22,
        rope_scaling=None,
    ),
    "SmolLM3": BASE
    | dict(
        model_type="smollm3",
        attention_bias=False,
        layer_types=["full_attention"] * 4,
        max_window_layers=28,
        mlp_bias=False,
        no_rope_layer_interval=4,
        no_rope_layers=[1, 1, 1, 0],
        pretraining_tp=2,
        rope_scaling=None,
        sliding_window=None,
        use_sliding_window=False,
    ),
    "Unsloth Llama": BASE
    | dict(
        model_type="llama",
        unsloth_fixed=True,
        unsloth_version="2024.9",
        _name_or_path="x",
        attention_bias=False,
        mlp_bias=False,
    ),
    "DeepSeek-V3": BASE
    | dict(
        model_type="deepseek_v3",
        rms_norm_eps=1e-6,
        attention_bias=False,
        auto_map={},
        aux_loss_alpha=0.001,
        ep_size=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        moe_intermediate_size=32,
        moe_layer_freq=1,
        n_group=2,
        n_routed_experts=8,
        n_shared_experts=1,
        norm_topk_prob=True,
        num_experts_per_tok=2,
        num_nextn_predict_layers=1,
        q_lora_rank=24,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        rope_scaling=dict(
            beta_fast=32,
            beta_slow=1,
            factor=40,
            mscale=1.0,
            mscale_all_dim=1.0,
            original_max_position_embeddings=1024,
            type="yarn",
        ),
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
        seq_aux=True,
        topk_group=1,
        topk_method="noaux_tc",
        v_head_dim=16,
        num_key_value_heads=4,
    ),
    "gpt-oss": BASE
    | dict(
        model_type="gpt_oss",
        attention_bias=True,
        experts_per_token=2,
        head_dim=16,
        initial_context_length=1024,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_experts_per_tok=2,
        num_local_experts=4,
        output_router_logits=False,
        quantization_config=dict(modules_to_not_convert=["a"], quant_method="mxfp4"),
        rope_scaling=dict(
            beta_fast=32.0, beta_slow=1.0, factor=32.0, original_max_position_embeddings=1024, rope_type="yarn", truncate=False
        ),
        router_aux_loss_coef=0.9,
        sliding_window=128,
        swiglu_limit=7.0,
    ),
    "OLMoE": BASE
    | dict(
        model_type="olmoe",
        attention_bias=False,
        clip_qkv=None,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        output_router_logits=False,
        rope_scaling=None,
        router_aux_loss_coef=0.01,
        pad_token_id=1,
    ),
    "Cohere": BASE
    | dict(
        model_type="cohere", attention_bias=False, layer_norm_eps=1e-5, logit_scale=0.0625, use_qk_norm=False, pad_token_id=0
    )
    | {"rms_norm_eps": None},
    "Qwen3-MoE": BASE
    | dict(
        model_type="qwen3_moe",
        attention_bias=False,
        decoder_sparse_step=1,
        head_dim=16,
        max_window_layers=48,
        mlp_only_layers=[],
        moe_intermediate_size=32,
        norm_topk_prob=True,
        num_experts=8,
        num_experts_per_tok=2,
        output_router_logits=False,
        rope_scaling=None,
        router_aux_loss_coef=0.001,
        sliding_window=None,
        use_sliding_window=False,
    ),
}


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
