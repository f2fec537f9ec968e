"""Llama-3.1-70B in shape (Grattafiori et al. 2024): 70.6 B parameters. Tensor parallel in a host of 8, fsdp over hosts."""

from jaxtrain.config import Config, DataConfig, DataSource, MeshConfig, ModelConfig, OptimizerConfig, RopeScaling, TrainConfig


def get_config() -> Config:
    return Config(
        name="70b",
        model=ModelConfig(
            num_layers=80,
            embed_dim=8192,
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=28672,
            vocab_size=128256,
            rope_theta=500_000.0,
            rope_scaling=RopeScaling(),
        ),
        mesh=MeshConfig(tensor=8),
        data=DataConfig(sources=(DataSource(kind="synthetic"),), sequence_length=8192),
        optimizer=OptimizerConfig(peak_lr=1.5e-4, warmup_steps=2000),
        train=TrainConfig(steps=500_000, global_batch_size=128, validate_every=1000, validate_batches=10),
    )
