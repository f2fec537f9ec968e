"""Llama-3.1-8B in shape (Grattafiori et al. 2024): 8.03 B parameters."""

from jaxtrain.config import Config, DataConfig, DataSource, ModelConfig, OptimizerConfig, RopeScaling, TrainConfig


def get_config() -> Config:
    return Config(
        name="8b",
        model=ModelConfig(
            num_layers=32,
            embed_dim=4096,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=14336,
            vocab_size=128256,
            rope_theta=500_000.0,
            rope_scaling=RopeScaling(),
        ),
        data=DataConfig(sources=(DataSource(kind="synthetic"),), sequence_length=8192),
        optimizer=OptimizerConfig(peak_lr=3e-4, warmup_steps=2000),
        train=TrainConfig(steps=500_000, global_batch_size=64, validate_every=1000, validate_batches=10),
    )
