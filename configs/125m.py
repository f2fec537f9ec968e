"""GPT-2 small in size, Llama in shape: 125 M parameters. For one GPU, and for benchmarks."""

from jaxtrain.config import Config, DataConfig, DataSource, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="125m",
        model=ModelConfig(
            num_layers=12,
            embed_dim=768,
            num_heads=12,
            num_kv_heads=12,
            head_dim=64,
            mlp_dim=2048,
            vocab_size=50257,
            tie_embeddings=True,
        ),
        data=DataConfig(sources=(DataSource(kind="synthetic"),), sequence_length=2048),
        optimizer=OptimizerConfig(peak_lr=6e-4, warmup_steps=700),
        train=TrainConfig(steps=10_000, global_batch_size=32, remat="none", validate_every=1000, validate_batches=10),
    )
