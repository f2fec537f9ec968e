"""Llama-3.1-405B in shape (Grattafiori et al. 2024): 405.9 B parameters, in its report's kind of layout: tensor 8, pipe 16."""

from jaxtrain.config import (
    Config,
    DataConfig,
    DataSource,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    RopeScaling,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="405b",
        model=ModelConfig(
            num_layers=126,
            embed_dim=16384,
            num_heads=128,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=53248,
            vocab_size=128256,
            rope_theta=500_000.0,
            rope_scaling=RopeScaling(),
        ),
        mesh=MeshConfig(pipe=16, tensor=8),
        pipeline=PipelineConfig(schedule="1f1b"),
        data=DataConfig(sources=(DataSource(kind="synthetic"),), sequence_length=8192),
        optimizer=OptimizerConfig(peak_lr=8e-5, warmup_steps=8000),
        train=TrainConfig(steps=1_000_000, global_batch_size=2048, microbatches=16, validate_every=1000, validate_batches=10),
    )
