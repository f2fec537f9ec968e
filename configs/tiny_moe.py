"""A small mixture of experts on real text that every machine has: eight experts, two a token, and one shared."""

from jaxtrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DataSource,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="tiny_moe",
        model=ModelConfig(
            num_layers=2,
            embed_dim=128,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            vocab_size=2048,
            dtype="float32",
            tie_embeddings=True,
            qk_norm="head",
            moe=MoEConfig(
                num_experts=8, experts_per_token=2, mlp_dim=64, shared_experts=1, balance_loss=0.01, router_z_loss=0.001
            ),
        ),
        data=DataConfig(sources=(DataSource(kind="stdlib"),), tokenizer="bpe:2048", sequence_length=128),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=20),
        train=TrainConfig(steps=200, global_batch_size=8, remat="none", log_every=5, validate_every=100),
        checkpoint=CheckpointConfig(every=100),
    )
