"""Llama-2-7B in shape (Touvron et al. 2023): 6.74 B parameters. Fully sharded; eight 80 GB GPUs hold it."""

from jaxtrain.config import Config, DataConfig, DataSource, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="7b",
        model=ModelConfig(
            num_layers=32, embed_dim=4096, num_heads=32, num_kv_heads=32, head_dim=128, mlp_dim=11008, vocab_size=32000
        ),
        data=DataConfig(sources=(DataSource(kind="synthetic"),), sequence_length=4096),
        optimizer=OptimizerConfig(peak_lr=3e-4, warmup_steps=2000),
        train=TrainConfig(steps=500_000, global_batch_size=64, validate_every=1000, validate_batches=10),
    )
