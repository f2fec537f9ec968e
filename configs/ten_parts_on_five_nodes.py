"""A worked example of pipelining: 100 layers of width 1000, cut into 10 parts, on 5 nodes.

Each node is a pipeline stage that holds two parts, so there are two chunks a stage: node i computes parts i and i + 5.
The update is plain stochastic gradient descent, theta - alpha * gradient. It runs on five fake devices, in 11.2 GiB of memory
and some minutes:

    XLA_FLAGS=--xla_force_host_platform_device_count=5 jaxtrain train --config=configs/ten_parts_on_five_nodes.py
"""

from jaxtrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="ten_parts_on_five_nodes",
        model=ModelConfig(
            num_layers=100,
            embed_dim=1000,
            num_heads=10,
            num_kv_heads=10,
            head_dim=100,
            mlp_dim=1000,
            vocab_size=257,
            dtype="float32",
        ),
        mesh=MeshConfig(pipe=5),
        pipeline=PipelineConfig(schedule="interleaved", chunks=2),
        data=DataConfig(tokenizer="byte", sequence_length=32),
        optimizer=OptimizerConfig(name="sgd", peak_lr=2e-5, schedule="constant", beta1=0.0, weight_decay=0.0, clip_norm=0.0),
        train=TrainConfig(steps=5, global_batch_size=10, microbatches=10, log_every=1, validate_every=0),
        checkpoint=CheckpointConfig(every=0),
    )
