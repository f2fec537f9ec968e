import math
import random
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxtrain.config import LatentAttentionConfig, ModelConfig, MoEConfig
from jaxtrain.config.loading import load_config
from jaxtrain.measure.layouts import draw_model
from jaxtrain.models.decoder import initialize
from jaxtrain.telemetry.flops import (
    attention_flops_per_token,
    mfu,
    model_flops_per_step,
    model_flops_per_token,
    num_parameters,
)


def llama(layers, embed, heads, kv_heads, mlp, vocab):
    return ModelConfig(
        num_layers=layers,
        embed_dim=embed,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        mlp_dim=mlp,
        vocab_size=vocab,
    )


LLAMA_2_7B = llama(32, 4096, 32, 32, 11008, 32000)
LLAMA_31_8B = llama(32, 4096, 32, 8, 14336, 128256)
LLAMA_31_70B = llama(80, 8192, 64, 8, 28672, 128256)
LLAMA_31_405B = llama(126, 16384, 128, 8, 53248, 128256)


@pytest.mark.parametrize(
    ("model", "published"),
    [
        (LLAMA_2_7B, 6_738_415_616),
        (LLAMA_31_8B, 8_030_261_248),
        (LLAMA_31_70B, 70_553_706_496),
        (LLAMA_31_405B, 405_853_388_800),
    ],
)
def test_parameters_are_what_the_model_cards_say(model, published):
    assert num_parameters(model).total == published


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_norm", ["none", "head"])
def test_parameters_are_the_sum_of_the_shapes(tied, qk_norm):
    model = ModelConfig(
        num_layers=3,
        embed_dim=48,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=80,
        vocab_size=77,
        tie_embeddings=tied,
        qk_norm=qk_norm,
    )
    matrices = [(48, 6, 16), (48, 2, 16), (48, 2, 16), (6, 16, 48), (48, 80), (48, 80), (80, 48)]
    norms = [(48,), (48,)] + ([(16,), (16,)] if qk_norm == "head" else [])
    layers = 3 * sum(math.prod(shape) for shape in matrices + norms)
    count = num_parameters(model)
    assert count.layers == layers
    assert count.total == layers + 48 + 77 * 48 * (1 if tied else 2)
    assert count.non_embedding == layers + 48
    assert count.matmul == 3 * sum(math.prod(shape) for shape in matrices) + 77 * 48


@pytest.mark.parametrize("seed", range(20))
def test_parameters_are_those_of_the_real_decoder(seed):
    model = draw_model(random.Random(seed).choice)
    params = jax.eval_shape(lambda: initialize(model, jax.random.key(0), np.arange(model.stacked_layers)))
    held = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    padding = (model.padded_vocab_size - model.vocab_size) * model.embed_dim * (1 if model.tie_embeddings else 2)
    assert num_parameters(model).total == held - padding, model


def test_flops_of_a_token_by_hand():
    # One layer, D=4, two query heads and one kv head of width 2, F=8, V=10, L=6:
    # Q 16 + K 8 + V 8 + O 16 + 3 x 32 = 144; output 40; 6 x 184 = 1104; attention 12 x 6 x 2 x 2 = 288.
    model = ModelConfig(num_layers=1, embed_dim=4, num_heads=2, num_kv_heads=1, head_dim=2, mlp_dim=8, vocab_size=10)
    assert model_flops_per_token(model, 6, "full") == 1104 + 288
    assert model_flops_per_token(model, 6, "causal") == 1104 + 144
    assert model_flops_per_step(model, 6, 5, "full") == 30 * (1104 + 288)


def test_tying_changes_no_flops_and_padding_is_not_counted():
    model = ModelConfig(vocab_size=1000)
    tied = ModelConfig(vocab_size=1000, tie_embeddings=True)
    assert model.padded_vocab_size == 1024
    assert model_flops_per_token(model, 128, "full") == model_flops_per_token(tied, 128, "full")
    one_more = ModelConfig(vocab_size=1001)
    assert model_flops_per_token(one_more, 128, "full") - model_flops_per_token(model, 128, "full") == 6 * model.embed_dim


def test_llama_2_7b_at_4096_is_megatrons_sum():
    # Its sum, a token: forward matmuls (four projections, SwiGLU's three, half of QK^T and PV, the logits) times three.
    length, embed, mlp, vocab = 4096, 4096, 11008, 32000
    forward = 32 * (2 * 4 * embed**2 + 2 * 3 * embed * mlp + 2 * 2 * length * embed / 2) + 2 * embed * vocab
    assert model_flops_per_token(LLAMA_2_7B, length, "causal") == 3 * forward


def test_mfu_is_none_without_a_peak():
    assert mfu(5e14, 1e15) == 0.5
    assert mfu(5e14, None) is None


PUBLISHED = {
    # Mistral AI, "Mixtral of experts" (mistral.ai/news/mixtral-of-experts); Qwen3-30B-A3B's model card, which rounds to 0.1 B.
    "mixtral_8x7b": (46.7e9, 12.9e9),
    "qwen3_30b_a3b": (30.5e9, 3.3e9),
    # arXiv:2412.19437, section 4.2, which counts neither the multi-token prediction module nor decimals.
    "deepseek_v3": (671e9, 37e9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_mixtures_are_what_is_published(name):
    total, active = PUBLISHED[name]
    count = num_parameters(load_config(f"configs/{name}.py").model)
    digits = 1e9 if name == "deepseek_v3" else 0.1e9
    assert abs(count.total - total) <= digits / 2
    assert abs(count.total - count.idle - active) <= digits


DEEPSEEK_LIKE = ModelConfig(
    num_layers=3,
    vocab_size=1000,
    latent_attention=LatentAttentionConfig(query_rank=24, kv_rank=16, rope_dim=8, value_dim=12),
    moe=MoEConfig(num_experts=8, experts_per_token=3, mlp_dim=20, shared_experts=2, first_dense_layers=1, bias_update_rate=0.1),
)


@pytest.mark.parametrize("rank", [0, 24])
@pytest.mark.parametrize("bias", [0.0, 0.1])
def test_parameters_of_a_mixture_are_those_of_the_real_decoder(rank, bias):
    model = replace(
        DEEPSEEK_LIKE,
        latent_attention=replace(DEEPSEEK_LIKE.latent_attention, query_rank=rank),
        moe=replace(DEEPSEEK_LIKE.moe, bias_update_rate=bias),
    )
    params = jax.eval_shape(lambda: initialize(model, jax.random.key(0), np.arange(model.stacked_layers)))
    held = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    padding = 2 * (model.padded_vocab_size - model.vocab_size) * model.embed_dim
    assert num_parameters(model).total == held - padding


def test_flops_of_a_mixture_by_hand():
    # Two layers, the first dense; D=4, two heads of 2 + 2 with values of 3, ranks 5 and 6; V=10, L=6.
    # Attention: 4 x 5 + 5 x 2 x 4 + 4 x (6 + 2) + 6 x 2 x (2 + 3) + 2 x 3 x 4 = 176, twice; dense MLP 3 x 4 x 8 = 96;
    # router 4 x 4; experts of 3 x 4 x 7 = 84, two of four and one shared: 252; output 40. 6 x 756 = 4536.
    # QK^T and PV: 6 x 6 x 2 x (4 + 3) = 504 a layer.
    model = ModelConfig(
        num_layers=2,
        embed_dim=4,
        num_heads=2,
        num_kv_heads=2,
        head_dim=2,
        mlp_dim=8,
        vocab_size=10,
        latent_attention=LatentAttentionConfig(query_rank=5, kv_rank=6, rope_dim=2, value_dim=3),
        moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=7, shared_experts=1, first_dense_layers=1),
    )
    assert model_flops_per_token(model, 6, "full") == 6 * (2 * 176 + 96 + 16 + 252 + 40) + 2 * 504
    assert model_flops_per_token(model, 6, "causal") == 6 * (2 * 176 + 96 + 16 + 252 + 40) + 504


def test_a_sliding_window_counts_the_keys_that_are_seen():
    model = ModelConfig(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, sliding_window=64)
    length = 4096
    seen = np.minimum(np.arange(length) + 0.5, 64).mean()  # half of its own key, as without a window
    assert attention_flops_per_token(model, length, "causal") == pytest.approx(12 * 2 * seen, rel=1e-3)
    assert attention_flops_per_token(model, 64, "full") == 12 * 64 * 2
