"""Qwen3-30B-A3B in shape (Yang et al. 2025, arXiv:2505.09388, and its config.json): 30.5 B parameters, 3.3 B active."""

from jaxtrain.config import Config, DataConfig, DataSource, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="qwen3_30b_a3b",
        model=ModelConfig(
            num_layers=48,
            embed_dim=2048,
            num_heads=32,
            num_kv_heads=4,
            head_dim=128,
            vocab_size=151936,
            rope_theta=1_000_000.0,
            norm_epsilon=1e-6,
            qk_norm="head",
            moe=MoEConfig(num_experts=128, experts_per_token=8, mlp_dim=768, balance_loss=0.001),
        ),
        mesh=MeshConfig(expert=8),
        data=DataConfig(sources=(DataSource(kind="synthetic"),), sequence_length=4096),
        optimizer=OptimizerConfig(peak_lr=3e-4, warmup_steps=2000),
        train=TrainConfig(steps=500_000, global_batch_size=512, validate_every=1000, validate_batches=10),
    )
