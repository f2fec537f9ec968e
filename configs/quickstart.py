"""A small decoder on real text that every machine has: the running Python's standard library. About five minutes on 2 cores."""

from jaxtrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DataSource,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="quickstart",
        model=ModelConfig(
            num_layers=2,
            embed_dim=192,
            num_heads=3,
            num_kv_heads=3,
            head_dim=64,
            mlp_dim=512,
            vocab_size=2048,
            dtype="float32",
            tie_embeddings=True,
            qk_norm="head",
        ),
        data=DataConfig(sources=(DataSource(kind="stdlib"),), tokenizer="bpe:2048", sequence_length=256),
        optimizer=OptimizerConfig(name="muon", peak_lr=6e-3, warmup_steps=30),
        train=TrainConfig(
            steps=500,
            global_batch_size=4,
            remat="none",
            log_every=5,
            validate_every=125,
            sample_tokens=200,
        ),
        checkpoint=CheckpointConfig(every=250),
    )
