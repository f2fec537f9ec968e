"""1.1 B parameters in the shape of TinyLlama-1.1B (Zhang et al. 2024) with heads of 128. For one GPU, and for benchmarks."""

from jaxtrain.config import Config, DataConfig, DataSource, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="1b",
        model=ModelConfig(
            num_layers=22, embed_dim=2048, num_heads=16, num_kv_heads=4, head_dim=128, mlp_dim=5632, vocab_size=32000
        ),
        data=DataConfig(sources=(DataSource(kind="synthetic"),), sequence_length=2048),
        optimizer=OptimizerConfig(peak_lr=4e-4, warmup_steps=2000),
        train=TrainConfig(steps=100_000, global_batch_size=8, remat="dots", validate_every=1000, validate_batches=10),
    )
